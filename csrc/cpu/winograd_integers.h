// Winograd's F(4 x 4, 3 x 3) with its points in integers of 16 bits, for bfloat16: the machine multiplies twice as many
// of them in the time, and adds them up exactly.
//
// The kDepth channels of a tile's point are counted in units of their largest, the weights of a result's point in units
// that keep the sums of a chain of channels within 32 bits. Those sums are exact. Counting rounds, which makes two
// fifths of the error of rounding the result to bfloat16, or half of it in a doubled picture.
#pragma once

#include "winograd.h"
#include "winograd_integer_forms.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

namespace diffkern {

constexpr int kIntegerRows = 7;         // of a product, whose sums registers hold twice: in integers and as float32
constexpr float kMost = 32767;          // of a tile's points
constexpr float kMostSum = 65536 - 32;  // of the weights of a chain: half a unit more each, times kMost, is below 2^31
constexpr float kLeast = 1e-30f;        // what is smaller counts as zero

typedef int32_t Counts __attribute__((vector_size(kLanes * sizeof(int32_t)), may_alias));

// The integer nearest to x * inverse, in the lower half of its word: what is added leaves no place for a fraction.
inline int32_t count(float x, float inverse) { return std::bit_cast<int32_t>(x * inverse + 0x1.8p23f); }
inline Counts count(const Vector& x, const Vector& inverse) { return (Counts)(x * inverse + 0x1.8p23f); }

// n channels of a tile's point, with zeros to the end of the vector. Returns their unit, which is not finite if one of
// them is not.
inline float count_all(const float* x, int64_t n, int16_t* out) {
  n = (n + kLanes - 1) / kLanes * kLanes;
  uint32_t most = std::bit_cast<uint32_t>(kLeast);  // by their bits, infinity is above all numbers and NaN above that
  for (int64_t i = 0; i < n; ++i) {
    most = std::max(most, std::bit_cast<uint32_t>(x[i]) & 0x7fffffff);
  }
  const float bound = std::bit_cast<float>(most), inverse = kMost / bound;
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<int16_t>(count(x[i], inverse));
  }
  return bound * (1 / kMost);
}

// sum + the products of two channels with those of each lane.
inline Counts add_products(Counts sum, int32_t pair, const int32_t* pairs) {
  const Counts other = *reinterpret_cast<const Counts*>(pairs);
#ifdef __AVX512VNNI__
  return (Counts)_mm512_dpwssd_epi32((__m512i)sum, _mm512_set1_epi32(pair), (__m512i)other);
#else
  return sum + (other << 16 >> 16) * static_cast<int16_t>(pair) + (other >> 16) * (pair >> 16);
#endif
}

// As `rows` of winograd_floats.h, of pairs of channels. unit: of each row.
template <int64_t kChain, int V, int R>
void rows(const int16_t* left, const int32_t* panel, int64_t pairs, const float* unit, bool first, float* out,
          const int16_t* tiles, const char* weights) {
  Vector total[R][V] = {};
  for (int64_t begin = 0; begin < pairs; begin += kChain / 2) {
    Counts sum[R][V] = {};
    for (int64_t k = begin; k < std::min(pairs, begin + kChain / 2); ++k, panel += V * kLanes) {
      __builtin_prefetch(tiles + k * 16);
      __builtin_prefetch(weights + k * 64);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        std::memcpy(&pair, left + r * kDepth + 2 * k, sizeof pair);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          sum[r][v] = add_products(sum[r][v], pair, panel + v * kLanes);
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        total[r][v] += __builtin_convertvector(sum[r][v], Vector);
      }
    }
  }
  // Not a branch on `first`: where there is one, the compiler fuses some of the products with their sums, others not.
  alignas(64) static constexpr float zeros[R * V * kLanes] = {};
  const float* before = first ? zeros : out;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const int64_t at = (r * V + v) * kLanes;
      vector(out + at) = vector(before + at) + total[r][v] * unit[r];
    }
  }
}

using IntegerRows = void (*)(const int16_t*, const int32_t*, int64_t, const float*, bool, float*, const int16_t*,
                             const char*);
template <int64_t kChain, int V, int... R>
constexpr std::array<IntegerRows, sizeof...(R)> integer_rows(std::integer_sequence<int, R...>) {
  return {rows<kChain, V, R + 1>...};
}

// As `product` of winograd_floats.h.
template <int64_t kChain, int V>
void product(int64_t tiles, const int16_t* left, const int32_t* panel, int64_t n, const float* unit, bool first,
             float* out, const int16_t* next, const char* later) {
  static constexpr auto kOf = integer_rows<kChain, V>(std::make_integer_sequence<int, kIntegerRows>());
  const int64_t parts = (tiles + kIntegerRows - 1) / kIntegerRows;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t begin = tiles * i / parts, end = tiles * (i + 1) / parts;
    kOf[end - begin - 1](left + begin * kDepth, panel, (n + 1) / 2, unit + begin, first, out + begin * V * kLanes,
                         end < tiles ? left + end * kDepth : next, later);
  }
}

// A vector of results of two channels, as for `weigh_all`: all of their points, counted, of which the inverse units lie
// `width` apart. second: or null for zeros.
template <class F, class T>
void weigh_pair(const T* first, const T* second, int64_t apart, const float* inverse, int64_t width, int32_t* out,
                int64_t step) {
  constexpr int kPoints = F::kPoints;
  Vector half[2][3 * kPoints] = {};
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    Vector x[2][3] = {};
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      x[0][j] = load_lanes(first + (3 * j + i) * apart, kLanes);
      x[1][j] = second == nullptr ? Vector{} : load_lanes(second + (3 * j + i) * apart, kLanes);
    }
    weigh(F{}, x[0], 1, half[0] + i, 3);
    weigh(F{}, x[1], 1, half[1] + i, 3);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPoints; ++i) {
    Vector y[2][kPoints];
    weigh(F{}, half[0] + 3 * i, 1, y[0], 1);
    weigh(F{}, half[1] + 3 * i, 1, y[1], 1);
#pragma GCC unroll 8
    for (int j = 0; j < kPoints; ++j) {
      const Vector& unit = vector(inverse + (i * kPoints + j) * width);
      *reinterpret_cast<Counts*>(out + (i * kPoints + j) * step) =
          (count(y[0][j], unit) & 0xffff) | count(y[1][j], unit) << 16;
    }
  }
}

// As FloatPoints of winograd_floats.h.
template <class T, class F>
class IntegerPoints {
 public:
  static constexpr int64_t kTiles = 18 * kIntegerRows;

  // inverse: of winograd_units.
  IntegerPoints(const Problem& p, const T* weight, const float* inverse)
      : p_(p), panels_(p.results, p.channels), weight_(weight), inverse_(inverse),
        step_(p.depths() * p.block * kDepth + 32), unit_step_(p.depths() * p.block),
        room_(kArea * (step_ / 2 + kWeightStep + kDepth + unit_step_ + kWidth) + 16),
        points_(room_.take<int16_t>(kArea * step_)), weights_(room_.take<int32_t>(kArea * kWeightStep)),
        patch_(room_.take(kArea * kDepth)), unit_(room_.take(kArea * kWidth)), units_(room_.take(kArea * unit_step_)) {}

  template <size_t N>
  void read(const std::array<const T*, N>& pixel, int64_t n, int64_t depth, int64_t tile, int64_t ahead) {
    transform<F>(pixel, n, patch_, kDepth, ahead);
    const int64_t at = depth * p_.block + tile;
    for (int i = 0; i < kArea; ++i) {
      units_[i * unit_step_ + at] = count_all(patch_ + i * kDepth, n, points_ + i * step_ + at * kDepth);
    }
  }

  template <int V>
  void start(int64_t panel) {
    const float* inverse = inverse_ + panel * kWidth * kArea;
    for (int64_t i = 0; i < kArea * V * kLanes; ++i) {
      const int64_t point = i / (V * kLanes);
      unit_[i] = factor<F::kDouble>(point / F::kPoints) * factor<F::kDouble>(point % F::kPoints) / inverse[i];
    }
    width_ = V * kLanes;
  }

  template <int V>
  void multiply(int64_t tiles, int64_t panel, int64_t depth, float* sums, int64_t sum_step) {
    constexpr int64_t width = V * kLanes;
    const int64_t n = std::min(kDepth, p_.channels - depth * kDepth);
    const T* kept = weight_ + panels_.at(panel, depth * kDepth);
    const float* inverse = inverse_ + panel * kWidth * kArea;
    for (int64_t c = 0; c < n; c += 2) {
      for (int64_t v = 0; v < width; v += kLanes) {
        const T* first = kept + c * width + v;
        weigh_pair<F>(first, c + 1 < n ? first + width : nullptr, n * width, inverse + v, width,
                      weights_ + c / 2 * width + v, kWeightStep);
      }
    }
    const T* later = kept + 9 * n * width;
    const int64_t share = 9 * n * width / kArea;  // of it, which is fetched at each point
    const int64_t at = depth * p_.block;
    for (int i = 0; i < kArea; ++i) {
      const int16_t* points = points_ + i * step_ + at * kDepth;
      product<chain(F{}), V>(tiles, points, weights_ + i * kWeightStep, n, units_ + i * unit_step_ + at, depth == 0,
                             sums + i * sum_step, points + step_, reinterpret_cast<const char*>(later + i * share));
    }
  }

  Vector value(const float* sum, int point, int64_t v) const {
    return vector(sum) * vector(unit_ + point * width_ + v);
  }

 private:
  static constexpr int kArea = F::kArea;
  static constexpr int64_t kWeightStep = kDepth / 2 * kWidth + 16;  // of pairs; an odd number of cache lines

  const Problem& p_;
  const Panels panels_;
  const T* weight_;
  const float* inverse_;
  int64_t step_, unit_step_, width_ = 0;
  Room room_;
  int16_t* points_;
  int32_t* weights_;
  float *patch_, *unit_, *units_;  // points of a tile before they are counted; units of a panel, and of all tiles
};

}  // namespace diffkern

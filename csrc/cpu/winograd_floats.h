// The points of a block of tiles in float32, and their products.
#pragma once

#include "winograd.h"

#include <utility>

namespace diffkern {

constexpr int kRows = kRegisters == 32 ? 14 : 6;  // of a product that the registers hold, of two vectors each

// R rows of a product over n channels: out[r] (+)= sum over k of left[r][k] * panel[k]. The tiles and the weights that
// will be read next are fetched on the way: the machine's own prefetching does not fetch them from behind the second
// cache in time.
template <int V, int R>
void rows(const float* left, const float* panel, int64_t n, bool first, float* out, const float* tiles,
          const float* weights) {
  Vector sum[R][V] = {};
  for (int64_t k = 0; k < n; ++k, panel += V * kLanes, tiles += kLanes, weights += kLanes) {
    __builtin_prefetch(tiles);
    __builtin_prefetch(weights);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float scalar = left[r * kDepth + k];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        sum[r][v] += scalar * vector(panel + v * kLanes);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      Vector& to = vector(out + (r * V + v) * kLanes);
      to = first ? sum[r][v] : to + sum[r][v];
    }
  }
}

using Rows = void (*)(const float*, const float*, int64_t, bool, float*, const float*, const float*);
template <int V, int... R>
constexpr std::array<Rows, sizeof...(R)> rows_of(std::integer_sequence<int, R...>) {
  return {rows<V, R + 1>...};
}

// All tiles: as many at a time as registers hold, and as evenly as can be. After the last of them those at `next` are
// read, and weights at `later`.
template <int V>
void product(int64_t tiles, const float* left, const float* panel, int64_t n, bool first, float* out, const float* next,
             const float* later) {
  static constexpr auto kOf = rows_of<V>(std::make_integer_sequence<int, kRows>());
  const int64_t parts = (tiles + kRows - 1) / kRows;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t begin = tiles * i / parts, end = tiles * (i + 1) / parts;
    kOf[end - begin - 1](left + begin * kDepth, panel, n, first, out + begin * V * kLanes,
                         end < tiles ? left + end * kDepth : next, later + i % V * n * kLanes);
  }
}

// In one thread's memory. T: of the pixels and of a weight that is not kept as points. F: the form.
template <class T, class F>
class FloatPoints {
 public:
  // Whole products, and weights enough times used, while the points of kDepth channels, their sums and the weights stay
  // in the second cache. Of 6 x 6 pixels as many as measured best.
  static constexpr int64_t kTiles = F::kPixels == 6 ? 4 * 14 : 6 * 14;

  FloatPoints(const Problem& p, const Kept<T, F>* weight, const float*)
      : p_(p), panels_(p.results, p.channels), weight_(weight), step_(p.depths() * p.block * kDepth + 16),
        room_(F::kArea * (step_ + kWeightStep)), points_(room_.take(F::kArea * step_)),
        weights_(room_.take(F::kArea * kWeightStep)) {}

  // n channels of a tile, from those of its patch.
  template <size_t N>
  void read(const std::array<const T*, N>& pixel, int64_t n, int64_t depth, int64_t tile, int64_t ahead) {
    transform<F>(pixel, n, points_ + (depth * p_.block + tile) * kDepth, step_, ahead);
  }

  template <int V>
  void start(int64_t) {}

  // The products of some channels at all points, of which those that are not kept are made first: the cache holds them
  // until all tiles have used them.
  template <int V>
  void multiply(int64_t tiles, int64_t panel, int64_t depth, float* sums, int64_t sum_step) {
    const int64_t n = std::min(kDepth, p_.channels - depth * kDepth);
    const Kept<T, F>* kept = weight_ + panels_.at(panel, depth * kDepth);
    weigh<V>(kept, n);
    std::array<const float*, F::kArea> weights;
    for (int i = 0; i < F::kArea; ++i) {
      weights[i] = weights_ + i * kWeightStep;
    }
    if constexpr (keeps_points(F::kPixels)) {
      for (int i = 0; i < 9; ++i) {
        weights[F::line(i / 3) * F::kPoints + F::line(i % 3)] = kept + i * n * V * kLanes;
      }
    }
    const Kept<T, F>* later = kept + 9 * n * V * kLanes;
    const int64_t share = 9 * n * V / F::kArea * kLanes;  // of it, which is fetched at each point
    const float* points = points_ + depth * p_.block * kDepth;
    for (int i = 0; i < F::kArea; ++i, points += step_) {
      product<V>(tiles, points, weights[i], n, depth == 0, sums + i * sum_step, points + step_,
                 reinterpret_cast<const float*>(later + i * share));
    }
  }

  // A vector of sums of a panel at a point.
  Vector value(const float* sum, int, int64_t) const { return vector(sum); }

 private:
  static constexpr int64_t kWeightStep = kDepth * kWidth + 16;  // an odd number of cache lines

  // The points of a panel's weights, of n channels.
  template <int V>
  void weigh(const Kept<T, F>* kept, int64_t n) {
    constexpr int64_t width = V * kLanes;
    for (int64_t c = 0; c < n; ++c) {
      for (int64_t v = 0; v < width; v += kLanes) {
        weigh_all(F{}, kept + c * width + v, n * width, weights_ + c * width + v, kWeightStep);
      }
    }
  }

  const Problem& p_;
  const Panels panels_;
  const Kept<T, F>* weight_;
  int64_t step_;  // from point to point; an odd number of cache lines, to spread over all cache sets
  Room room_;
  float *points_, *weights_;
};

}  // namespace diffkern

// Winograd's convolutions (Lavin & Gray 2016), in the forms of winograd_forms.h: their transforms, their product, and
// how their weights are kept.
//
// A tile is M x M pixels of the result. It sees a patch of pixels, which a transform turns into points: sums and
// differences of pixels. At each point the sum over channels is a matrix product, of tiles and weights; a second
// transform makes pixels of its results. Of a doubled picture, lines of the patch are equal in pairs: it is read once,
// and one line of points would be zero and is left out.
#pragma once

#include "lanes.h"
#include "winograd_forms.h"

#include <algorithm>
#include <array>

namespace diffkern {

// The sums over channels are taken in blocks of so many, which are then added: with one long chain of additions the
// error would be up to twice that of the direct convolution.
constexpr int64_t kDepth = 64;
constexpr int64_t kWidth = 2 * kLanes;            // results in a panel
constexpr int64_t kPanels = 4;                    // in a group, which a thread does with the points of a block of tiles
constexpr int kRows = kRegisters == 32 ? 14 : 6;  // of a product that the registers hold, of two vectors each

// The panels of the weight: kWidth results each, and the last as few vectors as hold what is left, filled up with
// zeros. Nine numbers are kept of each kernel: of kDepth channels of a panel after the next, [9, channels, width].
struct Panels {
  int64_t total, count, channels;  // results with those zeros, and panels

  Panels(int64_t results, int64_t channels)
      : total((results + kLanes - 1) / kLanes * kLanes), count((results + kWidth - 1) / kWidth), channels(channels) {}

  int64_t width(int64_t panel) const { return std::min(kWidth, total - panel * kWidth); }
  int64_t size() const { return total * channels * 9; }

  // Groups of panels, as even as can be.
  int64_t groups() const { return (count + kPanels - 1) / kPanels; }
  int64_t begin(int64_t group) const { return count * group / groups(); }

  // Where the channels from `first` on begin, a multiple of kDepth.
  int64_t at(int64_t panel, int64_t first) const { return (panel * kWidth * channels + first * width(panel)) * 9; }
};

// f.operator()<V>() with the vectors of a panel of `width` results.
template <class F>
void with_vectors(int64_t width, F f) {
  width == kLanes ? f.template operator()<1>() : f.template operator()<2>();
}

using Kernel = std::array<const float*, 9>;  // its numbers as they are kept, of as many results as are asked for

// A vector of results, `at` in each row of the kernel: the points that are not kept, which lie `step` apart.
template <class F>
void weigh_all(F form, const Kernel& kernel, int64_t at, float* out, int64_t step) {
  constexpr int kPoints = F::kPoints;
  Vector half[3 * kPoints];
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    Vector x[3];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      x[j] = *reinterpret_cast<const LooseVector*>(kernel[3 * j + i] + at);
    }
    weigh(form, x, 1, half + i, 3);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kPoints; ++i) {
    Vector y[kPoints];
    weigh(form, half + 3 * i, 1, y, 1);
#pragma GCC unroll 8
    for (int j = 0; j < kPoints; ++j) {
      vector(out + (i * kPoints + j) * step) = y[j];
    }
  }
}

// The points of a line a, b, c are a, (a + b + c) / 2, (a - b + c) / 2 and c: the third, which is not kept, is the sum
// of the first and the last less the second.
inline void weigh_all(Form<2, false>, const Kernel& kernel, int64_t at, float* out, int64_t step) {
  Vector line[3][4];
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const Vector first = vector(kernel[3 * i] + at), second = vector(kernel[3 * i + 1] + at);
    const Vector last = vector(kernel[3 * i + 2] + at), third = first + last - second;
    vector(out + (4 * Form<2, false>::line(i) + 2) * step) = third;
    line[i][0] = first, line[i][1] = second, line[i][2] = third, line[i][3] = last;
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    vector(out + (4 * 2 + j) * step) = line[0][j] + line[2][j] - line[1][j];
  }
}

// Those of a doubled picture are all kept: a, a + b + c and c.
inline void weigh_all(Form<2, true>, const Kernel&, int64_t, float*, int64_t) {}

// n channels of the pixels of a patch to its points, which lie `step` apart. Those that the next patch has more are
// `ahead` of these, and are fetched on the way.
template <class F, class T, size_t N>
void transform(const std::array<const T*, N>& pixel, int64_t n, float* out, int64_t step, int64_t ahead) {
  constexpr int kPatch = F::kPatch, kPoints = F::kPoints;
  for (int64_t c = 0; c < n; c += kLanes) {
    Vector half[kPatch * kPoints];  // a row of points of each column of the patch
#pragma GCC unroll 8
    for (int i = 0; i < kPatch; ++i) {
      Vector x[kPatch];
#pragma GCC unroll 8
      for (int j = 0; j < kPatch; ++j) {
        const T* from = pixel[j * kPatch + i] + c;
        if (i >= kPatch - F::kStep) {
          __builtin_prefetch(from + ahead);
        }
        x[j] = load_lanes(from, n - c);
      }
      enter(F{}, x, 1, half + i, kPatch);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kPoints; ++i) {
      Vector y[kPoints];
      enter(F{}, half + i * kPatch, 1, y, 1);
#pragma GCC unroll 8
      for (int j = 0; j < kPoints; ++j) {
        vector(out + (i * kPoints + j) * step + c) = y[j];
      }
    }
  }
}

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

}  // namespace diffkern

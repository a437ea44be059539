// Winograd's F(2 x 2, 3 x 3) (Lavin & Gray 2016): its transforms, its product, and the order of its weights.
//
// A tile is 2 x 2 pixels of the result. It sees a patch of P x P pixels, which a transform turns into P x P points:
// sums and differences of pixels. At each point the sum over channels is a matrix product, of tiles and weights; a
// second transform makes pixels of its results. P is 4: 16 multiplications for the 36 of the definition. Of a doubled
// picture it is 3: the two rows in the middle of a patch are equal, so are the columns, and one line of points in four
// would be zero; that leaves 9 multiplications.
#pragma once

#include "vector.h"

#include <algorithm>
#include <array>

namespace diffkern {

// The sums over channels are taken in blocks of so many, which are then added: with one long chain of additions the
// error would be up to twice that of the direct convolution.
constexpr int64_t kDepth = 64;
constexpr int64_t kPanels = 4;                    // of results that one pass over the points of a block makes
constexpr int kRows = kRegisters == 32 ? 14 : 6;  // of a product that the registers hold, of two vectors each

// The panels of the weight: `width` results each, the last filled up with zeros.
struct Panels {
  int64_t width, count;

  explicit Panels(int64_t results)
      : width(results <= kLanes ? kLanes : 2 * kLanes), count((results + width - 1) / width) {}

  int64_t size(int64_t points, int64_t channels) const { return count * width * points * channels; }

  // Groups of panels, as even as can be.
  int64_t groups() const { return (count + kPanels - 1) / kPanels; }
  int64_t begin(int64_t group) const { return count * group / groups(); }

  // Where the panel of a point begins. Panels of [C, width] lie in the order in which they are read.
  int64_t at(int64_t panel, int64_t point, int64_t points, int64_t channels) const {
    const int64_t group = ((panel + 1) * groups() - 1) / count, first = begin(group);
    return (first * points + point * (begin(group + 1) - first) + panel - first) * channels * width;
  }
};

// A line of a patch to a line of points, in place.
template <int P>
void enter(Vector* x, int step) {
  const Vector a = x[0], b = x[step], c = x[2 * step];
  if constexpr (P == 4) {
    x[3 * step] = b - x[3 * step];
    x[0] = a - c;
    x[step] = b + c;
    x[2 * step] = c - b;
  } else {
    x[0] = a - b;
    x[2 * step] = b - c;
  }
}

// A line of points to two pixels.
template <int P>
void leave(const Vector* x, int step, Vector& first, Vector& second) {
  if constexpr (P == 4) {
    first = x[0] + x[step] + x[2 * step];
    second = x[step] - x[2 * step] - x[3 * step];
  } else {
    first = x[0] + x[step];
    second = x[step] - x[2 * step];
  }
}

// n channels of the pixels of a patch to its points, which lie `step` apart.
template <int P>
void transform(const float* const (&pixel)[P * P], int64_t n, float* out, int64_t step) {
  for (int64_t c = 0; c < n; c += kLanes) {
    Vector x[P * P];
#pragma GCC unroll 16
    for (int i = 0; i < P * P; ++i) {
      x[i] = *reinterpret_cast<const LooseVector*>(pixel[i] + c);
    }
#pragma GCC unroll 4
    for (int i = 0; i < P; ++i) {
      enter<P>(x + i, P);
    }
#pragma GCC unroll 4
    for (int i = 0; i < P; ++i) {
      enter<P>(x + i * P, 1);
    }
#pragma GCC unroll 16
    for (int i = 0; i < P * P; ++i) {
      vector(out + i * step + c) = x[i];
    }
  }
}

// R rows of a product over n channels: out[r] (+)= sum over k of left[r][k] * panel[k]. `ahead` is what will be read
// next: the machine's own prefetching does not fetch weights from behind the second cache in time.
template <int V, int R>
void rows(const float* left, const float* panel, int64_t n, bool first, float* out, const float* ahead) {
  Vector sum[R][V] = {};
  for (int64_t k = 0; k < n; ++k, panel += V * kLanes, ahead += kLanes) {
    __builtin_prefetch(ahead, 0, 2);
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

using Rows = void (*)(const float*, const float*, int64_t, bool, float*, const float*);
template <int V, int... R>
constexpr std::array<Rows, sizeof...(R)> rows_of(std::integer_sequence<int, R...>) {
  return {rows<V, R + 1>...};
}

// All tiles: as many at a time as registers hold, and as evenly as can be.
template <int V>
void product(int64_t tiles, const float* left, const float* panel, int64_t n, bool first, float* out) {
  static constexpr auto kOf = rows_of<V>(std::make_integer_sequence<int, kRows>());
  const int64_t parts = (tiles + kRows - 1) / kRows;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t begin = tiles * i / parts, end = tiles * (i + 1) / parts;
    const float* ahead = panel + (V + i % V) * n * kLanes;
    kOf[end - begin - 1](left + begin * kDepth, panel, n, first, out + begin * V * kLanes, ahead);
  }
}

}  // namespace diffkern

// Winograd's convolutions (Lavin & Gray 2016), in the forms of winograd_forms.h: their transforms, and how weights are
// kept. The products are in winograd_floats.h and winograd_integers.h.
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
#include <type_traits>

namespace diffkern {

// The sums over channels are taken in blocks of so many, which are then added: with one long chain of additions the
// error would be up to twice that of the direct convolution.
constexpr int64_t kDepth = 64;
constexpr int64_t kWidth = 2 * kLanes;  // results in a panel
constexpr int64_t kPanels = 4;          // in a group, which a thread does with the points of a block of tiles

struct Problem {
  int64_t batch, height, width, channels, results, out_height, out_width, top, left;
  int64_t tile_rows, tile_columns, block;  // tiles, and how many are worked on together
  bool silu;

  int64_t tiles() const { return batch * tile_rows * tile_columns; }
  int64_t depths() const { return (channels + kDepth - 1) / kDepth; }
};

// What a weight is kept in. F: the form.
template <class T, class F>
using Kept = std::conditional_t<keeps_points(F::kPixels), float, T>;

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

// A vector of results of a kernel, whose nine numbers lie `apart` from each other: the points that are not kept, which
// lie `step` apart.
template <class F, class T>
void weigh_all(F form, const T* kernel, int64_t apart, float* out, int64_t step) {
  constexpr int kPoints = F::kPoints;
  Vector half[3 * kPoints];
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    Vector x[3];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      x[j] = load_lanes(kernel + (3 * j + i) * apart, kLanes);
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
inline void weigh_all(Form<2, false>, const float* kernel, int64_t apart, float* out, int64_t step) {
  Vector line[3][4];
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const float* row = kernel + 3 * i * apart;
    const Vector first = vector(row), second = vector(row + apart), last = vector(row + 2 * apart);
    const Vector third = first + last - second;
    vector(out + (4 * Form<2, false>::line(i) + 2) * step) = third;
    line[i][0] = first, line[i][1] = second, line[i][2] = third, line[i][3] = last;
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    vector(out + (4 * 2 + j) * step) = line[0][j] + line[2][j] - line[1][j];
  }
}

// Those of a doubled picture are all kept: a, a + b + c and c.
inline void weigh_all(Form<2, true>, const float*, int64_t, float*, int64_t) {}

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

}  // namespace diffkern

// Does blocks of the tiles of winograd.h, in one thread: the points of the patches, then for some results at a time the
// sums and the pixels, all of it while the block is in the cache.
//
// Channels lie in the lanes of vectors, from the load to the result. What is computed in which order depends on the
// sample's shape alone: neither threads nor the batch change a bit.
#pragma once

#include "../common/dtype.h"
#include "../common/math.h"
#include "winograd_floats.h"
#include "winograd_integers.h"

#include <algorithm>
#include <array>
#include <type_traits>

namespace diffkern {

// How the points are kept, of a form.
template <class T, class F>
using Points = std::conditional_t<F::kIntegers, IntegerPoints<T, F>, FloatPoints<T, F>>;

template <class T, class F>
struct Data {
  const T* x;
  const Kept<T, F>* weight;  // of winograd_weight
  const float* inverse;      // of winograd_units, if points are integers
  const float* shift;        // bias and add, [B, Panels::total], of one row if there is no add
  int64_t shift_stride;
  const T* residual;
  T* out;
};

template <class T, class F>
class Worker {
 public:
  Worker(const Problem& p, const Data<T, F>& data)
      : p_(p), data_(data), panels_(p.results, p.channels), points_(p, data.weight, data.inverse),
        sum_step_(p.block * kWidth + 16), room_(F::kArea * sum_step_), sums_(room_.take(F::kArea * sum_step_)) {}

  // The results of a group of panels for a block of tiles.
  void run(int64_t block, int64_t group) {
    const int64_t first = block * p_.block, tiles = std::min(p_.block, p_.tiles() - first);
    if (block_ != block) {
      block_ = block;
      for (int64_t t = 0; t < tiles; ++t) {
        read(first, t);
      }
    }
    for (int64_t panel = panels_.begin(group); panel < panels_.begin(group + 1); ++panel) {
      with_vectors(panels_.width(panel), [&]<int V>() {
        points_.template start<V>(panel);
        for (int64_t d = 0; d < p_.depths(); ++d) {
          points_.template multiply<V>(tiles, panel, d, sums_, sum_step_);
        }
        for (int64_t t = 0; t < tiles; ++t) {
          write<V>(first + t, panel, sums_ + t * V * kLanes);
        }
      });
    }
  }

 private:
  static constexpr int kPixels = F::kPatch * F::kPatch;

  // The points of a patch, that of the t-th tile of a block.
  void read(int64_t first, int64_t t) {
    const int64_t tile = first + t;
    const int64_t column = tile % p_.tile_columns, row = tile / p_.tile_columns % p_.tile_rows;
    const int64_t sample = tile / p_.tile_columns / p_.tile_rows;
    const int64_t y = row * F::kStep - p_.top, x = column * F::kStep - p_.left;
    std::array<const T*, kPixels> pixel;
    std::array<int64_t, kPixels> stride;
    for (int i = 0; i < kPixels; ++i) {
      const int64_t at_y = y + i / F::kPatch, at_x = x + i % F::kPatch;
      const bool inside = at_y >= 0 && at_y < p_.height && at_x >= 0 && at_x < p_.width;
      pixel[i] = inside ? data_.x + ((sample * p_.height + at_y) * p_.width + at_x) * p_.channels : zeros_.data();
      stride[i] = inside ? kDepth : 0;
    }
    for (int64_t d = 0; d < p_.depths(); ++d) {
      const int64_t n = std::min(kDepth, p_.channels - d * kDepth);
      points_.read(pixel, n, d, t, F::kStep * p_.channels);
      for (int i = 0; i < kPixels; ++i) {
        pixel[i] += stride[i];
      }
    }
  }

  // The pixels of a tile, a panel of results.
  template <int V>
  void write(int64_t tile, int64_t panel, const float* sums) {
    constexpr int kPoints = F::kPoints, kSide = F::kPixels;
    constexpr int64_t width = V * kLanes;
    const int64_t first = panel * kWidth, n = std::min(width, p_.results - first);
    const int64_t column = tile % p_.tile_columns * kSide, row = tile / p_.tile_columns % p_.tile_rows * kSide;
    const int64_t sample = tile / p_.tile_columns / p_.tile_rows;
    const float* shift = data_.shift + sample * data_.shift_stride + first;
    alignas(64) float pixel[kSide * kSide][width];
#pragma GCC unroll 2
    for (int64_t v = 0; v < width; v += kLanes) {
      const Vector rest = *reinterpret_cast<const LooseVector*>(shift + v);
      Vector half[kSide * kPoints];  // pixels of each column of points
#pragma GCC unroll 8
      for (int i = 0; i < kPoints; ++i) {
        Vector x[kPoints];
#pragma GCC unroll 8
        for (int j = 0; j < kPoints; ++j) {
          x[j] = points_.value(sums + (j * kPoints + i) * sum_step_ + v, j * kPoints + i, v);
        }
        leave(F{}, x, 1, half + i, kPoints);
      }
#pragma GCC unroll 6
      for (int i = 0; i < kSide; ++i) {
        Vector y[kSide];
        leave(F{}, half + i * kPoints, 1, y, 1);
#pragma GCC unroll 6
        for (int j = 0; j < kSide; ++j) {
          vector(pixel[i * kSide + j] + v) = y[j] + rest;
        }
      }
    }
    for (int i = 0; i < kSide * kSide; ++i) {
      const int64_t at_y = row + i / kSide, at_x = column + i % kSide;
      if (at_y < p_.out_height && at_x < p_.out_width) {
        const int64_t at = ((sample * p_.out_height + at_y) * p_.out_width + at_x) * p_.results + first;
        const T* residual = data_.residual == nullptr ? nullptr : data_.residual + at;
        T* out = data_.out + at;
        n == width ? finish(pixel[i], residual, out, width) : finish(pixel[i], residual, out, n);
      }
    }
  }

  // Inlined, for n to be a constant where it can be.
  [[gnu::always_inline]] void finish(float* y, const T* residual, T* out, int64_t n) {
    if (p_.silu) {
      for (int64_t i = 0; i < n; ++i) {
        y[i] = fast_silu(y[i]);
      }
    }
    if (residual != nullptr) {
      float room[kWidth];
      const float* rest = as_float(residual, room, n);
      for (int64_t i = 0; i < n; ++i) {
        y[i] += rest[i];
      }
    }
    narrow(y, out, n);
  }

  const Problem& p_;
  const Data<T, F>& data_;
  const Panels panels_;
  int64_t block_ = -1;  // whose points are held
  Points<T, F> points_;
  int64_t sum_step_;  // from point to point; an odd number of cache lines, to spread over all cache sets
  Room room_;
  float* sums_;
  std::array<T, kDepth> zeros_{};  // beyond the picture's edges
};

}  // namespace diffkern

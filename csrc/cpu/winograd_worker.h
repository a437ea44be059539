// Does blocks of the tiles of winograd.h, in one thread: the points of the patches, then for some results at a time the
// sums and the pixels, all of it while the block is in the cache.
//
// Channels lie in the lanes of vectors, from the load to the result. What is computed in which order depends on the
// sample's shape alone: neither threads nor the batch change a bit.
#pragma once

#include "../common/dtype.h"
#include "../common/math.h"
#include "winograd.h"

#include <algorithm>
#include <array>

namespace diffkern {

struct Problem {
  int64_t batch, height, width, channels, results, out_height, out_width, top, left;
  int64_t tile_rows, tile_columns, block;  // tiles, and how many are worked on together
  bool silu;

  int64_t numbers() const { return batch * height * width * channels; }
  int64_t tiles() const { return batch * tile_rows * tile_columns; }
  int64_t depths() const { return (channels + kDepth - 1) / kDepth; }
};

template <class T>
struct Data {
  const T* x;
  const void* weight;  // of winograd_weight: float where points are kept, else T
  const float* shift;  // bias and add, [B, Panels::total], of one row if there is no add
  int64_t shift_stride;
  const T* residual;
  T* out;
};

// F: the form.
template <class T, class F>
class Worker {
 public:
  Worker(const Problem& p, const Data<T>& data)
      : p_(p), data_(data), panels_(p.results), step_(p.depths() * p.block * kDepth + 16),
        sum_step_(p.block * kWidth + 16), room_(room()),
        points_(room_.take(F::kArea * step_)), sums_(room_.take(kSums * F::kArea * sum_step_)),
        weights_(room_.take(kWeights)), pixels_(room_.take(kPixels * kDepth)), zeros_(room_.take(kDepth)) {
    std::fill_n(zeros_, kDepth, 0.0f);
  }

  // The results of a group of panels for a block of tiles.
  void run(int64_t block, int64_t group) {
    const int64_t first = block * p_.block, tiles = std::min(p_.block, p_.tiles() - first);
    const int64_t panel = panels_.begin(group), panels = panels_.begin(group + 1) - panel;
    if (block_ != block) {
      block_ = block;
      for (int64_t t = 0; t < tiles; ++t) {
        read(first + t, points_ + t * kDepth);
      }
    }
    if constexpr (kKeeps) {
      read_weights(first, tiles, panel, panels);
    } else {
      make_weights(first, tiles, panel, panels);
    }
  }

 private:
  static constexpr int kPixels = F::kPatch * F::kPatch;
  static constexpr bool kKeeps = keeps_points(F::kPixels);
  static constexpr int64_t kSums = kKeeps ? kPanels : 1;        // panels that have sums at once
  static constexpr int64_t kWeightStep = kDepth * kWidth + 16;  // an odd number of cache lines
  static constexpr int64_t kWeights = kKeeps ? 0 : F::kArea * kWeightStep;

  int64_t room() const { return F::kArea * (step_ + kSums * sum_step_) + kWeights + (kPixels + 1) * kDepth; }

  // By kept points: all panels at a point, then the next, in the order in which they lie.
  void read_weights(int64_t first, int64_t tiles, int64_t panel, int64_t panels) {
    for (int64_t point = 0; point < F::kArea; ++point) {
      for (int64_t i = 0; i < panels; ++i) {
        const float* weight =
            static_cast<const float*>(data_.weight) + panels_.at(panel + i, point, F::kArea, p_.channels);
        with_vectors(panels_.width(panel + i), [&]<int V>() {
          for (int64_t d = 0; d < p_.depths(); ++d) {
            product<V>(tiles, points_ + point * step_ + d * p_.block * kDepth, weight + d * kDepth * V * kLanes,
                       std::min(kDepth, p_.channels - d * kDepth), d == 0, sums_ + (i * F::kArea + point) * sum_step_);
          }
        });
      }
    }
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t i = 0; i < panels; ++i) {
        with_vectors(panels_.width(panel + i), [&]<int V>() {
          write<V>(first + t, panel + i, sums_ + i * F::kArea * sum_step_ + t * V * kLanes);
        });
      }
    }
  }

  // By points made here: those of a panel for some channels, which the cache holds until all tiles have used them.
  void make_weights(int64_t first, int64_t tiles, int64_t panel, int64_t panels) {
    for (int64_t i = panel; i < panel + panels; ++i) {
      with_vectors(panels_.width(i), [&]<int V>() {
        for (int64_t d = 0; d < p_.depths(); ++d) {
          const int64_t n = weigh<V>(i, d);
          const float* points = points_ + d * p_.block * kDepth;
          for (int64_t point = 0; point < F::kArea; ++point, points += step_) {
            product<V>(tiles, points, weights_ + point * kWeightStep, n, d == 0, sums_ + point * sum_step_,
                       points + step_);
          }
        }
        for (int64_t t = 0; t < tiles; ++t) {
          write<V>(first + t, i, sums_ + t * V * kLanes);
        }
      });
    }
  }

  // The points of a panel's weights, of some channels. Returns how many.
  template <int V>
  int64_t weigh(int64_t panel, int64_t depth) {
    constexpr int64_t width = V * kLanes;
    const int64_t n = std::min(kDepth, p_.channels - depth * kDepth);
    const T* from = static_cast<const T*>(data_.weight) + (panel * p_.channels * kWidth + depth * kDepth * width) * 9;
    float room[9 * width];
    for (int64_t c = 0; c < n; ++c) {
      const float* kernel = as_float(from + c * 9 * width, room, 9 * width);
      for (int64_t v = 0; v < width; v += kLanes) {
        weigh_all<F>(kernel + v, width, weights_ + c * width + v, kWeightStep);
      }
    }
    return n;
  }

  // The points of a tile's patch.
  void read(int64_t tile, float* out) {
    const int64_t column = tile % p_.tile_columns, row = tile / p_.tile_columns % p_.tile_rows;
    const int64_t sample = tile / p_.tile_columns / p_.tile_rows;
    const int64_t y = row * F::kStep - p_.top, x = column * F::kStep - p_.left;
    std::array<const T*, kPixels> pixel;
    for (int i = 0; i < kPixels; ++i) {
      const int64_t at_y = y + i / F::kPatch, at_x = x + i % F::kPatch;
      const bool inside = at_y >= 0 && at_y < p_.height && at_x >= 0 && at_x < p_.width;
      pixel[i] = inside ? data_.x + ((sample * p_.height + at_y) * p_.width + at_x) * p_.channels : nullptr;
    }
    for (int64_t d = 0; d < p_.depths(); ++d) {
      const int64_t n = std::min(kDepth, p_.channels - d * kDepth);
      std::array<const float*, kPixels> from;
      for (int i = 0; i < kPixels; ++i) {
        from[i] = pixel[i] == nullptr ? zeros_ : whole(pixel[i] + d * kDepth, n, pixels_ + i * kDepth);
      }
      transform<F>(from, n, out + d * p_.block * kDepth, step_);
    }
  }

  // n channels as float32 that can be read in whole vectors. What then is behind them is never used: the next pixel, but
  // for the last of all.
  const float* whole(const T* x, int64_t n, float* room) const {
    const int64_t vectors = (n + kLanes - 1) / kLanes * kLanes;
    if (vectors <= data_.x + p_.numbers() - x) {
      return as_float(x, room, vectors);
    }
    widen(x, room, n);
    return room;
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
#pragma GCC unroll 6
      for (int i = 0; i < kPoints; ++i) {
        Vector x[kPoints];
#pragma GCC unroll 6
        for (int j = 0; j < kPoints; ++j) {
          x[j] = vector(sums + (j * kPoints + i) * sum_step_ + v);
        }
        leave(F{}, x, 1, half + i, kPoints);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kSide; ++i) {
        Vector y[kSide];
        leave(F{}, half + i * kPoints, 1, y, 1);
#pragma GCC unroll 4
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
  const Data<T>& data_;
  const Panels panels_;
  int64_t block_ = -1;       // whose points are held
  int64_t step_, sum_step_;  // from point to point; an odd number of cache lines, to spread over all cache sets
  Room room_;
  float *points_, *sums_, *weights_, *pixels_, *zeros_;
};

}  // namespace diffkern

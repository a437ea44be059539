// RMSNorm of rows, each read from memory once.
#pragma once

#include "blocks.h"

namespace diffkern {

// What brings the root of the mean square of a row to 1.
template <class Source>
float rms_scale(Source row, int64_t n, double eps) {
  return static_cast<float>(1 / std::sqrt(double{squares(row, n)} / static_cast<double>(n) + eps));
}

// N: the numbers of a row where they are known beforehand, which makes one of 64 a few registers; or 0.
template <int64_t N, class T>
void rms_norm_rows(const T* in, const std::vector<float>& weights, double eps, int64_t rows, int64_t n_, T* out) {
  const int64_t n = N ? N : n_;
  const Arranged<T> arranged(weights, n);
  const int64_t together = rows_together(2 * n * sizeof(T));
  in_parallel(rows, n, [&](int64_t begin, int64_t end) {
    const Computed<T> weight = arranged.row(0);
    for (int64_t r = begin; r < end; r += together) {
      const int64_t some = std::min(together, end - r);
      float scale[kTogether];
      for (int64_t i = 0; i < some; ++i) {
        scale[i] = rms_scale(Row<T>{in + (r + i) * n}, n, eps);
      }
      for (int64_t i = 0; i < some; ++i) {
        emit_blocks(Row<T>{in + (r + i) * n}, out + (r + i) * n, n,
                    [=, s = scale[i]](Block x, int64_t at, int64_t) { return x * s * weight.whole(at); });
      }
    }
  });
}

}  // namespace diffkern

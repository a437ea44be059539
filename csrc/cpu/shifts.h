// What is added to all pixels of a convolution's result.
#pragma once

#include "../common/dtype.h"

#include <optional>
#include <vector>

namespace diffkern {

// bias + add, a row of `width` a sample, or one row if there is no add; filled up with zeros.
inline std::vector<float> shifts(const char* op, int64_t samples, int64_t results, int64_t width,
                                 const std::optional<Tensor>& bias, const std::optional<Tensor>& add) {
  std::vector<float> out((add ? samples : 1) * width), row(results);
  const auto each = [&](const char* name, const Tensor& t, const std::vector<int64_t>& shape, int64_t batch) {
    check(t.is_contiguous() && has_shape(t, shape), op, ": ", name, " must be contiguous ", shape_of(shape), ", got ",
          shape_of(t));
    with_dtype(op, t.scalar_type(), [&]<class T>(T*) {
      for (size_t b = 0; b < out.size() / width; ++b) {
        widen(static_cast<const T*>(t.const_data_ptr()) + b % batch * results, row.data(), results);
        for (int64_t i = 0; i < results; ++i) {
          out[b * width + i] += row[i];
        }
      }
    });
  };
  if (bias) {
    each("bias", *bias, {results}, 1);
  }
  if (add) {
    each("add", *add, {samples, results}, samples);
  }
  return out;
}

}  // namespace diffkern

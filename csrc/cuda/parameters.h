// The parameters of a norm: vectors of channels, shared by the batch or one a sample.
#pragma once

#include "launch.h"
#include "numbers.cuh"

namespace diffkern {

using MaybeTensor = std::optional<Tensor>;

// A parameter of a shape, in float32 or `dtype`.
inline Parameter parameter(const char* op, const char* name, const MaybeTensor& t, const std::vector<int64_t>& shape,
                           ScalarType dtype) {
  if (!t) {
    return {};
  }
  check(t->is_contiguous() && has_shape(*t, shape), op, ": ", name, " must be contiguous ", shape_of(shape), ", got ",
        shape_of(*t));
  const bool wide = t->scalar_type() != dtype;
  check(!wide || t->scalar_type() == ScalarType::Float, op, ": ", name, " must have the dtype of x or be float32");
  return {t->const_data_ptr(), wide};
}

}  // namespace diffkern

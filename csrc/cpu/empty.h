// Memory for results.
#pragma once

#include "../common/check.h"
#include "pages.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

namespace diffkern {

// An uninitialised tensor. Large ones come from the operating system, which hands them out a page at a time, when it is
// first written: of 4 KB pages that takes several times as long as to write them. Linux is asked for large ones.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype, bool channels_last = false) {
  // Not torch::stable::empty: that looks the op up by its name, which takes longer than a small kernel.
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  const auto stride_at = [&](size_t axis) {
    strides[axis] = stride;
    stride *= std::max<int64_t>(shape[axis], 1);
  };
  if (channels_last) {
    for (const size_t axis : {1, 3, 2, 0}) {
      stride_at(axis);
    }
  } else {
    for (size_t axis = shape.size(); axis-- > 0;) {
      stride_at(axis);
    }
  }
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                         type, aoti_torch_device_type_cpu(), 0, &handle));
  Tensor out(handle);
  Pages(out.const_data_ptr(), out.numel() * out.element_size()).prefer_huge();
  return out;
}

}  // namespace diffkern

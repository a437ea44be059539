// Memory for results.
#pragma once

#include "../common/layout.h"
#include "pages.h"

#include <vector>

namespace diffkern {

// An uninitialised tensor. Large ones come from the operating system, which hands them out a page at a time, when it is
// first written: of 4 KB pages that takes several times as long as to write them. Linux is asked for large ones.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype, bool channels_last = false) {
  Tensor out = uninitialised(shape, dtype, channels_last, aoti_torch_device_type_cpu(), 0);
  Pages(out.const_data_ptr(), out.numel() * out.element_size()).prefer_huge();
  return out;
}

}  // namespace diffkern

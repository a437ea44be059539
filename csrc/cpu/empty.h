// Memory for results.
#pragma once

#include "../common/check.h"

#include <torch/csrc/stable/ops.h>

#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace diffkern {

constexpr size_t kHuge = 4 << 20;  // bytes: below, there are few large pages in it

// An uninitialised tensor. Large ones come from the operating system, which hands them out a page at a time, when it is
// first written: of 4 KB pages that takes several times as long as to write them. Linux is asked for large ones.
inline Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype, bool channels_last = false) {
  using torch::headeronly::MemoryFormat;
  const auto format = channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
  Tensor out = torch::stable::empty(shape, dtype, std::nullopt, std::nullopt, std::nullopt, format);
#ifdef __linux__
  const size_t bytes = out.numel() * out.element_size();
  if (bytes >= kHuge) {
    const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    const auto begin = (reinterpret_cast<uintptr_t>(out.mutable_data_ptr()) + page - 1) / page * page;
    madvise(reinterpret_cast<void*>(begin), bytes - page, MADV_HUGEPAGE);
  }
#endif
  return out;
}

}  // namespace diffkern

// Whether a packed weight still is its weight's, and the memory that the weight does without, see diffkern/packing.py.
#include "../common/check.h"
#include "pages.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

namespace diffkern {
namespace {

const unsigned char* bytes_of(const Tensor& t) { return static_cast<const unsigned char*>(t.const_data_ptr()); }

// The number of elements from a tensor's first to its last in memory.
uint64_t extent_of(const Tensor& t) {
  uint64_t extent = t.numel() > 0;
  for (int64_t i = 0; i < t.dim(); ++i) {
    extent += extent == 0 ? 0 : (t.size(i) - 1) * t.stride(i);
  }
  return extent;
}

Pages pages_of(const Tensor& t) { return {bytes_of(t), extent_of(t) * t.element_size()}; }

// Whether a tensor is a part of a file that was mapped, as safetensors does, and none of it was written.
bool of_a_file(const Tensor& t) { return pages_of(t).are_of_a_file() && !pages_of(t).written(); }

void give_back(const Tensor& t) { pages_of(t).give_back(); }

// A number that changes when a tensor's address, shape, strides, dtype or values do. Of the values it reads 64, spread
// over its memory, so that it costs next to nothing. They are a golden section apart, which meets all rows and columns
// alike. Of a tensor that is `of_a_file` it reads none, for that would fetch what was given back, until it is written.
int64_t fingerprint(const Tensor& t, bool of_a_file) {
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
  const unsigned char* bytes = bytes_of(t);
  uint64_t hash = reinterpret_cast<uint64_t>(bytes);
  const auto mix = [&](uint64_t value) {
    hash = (hash ^ value) * kGolden;
    hash ^= hash >> 29;
  };
  mix(static_cast<uint64_t>(t.scalar_type()));
  for (int64_t i = 0; i < t.dim(); ++i) {
    mix(t.size(i));
    mix(t.stride(i));
  }
  if (of_a_file && !pages_of(t).written()) {
    return static_cast<int64_t>(hash);
  }
  const uint64_t extent = extent_of(t);
  const size_t size = t.element_size();
  for (uint64_t i = 0; i < 64 && extent > 0; ++i) {
    const uint64_t element = static_cast<unsigned __int128>(i * kGolden) * extent >> 64;
    uint64_t bits = 0;
    std::memcpy(&bits, bytes + element * size, std::min(size, sizeof bits));
    mix(bits);
  }
  return static_cast<int64_t>(hash);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def("of_a_file(Tensor t) -> bool");
  m.def("give_back(Tensor t) -> ()");
  m.def("fingerprint(Tensor t, bool of_a_file) -> SymInt");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) {
  m.impl("of_a_file", TORCH_BOX(&of_a_file));
  m.impl("give_back", TORCH_BOX(&give_back));
  m.impl("fingerprint", TORCH_BOX(&fingerprint));
}

}  // namespace diffkern

// fingerprint: whether a packed weight still is its weight's, see diffkern/packing.py.
#include "../common/check.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

namespace diffkern {
namespace {

// A number that changes when a tensor's address, shape, strides, dtype or values do; of the values 64, spread over its
// memory, so that it costs next to nothing. They are a golden section apart, which meets all rows and columns alike.
int64_t fingerprint(const Tensor& t) {
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
  const auto* bytes = static_cast<const unsigned char*>(t.const_data_ptr());
  uint64_t hash = reinterpret_cast<uint64_t>(bytes), extent = t.numel() > 0;
  const auto mix = [&](uint64_t value) {
    hash = (hash ^ value) * kGolden;
    hash ^= hash >> 29;
  };
  mix(static_cast<uint64_t>(t.scalar_type()));
  for (int64_t i = 0; i < t.dim(); ++i) {
    mix(t.size(i));
    mix(t.stride(i));
    extent += extent == 0 ? 0 : (t.size(i) - 1) * t.stride(i);
  }
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

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) { m.def("fingerprint(Tensor t) -> SymInt"); }

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) { m.impl("fingerprint", TORCH_BOX(&fingerprint)); }

}  // namespace diffkern

// randn: normals from a counter, see diffkern/ops/randn.py. Bound by arithmetic: about 5 multiplications a normal.
#include "dense.h"

#include <torch/csrc/stable/library.h>

namespace diffkern {
namespace {

Tensor randn(const Tensor& keys, std::vector<int64_t> shape, int64_t draw, ScalarType dtype, int64_t offset) {
  constexpr const char* kOp = "diffkern::randn";
  const int64_t batch = keys.dim() == 0 ? 0 : keys.size(0);
  const int64_t* key = int64_data(kOp, "keys", keys, {batch, 2});
  check(offset >= 0, kOp, ": offset is ", offset, ", allowed are 0 and above");
  int64_t n = 1;
  for (const int64_t size : shape) {
    check(size >= 0, kOp, ": shape has the size ", size, ", allowed are 0 and above");
  }
  shape.insert(shape.begin(), batch);
  Tensor out = empty(shape, dtype);  // first: it refuses more elements than can be counted
  for (size_t i = 1; i < shape.size(); ++i) {
    n *= shape[i];
  }
  if (batch * n == 0) {
    return out;
  }
  with_dtype(kOp, dtype, [&]<class T>(T*) {
    T* to = data_of<T>(out);
    const int64_t runs = (n + kRun - 1) / kRun;
    const int64_t grain = std::max<int64_t>(1, kSerial / std::min(n, kRun));
    torch::stable::parallel_for(0, batch * runs, grain, [&](int64_t begin, int64_t end) {
      alignas(64) float room[normals_room(kRun / 4 + 1)];
      for (int64_t i = begin; i < end; ++i) {
        const int64_t sample = i / runs, first = i % runs * kRun, count = std::min(kRun, n - first);
        const float* noise = noise_at(Stream(key + 2 * sample, draw), offset + first, count, room);
        narrow(noise, to + sample * n + first, count);
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def("randn(Tensor keys, SymInt[] shape, SymInt draw, ScalarType dtype, SymInt offset) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) { m.impl("randn", TORCH_BOX(&randn)); }

}  // namespace diffkern

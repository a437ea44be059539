// randn: see diffkern/ops/randn.py.
#include "randn.cuh"

#include "samples.h"

namespace diffkern {
namespace {

Tensor launch_randn(const Tensor& keys, std::vector<int64_t> shape, int64_t draw, ScalarType dtype, int64_t offset) {
  constexpr const char* kOp = "diffkern::randn";
  const int64_t batch = keys.dim() == 0 ? 0 : keys.size(0);
  const int64_t* key = int64_data(kOp, "keys", keys, {batch, 2});
  check(offset >= 0, kOp, ": offset is ", offset, ", allowed are 0 and above");
  int64_t n = 1;
  for (const int64_t size : shape) {
    check(size >= 0, kOp, ": shape has the size ", size, ", allowed are 0 and above");
    n *= size;
  }
  shape.insert(shape.begin(), batch);
  Tensor out = empty_on(keys, shape, dtype);
  if (batch * n == 0) {
    return out;
  }
  const Launch launch(kOp, keys);
  with_dtype(kOp, dtype, [&]<class T>(T*) {
    const int64_t skew = offset % 4;
    T* to = data_of<T>(out);
    const bool wide = skew == 0 && n % kWide<T> == 0 && aligned(to);
    const Runs runs(batch, n + skew, kWide<T>);
    launch(wide ? randn<T, true> : randn<T, false>, runs.grid, kThreads, 0, key, to, runs.cut, draw, offset / 4,
           static_cast<int>(skew));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_CUDA, m) {
  m.def("randn(Tensor keys, SymInt[] shape, SymInt draw, ScalarType dtype, SymInt offset) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_CUDA, DIFFKERN_KEY, m) { m.impl("randn", TORCH_BOX(&launch_randn)); }

}  // namespace diffkern

// reparameterize: see diffkern/ops/reparameterize.py.
#include "reparameterize.cuh"

#include "samples.h"

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::reparameterize";

Tensor launch_reparameterize(const Tensor& mean, const Tensor& logvar, const Tensor& keys, int64_t draw) {
  const Dense d = dense(kOp, "mean", mean);
  const int64_t* key = int64_data(kOp, "keys", keys, {d.batch, 2});
  const ScalarType dtype = mean.scalar_type();
  Tensor out = empty_as(mean, dtype, d.batch);
  if (mean.numel() == 0) {
    return out;
  }
  const Launch launch(kOp, mean, logvar, keys);
  with_dtype(kOp, dtype, [&]<class T>(T*) {
    const T* centre = static_cast<const T*>(mean.const_data_ptr());
    const T* variance = data_like<T>(kOp, "logvar", logvar, dtype, mean, d.batch);
    T* to = data_of<T>(out);
    const Runs runs(d, kWide<T>, true);
    launch(runs.pick(aligned(centre, variance, to), reparameterize<T, true, false>, reparameterize<T, false, false>,
                     reparameterize<T, true, true>, reparameterize<T, false, true>),
           runs.grid, kThreads, 0, centre, variance, key, to, runs.cut, draw);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_CUDA, m) {
  m.def("reparameterize(Tensor mean, Tensor logvar, Tensor keys, SymInt draw) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_CUDA, DIFFKERN_KEY, m) { m.impl("reparameterize", TORCH_BOX(&launch_reparameterize)); }

}  // namespace diffkern

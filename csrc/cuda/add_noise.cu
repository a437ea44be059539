// add_noise: see diffkern/ops/add_noise.py.
#include "add_noise.cuh"

#include "samples.h"

#include <tuple>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::add_noise";

std::tuple<Tensor, Tensor> launch_add_noise(const Tensor& x0, const Tensor& timestep, const Tensor& alpha_sigma,
                                            const Tensor& keys, int64_t draw, bool return_noise) {
  const Dense d = dense(kOp, "x0", x0);
  check(alpha_sigma.dim() == 2 && alpha_sigma.size(1) == 2, kOp, ": alpha_sigma must be [T, 2], got ",
        shape_of(alpha_sigma));
  const float* table = float_data(kOp, "alpha_sigma", alpha_sigma);
  const int64_t* key = int64_data(kOp, "keys", keys, {d.batch, 2});
  const int64_t* row = int64_data(kOp, "timestep", timestep, {d.batch});
  const ScalarType dtype = x0.scalar_type();
  Tensor x_t = empty_as(x0, dtype, d.batch);
  Tensor epsilon = return_noise ? empty_as(x0, dtype, d.batch) : empty_on(x0, {0}, dtype);
  if (x0.numel() == 0) {
    return {x_t, epsilon};
  }
  const Launch launch(kOp, x0, timestep, alpha_sigma, keys);
  with_dtype(kOp, dtype, [&]<class T>(T*) {
    const T* from = static_cast<const T*>(x0.const_data_ptr());
    T *to = data_of<T>(x_t), *noise = return_noise ? data_of<T>(epsilon) : nullptr;
    const Runs runs(d, kWide<T>, true);
    launch(runs.pick(aligned(from, to, noise), add_noise<T, true, false>, add_noise<T, false, false>,
                     add_noise<T, true, true>, add_noise<T, false, true>),
           runs.grid, kThreads, 0, from, row, table, key, to, noise, runs.cut, alpha_sigma.size(0), draw);
  });
  return {x_t, epsilon};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_CUDA, m) {
  m.def(
      "add_noise(Tensor x0, Tensor timestep, Tensor alpha_sigma, Tensor keys, SymInt draw, bool return_noise) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_CUDA, DIFFKERN_KEY, m) { m.impl("add_noise", TORCH_BOX(&launch_add_noise)); }

}  // namespace diffkern

// add_noise: x_t = alpha_t x_0 + sigma_t epsilon in one pass, see diffkern/ops/add_noise.py.
#include "dense.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::add_noise";

template <class T>
void run(const Dense& d, const T* x0, const int64_t* timestep, const float* table, const int64_t* keys, int64_t draw,
         T* x_t, T* epsilon) {
  const auto stream = [&](int64_t sample) { return Stream(keys + 2 * sample, draw); };
  for_each_run(d, stream, [&](int64_t sample, int64_t offset, int64_t n, const float* noise) {
    const float alpha = table[2 * timestep[sample]], sigma = table[2 * timestep[sample] + 1];
    const int64_t at = sample * d.sample() + offset;
    float in_room[kRun], out_room[kRun];
    const float* x = as_float(x0 + at, in_room, n);
    float* y = place(x_t + at, out_room);
    for (int64_t i = 0; i < n; ++i) {
      y[i] = alpha * x[i] + sigma * noise[i];
    }
    put(y, x_t + at, n);
    if (epsilon != nullptr) {
      narrow(noise, epsilon + at, n);
    }
  });
}

std::tuple<Tensor, Tensor> add_noise(const Tensor& x0, const Tensor& timestep, const Tensor& alpha_sigma,
                                     const Tensor& keys, int64_t draw, bool return_noise) {
  const Dense d = dense(kOp, "x0", x0);
  check(alpha_sigma.dim() == 2 && alpha_sigma.size(1) == 2, kOp, ": alpha_sigma must be [T, 2], got ",
        shape_of(alpha_sigma));
  const float* table = float_data(kOp, "alpha_sigma", alpha_sigma);
  const int64_t* key = int64_data(kOp, "keys", keys, {d.batch, 2});
  const int64_t* row = int64_data(kOp, "timestep", timestep, {d.batch});
  check_rows(kOp, "timestep", row, d.batch, alpha_sigma.size(0));
  const ScalarType dtype = x0.scalar_type();
  Tensor x_t = empty_as(x0, dtype, d.batch);
  Tensor epsilon = return_noise ? empty_as(x0, dtype, d.batch) : no_elements(dtype);
  with_dtype(kOp, dtype, [&]<class T>(T*) {
    run(d, static_cast<const T*>(x0.const_data_ptr()), row, table, key, draw, data_of<T>(x_t),
        return_noise ? data_of<T>(epsilon) : nullptr);
  });
  return {x_t, epsilon};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def(
      "add_noise(Tensor x0, Tensor timestep, Tensor alpha_sigma, Tensor keys, SymInt draw, bool return_noise) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) { m.impl("add_noise", TORCH_BOX(&add_noise)); }

}  // namespace diffkern

// gate_residual_norm_modulate, see diffkern/ops/gate_residual_norm_modulate.py. The sum is normalised before it is
// rounded, while it is in the cache.
#include "layer_norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::gate_residual_norm_modulate";

std::tuple<Tensor, Tensor> gate_residual_norm_modulate(const Tensor& x, const Tensor& y, const Tensor& gate,
                                                       const Tensor& shift, const Tensor& scale,
                                                       const std::optional<Tensor>& weight,
                                                       const std::optional<Tensor>& bias, double eps) {
  const LayerNorm norm(kOp, x, shift, scale, weight, bias, eps);
  const std::vector<float> gates = per_sample(kOp, "gate", gate, norm.batch, norm.channels);
  Tensor residual = empty_as(x, x.scalar_type(), norm.batch), normal = empty_as(x, x.scalar_type(), norm.batch);
  const int64_t n = norm.channels;
  with_dtype(kOp, x.scalar_type(), [&]<class T>(T*) {
    const T* in = static_cast<const T*>(x.const_data_ptr());
    const T* more = data_like<T>(kOp, "y", y, x.scalar_type(), x, norm.batch);
    T *sum = data_of<T>(residual), *out = data_of<T>(normal);
    in_parallel(norm.batch * norm.tokens, 2 * n, [&](int64_t begin, int64_t end) {
      std::vector<float> x_room(n), y_room(n);
      for (int64_t r = begin; r < end; ++r) {
        const float* g = &gates[r / norm.tokens * n];
        const auto *v = readable(in + r * n, x_room.data(), n), *u = readable(more + r * n, y_room.data(), n);
        float* total = place(sum + r * n, x_room.data());
        for (int64_t i = 0; i < n; ++i) {
          total[i] = to_float(v[i]) + g[i] * to_float(u[i]);
        }
        put(total, sum + r * n, n);
        norm.row(total, sum_of(n, [total](int64_t i) { return total[i]; }), r / norm.tokens, out + r * n);
      }
    });
  });
  return {residual, normal};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def(
      "gate_residual_norm_modulate(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, Tensor? weight, "
      "Tensor? bias, float eps) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) {
  m.impl("gate_residual_norm_modulate", TORCH_BOX(&gate_residual_norm_modulate));
}

}  // namespace diffkern

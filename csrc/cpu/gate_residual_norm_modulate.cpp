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
    const LayerNormRows<T> rows(norm);
    const int64_t width = in_blocks(n), together = rows_together(4 * n * sizeof(T) + width * sizeof(float));
    const Arranged<T> gate_rows(gates, n);
    in_parallel(norm.batch * norm.tokens, 2 * n, [&](int64_t begin, int64_t end) {
      Room room(together * width);
      float* totals = room.take(0);
      for (int64_t r = begin; r < end; r += together) {
        const int64_t some = std::min(together, end - r);
        Normal normals[kTogether];
        for (int64_t i = 0; i < some; ++i) {
          const Row<T> v{in + (r + i) * n}, u{more + (r + i) * n};
          const Computed<T> g = gate_rows.row((r + i) / norm.tokens);
          float* total = totals + i * width;
          emit_blocks(v, sum + (r + i) * n, n, [=](Block x, int64_t at, int64_t size) {
            const Block sum = x + g.whole(at) * (size < kBlock ? u.part(at, size) : u.whole(at));
            vector(total + at) = sum.a, vector(total + at + kLanes) = sum.b;
            return sum;
          });
        }
        for (int64_t i = 0; i < some; ++i) {
          normals[i] = normal_of(moments(Computed<T>{totals + i * width}, n), n, norm.eps);
        }
        for (int64_t i = 0; i < some; ++i) {
          rows.emit(Computed<T>{totals + i * width}, normals[i], (r + i) / norm.tokens, out + (r + i) * n);
        }
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

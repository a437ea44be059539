// layer_norm_modulate, see diffkern/ops/layer_norm_modulate.py. A row is read from memory once: its moments and its
// result are taken while it is in the cache.
#include "layer_norm.h"

#include <torch/csrc/stable/library.h>

namespace diffkern {
namespace {

Tensor layer_norm_modulate(const Tensor& x, const std::optional<Tensor>& shift, const std::optional<Tensor>& scale,
                           const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps) {
  const LayerNorm norm("diffkern::layer_norm_modulate", x, shift, scale, weight, bias, eps);
  Tensor y = empty_as(x, x.scalar_type(), norm.batch);
  const int64_t n = norm.channels;
  with_dtype("diffkern::layer_norm_modulate", x.scalar_type(), [&]<class T>(T*) {
    const T* in = static_cast<const T*>(x.const_data_ptr());
    T* out = data_of<T>(y);
    const LayerNormRows<T> rows(norm);
    const int64_t together = rows_together(2 * n * sizeof(T));
    in_parallel(norm.batch * norm.tokens, n, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; r += together) {
        const int64_t some = std::min(together, end - r);
        Normal normals[kTogether];
        for (int64_t i = 0; i < some; ++i) {
          normals[i] = normal_of(moments(Row<T>{in + (r + i) * n}, n), n, norm.eps);
        }
        for (int64_t i = 0; i < some; ++i) {
          rows.emit(Row<T>{in + (r + i) * n}, normals[i], (r + i) / norm.tokens, out + (r + i) * n);
        }
      }
    });
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def(
      "layer_norm_modulate(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) { m.impl("layer_norm_modulate", TORCH_BOX(&layer_norm_modulate)); }

}  // namespace diffkern

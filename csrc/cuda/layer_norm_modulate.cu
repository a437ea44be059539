// layer_norm_modulate: see diffkern/ops/layer_norm_modulate.py.
#include "layer_norm.h"

namespace diffkern {
namespace {

Tensor layer_norm_modulate(const Tensor& x, const MaybeTensor& shift, const MaybeTensor& scale,
                           const MaybeTensor& weight, const MaybeTensor& bias, double eps) {
  constexpr const char* kOp = "diffkern::layer_norm_modulate";
  Rows p = rows_of(kOp, x, shift, scale, weight, bias, eps);
  const Tensor y = empty_as(x, x.scalar_type(), x.size(0));
  p.out = y.mutable_data_ptr();
  const Launch launch(kOp, x, shift, scale, weight, bias);
  normalise_rows<false>(kOp, launch, x.scalar_type(), aligned(p), p);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_CUDA, m) {
  m.def(
      "layer_norm_modulate(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_CUDA, DIFFKERN_KEY, m) {
  m.impl("layer_norm_modulate", TORCH_BOX(&layer_norm_modulate));
}

}  // namespace diffkern

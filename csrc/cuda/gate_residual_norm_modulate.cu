// gate_residual_norm_modulate: see diffkern/ops/gate_residual_norm_modulate.py. The sum is normalised before it is
// rounded, while it is in registers.
#include "layer_norm.h"

#include <tuple>

namespace diffkern {
namespace {

std::tuple<Tensor, Tensor> gate_residual_norm_modulate(const Tensor& x, const Tensor& y, const Tensor& gate,
                                                       const Tensor& shift, const Tensor& scale,
                                                       const MaybeTensor& weight, const MaybeTensor& bias,
                                                       double eps) {
  constexpr const char* kOp = "diffkern::gate_residual_norm_modulate";
  Rows p = rows_of(kOp, x, shift, scale, weight, bias, eps);
  check(y.scalar_type() == x.scalar_type() && y.is_contiguous() && has_shape(y, shape_with_batch(x, x.size(0))), kOp,
        ": y must have the dtype and shape of x, ", shape_of(x), ", got ", shape_of(y));
  const Tensor r = empty_as(x, x.scalar_type(), x.size(0)), normal = empty_as(x, x.scalar_type(), x.size(0));
  p.y = y.const_data_ptr();
  p.gate = parameter(kOp, "gate", gate, {x.size(0), x.size(2)}, x.scalar_type());
  p.r = r.mutable_data_ptr();
  p.out = normal.mutable_data_ptr();
  const Launch launch(kOp, x, y, gate, shift, scale, weight, bias);
  normalise_rows<true>(kOp, launch, x.scalar_type(), aligned(p), p);
  return {r, normal};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_CUDA, m) {
  m.def(
      "gate_residual_norm_modulate(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, Tensor? weight, "
      "Tensor? bias, float eps) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_CUDA, DIFFKERN_KEY, m) {
  m.impl("gate_residual_norm_modulate", TORCH_BOX(&gate_residual_norm_modulate));
}

}  // namespace diffkern

// rms_norm: see diffkern/ops/rms_norm.py.
#include "layer_norm.h"

namespace diffkern {
namespace {

Tensor rms_norm(const Tensor& x, const MaybeTensor& weight, double eps) {
  constexpr const char* kOp = "diffkern::rms_norm";
  check(x.dim() >= 1 && x.is_contiguous(), kOp, ": x must be contiguous [..., C], got ", shape_of(x));
  const int64_t channels = x.size(x.dim() - 1);
  const Tensor y = empty_as(x, x.scalar_type(), x.size(0));
  Rows p{};
  p.x = x.const_data_ptr();
  p.out = y.mutable_data_ptr();
  p.weight = parameter(kOp, "weight", weight, {channels}, x.scalar_type());
  p.rows = x.numel() / std::max<int64_t>(channels, 1);
  p.tokens = 1;  // nothing is of a sample
  p.channels = static_cast<int>(channels);
  p.share = 1.0f / static_cast<float>(channels);
  p.eps = static_cast<float>(eps);
  const Launch launch(kOp, x, weight);
  normalise_rows<false, false>(kOp, launch, x.scalar_type(), aligned(p), p);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_CUDA, m) { m.def("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(diffkern_CUDA, DIFFKERN_KEY, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm)); }

}  // namespace diffkern

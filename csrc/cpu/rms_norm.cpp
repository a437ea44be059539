// rms_norm, see diffkern/ops/rms_norm.py. A row is read from memory once.
#include "rms_norm.h"

#include <torch/csrc/stable/library.h>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::rms_norm";

Tensor rms_norm(const Tensor& x, const std::optional<Tensor>& weight, double eps) {
  check(x.dim() >= 1 && x.is_contiguous(), kOp, ": x must be contiguous [..., C], got ", shape_of(x));
  const int64_t n = x.size(x.dim() - 1);
  const std::vector<float> weights = parameter(kOp, "weight", weight, n, 1.0f);
  Tensor y = empty_as(x, x.scalar_type(), x.size(0));
  if (x.numel() == 0) {
    return y;
  }
  with_dtype(kOp, x.scalar_type(), [&]<class T>(T*) {
    rms_norm_rows<0>(static_cast<const T*>(x.const_data_ptr()), weights, eps, x.numel() / n, n, data_of<T>(y));
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) { m.def("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm)); }

}  // namespace diffkern

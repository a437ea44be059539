// timestep_embedding, see diffkern/ops/timestep_embedding.py. Whole turns are taken out in float64: in float32 an angle
// of a thousand has lost three digits before its sine is taken.
#include "dense.h"
#include "../common/math.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::timestep_embedding";

Tensor timestep_embedding(const Tensor& timestep, int64_t dim, bool flip_sin_to_cos, double freq_shift,
                          double max_period) {
  check(timestep.dim() == 1 && timestep.is_contiguous(), kOp, ": timestep must be [B], got ", shape_of(timestep));
  check(dim >= 0, kOp, ": dim is ", dim, ", allowed are 0 and above");
  check(max_period > 0, kOp, ": max_period is ", max_period, ", allowed are numbers above 0");
  const int64_t batch = timestep.size(0), half = dim / 2;
  Tensor result = empty({batch, dim}, ScalarType::Float);  // first: it refuses what is too large for the memory
  std::vector<double> turns(half);                         // per unit of time
  for (int64_t i = 0; i < half; ++i) {
    const double exponent = static_cast<double>(i) / (static_cast<double>(half) - freq_shift);
    turns[i] = std::exp(-std::log(max_period) * exponent) / 6.283185307179586;
  }
  float* out = data_of<float>(result);
  with_dtype(kOp, timestep.scalar_type(), [&]<class T>(T*) {
    const T* times = static_cast<const T*>(timestep.const_data_ptr());
    for (int64_t b = 0; b < batch; ++b, out += dim) {
      const double t = to_float(times[b]);
      float *sine = out + (flip_sin_to_cos ? half : 0), *cosine = out + (flip_sin_to_cos ? 0 : half);
      for (int64_t i = 0; i < half; ++i) {
        const double angle = t * turns[i];
        const SinCos pair = fast_sincos_turns(static_cast<float>(angle - std::nearbyint(angle)));
        sine[i] = pair.sin;
        cosine[i] = pair.cos;
      }
      std::fill(out + 2 * half, out + dim, 0.0f);
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def(
      "timestep_embedding(Tensor timestep, SymInt dim, bool flip_sin_to_cos, float freq_shift, float max_period) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) { m.impl("timestep_embedding", TORCH_BOX(&timestep_embedding)); }

}  // namespace diffkern

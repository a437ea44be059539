// winograd_weight: the weight of a 3 x 3 convolution at the points of winograd.h, see diffkern/winograd.py.
#include "dense.h"
#include "winograd.h"

#include <torch/csrc/stable/library.h>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::winograd_weight";

// Three numbers of a line of the kernel at three or four points, `step` apart.
template <int P>
void line(double a, double b, double c, double* out, int step) {
  out[0] = a;
  if constexpr (P == 4) {
    out[step] = (a + b + c) / 2;
    out[2 * step] = (a - b + c) / 2;
    out[3 * step] = c;
  } else {
    out[step] = a + b + c;
    out[2 * step] = c;
  }
}

// One panel, computed in float64 and rounded once. Results behind the last are zero.
template <int P, class T>
void fill(const T* weight, int64_t results, int64_t channels, const Panels& panels, int64_t panel, float* out) {
  constexpr int kPoints = P * P;
  for (int64_t i = 0; i < channels * panels.width; ++i) {
    const int64_t n = panel * panels.width + i % panels.width, c = i / panels.width;
    double half[3 * P] = {}, whole[kPoints] = {};
    if (n < results) {
      float g[9];
      widen(weight + (n * channels + c) * 9, g, 9);
      for (int j = 0; j < 3; ++j) {
        line<P>(g[j], g[3 + j], g[6 + j], half + j, 3);
      }
      for (int j = 0; j < P; ++j) {
        line<P>(half[3 * j], half[3 * j + 1], half[3 * j + 2], whole + j * P, 1);
      }
    }
    for (int64_t point = 0; point < kPoints; ++point) {
      out[panels.at(panel, point, kPoints, channels) + i] = static_cast<float>(whole[point]);
    }
  }
}

// weight: [N, C, 3, 3], contiguous. Returns a vector in the order of `Panels`, float32. upsample: for doubled pictures.
Tensor winograd_weight(const Tensor& weight, bool upsample) {
  check(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && weight.is_contiguous(), kOp,
        ": weight must be contiguous [N, C, 3, 3], got ", shape_of(weight));
  const int64_t results = weight.size(0), channels = weight.size(1);
  const Panels panels(results);
  Tensor out = torch::stable::empty({panels.size(upsample ? 9 : 16, channels)}, ScalarType::Float);
  with_dtype(kOp, weight.scalar_type(), [&]<class T>(T*) {
    const T* from = static_cast<const T*>(weight.const_data_ptr());
    torch::stable::parallel_for(0, panels.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const auto some = upsample ? fill<3, T> : fill<4, T>;
        some(from, results, channels, panels, panel, data_of<float>(out));
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) { m.def("winograd_weight(Tensor weight, bool upsample) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) { m.impl("winograd_weight", TORCH_BOX(&winograd_weight)); }

}  // namespace diffkern

// winograd_weight: the weight of a 3 x 3 convolution at the points of winograd.h, see diffkern/winograd.py.
#include "dense.h"
#include "pages.h"
#include "winograd.h"

#include <torch/csrc/stable/library.h>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::winograd_weight";
constexpr int64_t kChannels = 16;  // that are brought together at once

// Three numbers of a line of the kernel at three or four points, `step` apart.
template <int P>
inline void line(double a, double b, double c, double* out, int64_t step) {
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

// Some channels of a panel: [channels, 9, width], results side by side, and zeros behind the last.
template <class T>
void gather(const T* weight, bool channels_last, int64_t results, int64_t channels, int64_t first, int64_t n,
            int64_t width, float* out) {
  float run[9 * kChannels];
  std::fill_n(out, n * 9 * width, 0.0f);
  for (int64_t r = 0; r < results; ++r) {
    if (channels_last) {
      for (int64_t k = 0; k < 9; ++k) {
        widen(weight + (r * 9 + k) * channels + first, run + k * n, n);
      }
    } else {
      widen(weight + (r * channels + first) * 9, run, 9 * n);
    }
    for (int64_t c = 0; c < n; ++c) {
      for (int64_t k = 0; k < 9; ++k) {
        out[(c * 9 + k) * width + r] = run[channels_last ? k * n + c : c * 9 + k];
      }
    }
  }
}

// One panel, computed in float64 and rounded once.
template <int P, int64_t kWidth, class T>
void fill(const T* weight, bool channels_last, int64_t results, int64_t channels, const Panels& panels, int64_t panel,
          float* out) {
  float kernel[kChannels * 9 * kWidth];
  double half[3 * P * kWidth], whole[P * P * kWidth];
  const int64_t begin = panel * kWidth, count = std::min(kWidth, results - begin);
  for (int64_t c = 0; c < channels; ++c) {
    if (c % kChannels == 0) {
      gather(weight + begin * channels * 9, channels_last, count, channels, c, std::min(kChannels, channels - c), kWidth,
             kernel);
    }
    const float* g = kernel + c % kChannels * 9 * kWidth;
    for (int64_t i = 0; i < 3 * kWidth; ++i) {
      line<P>(g[i], g[i + 3 * kWidth], g[i + 6 * kWidth], half + i, 3 * kWidth);
    }
    for (int64_t j = 0; j < P; ++j) {
      const double* row = half + 3 * j * kWidth;
      for (int64_t i = 0; i < kWidth; ++i) {
        line<P>(row[i], row[i + kWidth], row[i + 2 * kWidth], whole + j * P * kWidth + i, kWidth);
      }
    }
    for (int64_t point = 0; point < P * P; ++point) {
      float* to = out + panels.at(panel, point, P * P, channels) + c * kWidth;
      for (int64_t i = 0; i < kWidth; ++i) {
        to[i] = static_cast<float>(whole[point * kWidth + i]);
      }
    }
  }
}

template <class T>
auto fill_of(bool upsample, int64_t width) {
  if (width == kLanes) {
    return upsample ? fill<3, kLanes, T> : fill<4, kLanes, T>;
  }
  return upsample ? fill<3, 2 * kLanes, T> : fill<4, 2 * kLanes, T>;
}

// weight: [N, C, 3, 3], contiguous or channels_last. Returns a vector in the order of `Panels`, float32. upsample: for doubled pictures.
Tensor winograd_weight(const Tensor& weight, bool upsample) {
  const bool channels_last = weight.dim() == 4 && !weight.is_contiguous() && is_channels_last(weight);
  check(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && (weight.is_contiguous() || channels_last),
        kOp, ": weight must be [N, C, 3, 3], contiguous or channels_last, got ", shape_of(weight));
  const int64_t results = weight.size(0), channels = weight.size(1);
  const Panels panels(results);
  Tensor out = torch::stable::empty({panels.size(upsample ? 9 : 16, channels)}, ScalarType::Float);
  Pages(data_of<float>(out), out.numel() * sizeof(float)).prefer_huge();
  with_dtype(kOp, weight.scalar_type(), [&]<class T>(T*) {
    const T* from = static_cast<const T*>(weight.const_data_ptr());
    torch::stable::parallel_for(0, panels.count, 1, [&](int64_t begin, int64_t end) {
      const auto one = fill_of<T>(upsample, panels.width);
      for (int64_t panel = begin; panel < end; ++panel) {
        one(from, channels_last, results, channels, panels, panel, data_of<float>(out));
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) { m.def("winograd_weight(Tensor weight, bool upsample) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) { m.impl("winograd_weight", TORCH_BOX(&winograd_weight)); }

}  // namespace diffkern

// winograd_weight: the weight of a 3 x 3 convolution as winograd.cpp reads it, see diffkern/winograd.py.
#include "dense.h"
#include "winograd.h"

#include <torch/csrc/stable/library.h>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::winograd_weight";
constexpr int64_t kChannels = 16;  // that are brought together at once

// Three numbers of a line of the kernel at its points, `step` apart.
inline void line(Form<2, false>, double a, double b, double c, double* out, int64_t step) {
  out[0] = a;
  out[step] = (a + b + c) / 2;
  out[2 * step] = (a - b + c) / 2;
  out[3 * step] = c;
}

inline void line(Form<2, true>, double a, double b, double c, double* out, int64_t step) {
  out[0] = a;
  out[step] = a + b + c;
  out[2 * step] = c;
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

// One panel, as it is: [C, 9, width], results side by side, and zeros behind the last.
template <class T>
void arrange(const T* weight, bool channels_last, int64_t results, int64_t channels, const Panels& panels,
             int64_t panel, T* out) {
  const int64_t width = panels.width(panel), begin = panel * kWidth, count = std::min(width, results - begin);
  out += begin * channels * 9;
  std::fill_n(out, channels * 9 * width, T{});
  for (int64_t r = 0; r < count; ++r) {
    const T* from = weight + (begin + r) * channels * 9;
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t k = 0; k < 9; ++k) {
        out[(i * 9 + k) * width + r] = from[channels_last ? k * channels + i : i * 9 + k];
      }
    }
  }
}

// One panel at its points, computed in float64 and rounded once.
template <class F, class T>
void fill(const T* weight, bool channels_last, int64_t results, int64_t channels, const Panels& panels, int64_t panel,
          float* out) {
  constexpr int kPoints = F::kPoints;
  float kernel[kChannels * 9 * kWidth];
  double half[3 * kPoints * kWidth], whole[F::kArea * kWidth];
  const int64_t width = panels.width(panel), begin = panel * kWidth, count = std::min(width, results - begin);
  for (int64_t c = 0; c < channels; ++c) {
    if (c % kChannels == 0) {
      gather(weight + begin * channels * 9, channels_last, count, channels, c, std::min(kChannels, channels - c), width,
             kernel);
    }
    const float* g = kernel + c % kChannels * 9 * width;
    for (int64_t i = 0; i < 3 * width; ++i) {
      line(F{}, g[i], g[i + 3 * width], g[i + 6 * width], half + i, 3 * width);
    }
    for (int64_t j = 0; j < kPoints; ++j) {
      const double* row = half + 3 * j * width;
      for (int64_t i = 0; i < width; ++i) {
        line(F{}, row[i], row[i + width], row[i + 2 * width], whole + j * kPoints * width + i, width);
      }
    }
    for (int64_t point = 0; point < F::kArea; ++point) {
      float* to = out + panels.at(panel, point, F::kArea, channels) + c * width;
      for (int64_t i = 0; i < width; ++i) {
        to[i] = static_cast<float>(whole[point * width + i]);
      }
    }
  }
}

// weight: [N, C, 3, 3], contiguous or channels_last. Returns a vector: for tiles of 2 x 2 pixels its points in the
// order of `Panels`, float32; for those of 4 x 4 panels of [C, 9, width] in its own dtype. upsample: for doubled
// pictures. pixels: 2 or 4, of a line of a tile.
Tensor winograd_weight(const Tensor& weight, bool upsample, int64_t pixels) {
  check(pixels == 2 || pixels == 4, kOp, ": pixels must be 2 or 4, got ", pixels);
  const bool channels_last = weight.dim() == 4 && !weight.is_contiguous() && is_channels_last(weight);
  check(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && (weight.is_contiguous() || channels_last),
        kOp, ": weight must be [N, C, 3, 3], contiguous or channels_last, got ", shape_of(weight));
  const int64_t results = weight.size(0), channels = weight.size(1);
  const Panels panels(results);
  const bool keeps = keeps_points(pixels);
  Tensor out = empty({panels.size(keeps ? area(pixels, upsample) : 9, channels)},
                     keeps ? ScalarType::Float : weight.scalar_type());
  with_dtype(kOp, weight.scalar_type(), [&]<class T>(T*) {
    const T* from = static_cast<const T*>(weight.const_data_ptr());
    const auto each = [&](auto one, auto* to) {
      torch::stable::parallel_for(0, panels.count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          one(from, channels_last, results, channels, panels, panel, to);
        }
      });
    };
    if (!keeps) {
      each(arrange<T>, data_of<T>(out));
    } else {
      each(upsample ? fill<Form<2, true>, T> : fill<Form<2, false>, T>, data_of<float>(out));
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) { m.def("winograd_weight(Tensor weight, bool upsample, int pixels) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) { m.impl("winograd_weight", TORCH_BOX(&winograd_weight)); }

}  // namespace diffkern

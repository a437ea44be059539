// winograd_weight: the weight of a 3 x 3 convolution as winograd.cpp reads it, see diffkern/winograd.py.
#include "dense.h"
#include "winograd_integers.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::winograd_weight";
constexpr int64_t kChannels = 16;  // that are brought together at once

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

// The numbers of a panel of kernels, [9, width], to the points that are kept of them, computed in float64 and rounded
// once. middle: what the sum of a line is multiplied by.
void to_points(float* kernel, int64_t width, double middle) {
  for (int64_t r = 0; r < width; ++r) {
    double x[9];
    for (int i = 0; i < 9; ++i) {
      x[i] = kernel[i * width + r];
    }
    for (int i = 0; i < 3; ++i) {
      x[3 + i] = (x[i] + x[3 + i] + x[6 + i]) * middle;
    }
    for (int i = 0; i < 9; i += 3) {
      x[i + 1] = (x[i] + x[i + 1] + x[i + 2]) * middle;
    }
    for (int i = 0; i < 9; ++i) {
      kernel[i * width + r] = static_cast<float>(x[i]);
    }
  }
}

// A panel. middle: that of `to_points`, or 0 to keep the numbers as they are. Kept: float for points, else T.
template <class Kept, class T>
void fill(const T* weight, bool channels_last, int64_t results, const Panels& panels, int64_t panel, double middle,
          Kept* out) {
  float kernel[kChannels * 9 * kWidth];
  const int64_t channels = panels.channels, width = panels.width(panel), begin = panel * kWidth;
  for (int64_t c = 0; c < channels; ++c) {
    if (c % kChannels == 0) {
      gather(weight + begin * channels * 9, channels_last, std::min(width, results - begin), channels, c,
             std::min(kChannels, channels - c), width, kernel);
    }
    float* one = kernel + c % kChannels * 9 * width;
    if (middle != 0) {
      to_points(one, width, middle);
    }
    const int64_t first = c / kDepth * kDepth, n = std::min(kDepth, channels - first);
    Kept* to = out + panels.at(panel, first) + (c - first) * width;
    for (int64_t i = 0; i < 9; ++i) {
      narrow(one + i * width, to + i * n * width, width);
    }
  }
}

// weight: [N, C, 3, 3], contiguous or channels_last. Returns a vector in the order of `Panels`: for tiles of 2 x 2
// pixels nine points of each kernel, float32; for larger ones its numbers, in its own dtype. upsample: for doubled
// pictures. pixels: 2, 4 or 6, of a line of a tile.
Tensor winograd_weight(const Tensor& weight, bool upsample, int64_t pixels) {
  check(pixels == 2 || pixels == 4 || pixels == 6, kOp, ": pixels must be 2, 4 or 6, got ", pixels);
  const bool channels_last = weight.dim() == 4 && !weight.is_contiguous() && is_channels_last(weight);
  check(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && (weight.is_contiguous() || channels_last),
        kOp, ": weight must be [N, C, 3, 3], contiguous or channels_last, got ", shape_of(weight));
  const int64_t results = weight.size(0);
  const Panels panels(results, weight.size(1));
  const bool points = keeps_points(pixels);
  Tensor out = empty({panels.size()}, points ? ScalarType::Float : weight.scalar_type());
  with_dtype(kOp, weight.scalar_type(), [&]<class T>(T*) {
    const T* from = static_cast<const T*>(weight.const_data_ptr());
    const auto all = [&](auto* to, double middle) {
      torch::stable::parallel_for(0, panels.count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          fill(from, channels_last, results, panels, panel, middle, to);
        }
      });
    };
    points ? all(data_of<float>(out), upsample ? 1 : 0.5) : all(data_of<T>(out), 0);
  });
  return out;
}

// The inverse units of the points of a panel's weights, [kArea, width], see winograd_integers.h.
template <class F, int V, class T>
void measure(const T* kept, int64_t channels, float* out) {
  constexpr int64_t width = V * kLanes;
  constexpr int kArea = F::kArea;
  constexpr int64_t kChain = chain(F{});
  alignas(64) float points[kArea * width], sum[kArea * width];
  std::fill_n(out, kArea * width, 0.0f);
  for (int64_t first = 0; first < channels; first += kChain) {
    const int64_t block = first / kDepth * kDepth, n = std::min(kDepth, channels - block);
    std::fill_n(sum, kArea * width, 0.0f);
    for (int64_t c = first - block; c < std::min(n, first - block + kChain); ++c) {
      for (int64_t v = 0; v < width; v += kLanes) {
        weigh_all(F{}, kept + 9 * block * width + c * width + v, n * width, points + v, width);
      }
      for (int64_t i = 0; i < kArea * width; ++i) {
        sum[i] += std::abs(points[i]);
        out[i] = std::max(out[i], std::abs(points[i]) * (kMostSum / kMost));
      }
    }
    for (int64_t i = 0; i < kArea * width; ++i) {
      out[i] = sum[i] > out[i] || std::isnan(sum[i]) ? sum[i] : out[i];  // NaN is kept, once there
    }
  }
  for (int64_t i = 0; i < kArea * width; ++i) {
    out[i] = kMostSum / (out[i] < kLeast ? kLeast : out[i]);
  }
}

// kept: of `winograd_weight`, for tiles of 4 x 4 pixels. Returns float32, [points, width] of each panel.
Tensor winograd_units(const Tensor& kept, int64_t results, int64_t channels, bool upsample) {
  constexpr const char* op = "diffkern::winograd_units";
  const Panels panels(results, channels);
  check(kept.numel() == panels.size() && kept.is_contiguous(), op, ": weight was packed for another shape");
  const auto all = [&]<class F>() {
    Tensor out = empty({panels.total * F::kArea}, ScalarType::Float);
    float* to = data_of<float>(out);
    with_dtype(op, kept.scalar_type(), [&]<class T>(T*) {
      torch::stable::parallel_for(0, panels.count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          const T* from = static_cast<const T*>(kept.const_data_ptr()) + panels.at(panel, 0);
          with_vectors(panels.width(panel),
                       [&]<int V>() { measure<F, V>(from, channels, to + panel * kWidth * F::kArea); });
        }
      });
    });
    return out;
  };
  return upsample ? all.template operator()<Integers<true>>() : all.template operator()<Integers<false>>();
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def("winograd_weight(Tensor weight, bool upsample, int pixels) -> Tensor");
  m.def("winograd_units(Tensor kept, SymInt results, SymInt channels, bool upsample) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) {
  m.impl("winograd_weight", TORCH_BOX(&winograd_weight));
  m.impl("winograd_units", TORCH_BOX(&winograd_units));
}

}  // namespace diffkern

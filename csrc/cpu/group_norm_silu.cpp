// group_norm_silu, see diffkern/ops/group_norm_silu.py. Two passes over memory: moments, then normalise and SiLU.
#include "group_norm_moments.h"
#include "silu.h"

#include <torch/csrc/stable/library.h>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::group_norm_silu";

// The mean is in the shift: what that loses in float32 is far below the last place of bfloat16.
template <class T>
inline constexpr bool kFolded = std::is_same_v<T, BFloat16>;

template <bool kSilu, class T>
void contiguous(const GroupNorm& p, const Source<T>& source, T* y) {
  const int64_t size = p.group_size() * p.pixels;
  for_each_slab(p.batch * p.groups, size, [&](int64_t slab) {
    const auto [mean, scale] = group_moments(p, source, slab);
    T* out = y + slab * size;
    const int64_t sample = slab / p.groups, first = slab % p.groups * p.group_size();
    in_parallel(chunks_of(size, kChunk), kChunk, [&, mean = mean, scale = scale](int64_t begin, int64_t end) {
      float room[kRun];
      for (int64_t at = begin * kChunk; at < std::min(size, end * kChunk);) {
        const int64_t channel = at / p.pixels;
        const int64_t n = std::min({kRun, (channel + 1) * p.pixels - at, end * kChunk - at});
        const float* x = source.planes(p, slab, at, n, room);
        const float a = scale * p.gamma(sample)[first + channel], b = p.beta(sample)[first + channel];
        emit(out + at, n, [=, mean = mean](int64_t i) {
          const float normal = (x[i] - mean) * a + b;
          return kSilu ? fast_silu(normal) : normal;
        });
        at += n;
      }
    });
  });
}

// What every column of a sample becomes, in the order of its block: (x - mean) * factor + shift, or x * factor + shift
// of bfloat16; in the unit of rough_silu if that follows.
template <bool kSilu, class T>
class Affine {
 public:
  Affine(const GroupNorm& p, const Layout<T>& layout, int64_t sample, const float* add)
      : width_(layout.width()), values_(3 * width_) {
    constexpr float kUnit = kSilu && kRoughSilu<T> ? kSiluUnit : 1;
    const std::vector<Normaliser> groups = SampleMoments<T>(p, layout, add).groups;
    const float *gamma = p.gamma(sample), *beta = p.beta(sample);
    for (const Part<T>& part : layout.parts) {
      for_each_group(p, part, [&](int64_t g, int64_t c, int64_t n, int64_t column) {
        for (int64_t i = 0; i < n; ++i) {
          const int64_t at = place<T>(column + i);
          const float mean = groups[g].mean - (add == nullptr ? 0 : add[c + i]), a = groups[g].scale * gamma[c + i];
          values_[at] = mean;
          values_[width_ + at] = kUnit * a;
          values_[2 * width_ + at] = kUnit * (kFolded<T> ? beta[c + i] - mean * a : beta[c + i]);
        }
      });
    }
  }

  // Rows of a part. From one to the next are `step` numbers of the result, from its chunk to the next `ahead`.
  void emit(const Part<T>& part, const T* in, int64_t rows, int64_t columns, T* out, int64_t step,
            int64_t ahead) const {
    for_each_panel(columns, [=, this, &part]<int kBlocks>(std::integral_constant<int, kBlocks>, int64_t at, int64_t n) {
      Block mean[kBlocks], a[kBlocks], b[kBlocks];
      for (int j = 0; j < kBlocks; ++j) {
        const float* values = &values_[part.at + at + j * kBlock];
        mean[j] = read(values), a[j] = read(values + width_), b[j] = read(values + 2 * width_);
      }
      const auto value = [&](Block x, int j) {
        if constexpr (!kFolded<T>) {
          x = x - mean[j];
        }
        x = x * a[j] + b[j];
        return kSilu ? silu<T>(x) : x;
      };
      const T* from = in + at;
      T* to = out + at;
      for (int64_t row = 0; row < rows; ++row, from += part.columns(), to += step) {
        for (int j = 0; j < kBlocks; ++j) {
          fetch<0>(from + j * kBlock, part.ahead);
          fetch<1>(to + j * kBlock, ahead);
          if (n == kBlock) {
            write(value(read(from + j * kBlock), j), to + j * kBlock);
          } else {
            write(value(read(from, n), j), to, n);
          }
        }
      }
    });
  }

 private:
  int64_t width_;
  std::vector<float> values_;  // mean, factor and shift
};

template <bool kSilu, class T>
void channels_last(const GroupNorm& p, const Source<T>& source, T* y) {
  for_each_slab(p.batch, p.sample_size(), [&](int64_t sample) {
    const Layout<T> layout(p, source, sample);
    const Affine<kSilu, T> affine(p, layout, sample, source.add_of(p, sample));
    in_parallel(layout.chunks, layout.chunk * p.channels, [&](int64_t begin, int64_t end) {
      for (int64_t pixel = begin * layout.chunk; pixel < std::min(p.pixels, end * layout.chunk);
           pixel += layout.chunk) {
        const int64_t pixels = std::min(layout.chunk, p.pixels - pixel);
        for (const Part<T>& part : layout.parts) {
          const int64_t rows = pixels / part.together, rest = pixels % part.together;
          const T* in = part.in + pixel * part.channels;
          T* out = y + (sample * p.pixels + pixel) * p.channels + part.first;
          const int64_t step = part.together * p.channels, ahead = layout.chunk * p.channels;
          affine.emit(part, in, rows, part.columns(), out, step, ahead);
          affine.emit(part, in + rows * part.columns(), 1, rest * part.channels, out + rows * step, step, ahead);
        }
      }
    });
  });
}

Tensor group_norm_silu(const Tensor& x, int64_t num_groups, const MaybeTensor& weight, const MaybeTensor& bias,
                       double eps, bool silu, const MaybeTensor& add, const MaybeTensor& scale,
                       const MaybeTensor& shift, const MaybeTensor& skip) {
  const GroupNorm p = group_norm(kOp, x, num_groups, weight, bias, eps, scale, shift, skip);
  Tensor y = empty_result(x, p);
  with_dtype(kOp, x.scalar_type(), [&]<class T>(T*) {
    const Source<T> source = source_of<T>(kOp, p, x, add, skip);
    if (y.numel() == 0) {
      return;
    }
    const auto run = p.channels_last ? (silu ? channels_last<true, T> : channels_last<false, T>)
                                     : (silu ? contiguous<true, T> : contiguous<false, T>);
    run(p, source, data_of<T>(y));
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def(
      "group_norm_silu(Tensor x, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, bool silu, Tensor? add, "
      "Tensor? scale, Tensor? shift, Tensor? skip) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) { m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu)); }

}  // namespace diffkern

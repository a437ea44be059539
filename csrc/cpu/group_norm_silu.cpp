// group_norm_silu, see diffkern/ops/group_norm_silu.py. Two passes over memory: moments, then normalise and SiLU.
#include "group_norm_moments.h"

#include <torch/csrc/stable/library.h>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::group_norm_silu";

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

template <bool kSilu, class T>
void channels_last(const GroupNorm& p, const Source<T>& source, T* y) {
  const Rows rows(p);
  const int64_t size = p.sample_size();
  for_each_slab(p.batch, size, [&](int64_t sample) {
    const std::vector<Normaliser> groups = sample_moments(p, source, sample);
    std::vector<float> mean(rows.width), a(rows.width), b(rows.width);  // of every column
    for_each_column(p, rows.width, [&](int64_t j, int64_t c, int64_t g) {
      mean[j] = groups[g].mean;
      a[j] = groups[g].scale * p.gamma(sample)[c];
      b[j] = p.beta(sample)[c];
    });
    T* out = y + sample * size;
    in_parallel(rows.chunks, rows.chunk, [&](int64_t begin, int64_t end) {
      float room[kRun];
      for (int64_t at = begin * rows.chunk; at < std::min(size, end * rows.chunk);) {
        const int64_t column = at % rows.width, n = std::min({kRun, rows.width - column, size - at});
        const float* x = source.rows(p, sample, at, n, room);
        const float *mean_at = &mean[column], *a_at = &a[column], *b_at = &b[column];
        emit(out + at, n, [=](int64_t i) {
          const float normal = (x[i] - mean_at[i]) * a_at[i] + b_at[i];
          return kSilu ? fast_silu(normal) : normal;
        });
        at += n;
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

// group_norm_silu_backward, see diffkern/ops/group_norm_silu_backward.py. Three passes over memory: the moments again,
// the sums over pixels that all gradients are made of, then the gradient of the input.
#include "group_norm_moments.h"

#include <torch/csrc/stable/library.h>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::group_norm_silu_backward";
// Sums of few terms, then sums of those: rounding grows with the length of a chain, and sums over dx nearly cancel.
constexpr int64_t kTerms = 512;     // of a contiguous chain, in the lanes of a vector
constexpr int64_t kRows = 16;       // of a channels_last chain
constexpr int64_t kMinWidth = 256;  // channels_last rows shorter than this are taken several at a time

// A value's part in the sums: the normalised value, and the gradient with respect to what the SiLU takes.
struct Term {
  float normal, slope;
};

// Always inline: a call that is left in a loop keeps it from being vectorised.
template <bool kSilu>
[[gnu::always_inline]] inline Term term(float x, float grad, float mean, float scale, float gamma, float beta) {
  const float normal = (x - mean) * scale;
  if (!kSilu) {
    return {normal, grad};
  }
  const float z = normal * gamma + beta, e = fast_exp(-z), sigmoid = 1.0f / (1.0f + e);
  const float rest = z > 0.0f ? e * sigmoid : 1.0f - sigmoid;  // 1 - sigmoid, without cancelling
  return {normal, grad * sigmoid * (1.0f + z * rest)};
}

// Over the pixels of one channel of one sample.
struct Sums {
  double dx = 0, slope = 0, product = 0;
};

// What all channels of a group have in common in the gradient of the input: scale * (slope * gamma - a - normal * b).
struct Common {
  float a, b;

  Common(const GroupNorm& p, const float* gamma, const Sums* channel) {
    double slope = 0, product = 0;
    for (int64_t c = 0; c < p.group_size(); ++c) {
      slope += gamma[c] * channel[c].slope;
      product += gamma[c] * channel[c].product;
    }
    const double count = static_cast<double>(p.group_size()) * p.pixels;
    a = static_cast<float>(slope / count);
    b = static_cast<float>(product / count);
  }
};

// The sums of one sample as the op returns them.
void store(const std::vector<Sums>& channels, int64_t first, int64_t count, float* out) {
  for (size_t c = 0; c < channels.size(); ++c) {
    out[first + c] = static_cast<float>(channels[c].dx);
    out[count + first + c] = static_cast<float>(channels[c].slope);
    out[2 * count + first + c] = static_cast<float>(channels[c].product);
  }
}

template <bool kSilu, class T>
void contiguous(const GroupNorm& p, const Source<T>& source, const T* grad, T* dx, float* all_sums) {
  const int64_t size = p.group_size() * p.pixels;
  in_parallel(p.batch * p.groups, size, [&](int64_t begin_slab, int64_t end_slab) {
    float x_room[kTerms], grad_room[kTerms], out_room[kTerms];
    std::vector<Sums> sums(p.group_size());
    for (int64_t slab = begin_slab; slab < end_slab; ++slab) {
      const auto [mean, scale] = group_moments(p, source, slab);
      const int64_t sample = slab / p.groups, first = slab % p.groups * p.group_size();
      const float *gamma = p.gamma(sample) + first, *beta = p.beta(sample) + first;
      const auto for_each_chain = [&](auto body) {
        for (int64_t c = 0; c < p.group_size(); ++c) {
          for (int64_t at = c * p.pixels; at < (c + 1) * p.pixels; at += kTerms) {
            const int64_t n = std::min(kTerms, (c + 1) * p.pixels - at);
            body(c, at, n, source.planes(p, slab, at, n, x_room), as_float(grad + slab * size + at, grad_room, n));
          }
        }
      };
      std::fill(sums.begin(), sums.end(), Sums{});
      const auto add = [&, mean = mean, scale = scale](int64_t c, int64_t, int64_t n, const float* x, const float* g) {
        const float gamma_c = gamma[c], beta_c = beta[c];
        float slope = 0, product = 0;
#pragma omp simd reduction(+ : slope, product)
        for (int64_t i = 0; i < n; ++i) {
          const Term t = term<kSilu>(x[i], g[i], mean, scale, gamma_c, beta_c);
          slope += t.slope;
          product += t.slope * t.normal;
        }
        sums[c].slope += slope;
        sums[c].product += product;
      };
      for_each_chain(add);
      const Common common(p, gamma, sums.data());
      const auto apply = [&, mean = mean, scale = scale](int64_t c, int64_t at, int64_t n, const float* x,
                                                         const float* g) {
        const float gamma_c = gamma[c], beta_c = beta[c];
        float* to = place(dx + slab * size + at, out_room);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; ++i) {
          const Term t = term<kSilu>(x[i], g[i], mean, scale, gamma_c, beta_c);
          to[i] = scale * (t.slope * gamma_c - common.a - t.normal * common.b);
          sum += to[i];
        }
        sums[c].dx += sum;
        put(to, dx + slab * size + at, n);
      };
      for_each_chain(apply);
      store(sums, first, p.channels, all_sums + sample * 3 * p.channels);
    }
  });
}

// A channels_last sample as rows of `width` columns, one or several pixels a row, so that loops over columns are long.
struct Rows {
  int64_t width, chunk, chunks;  // a chunk is whole rows but for the sample's last

  explicit Rows(const GroupNorm& p)
      : width(p.channels * std::max<int64_t>(1, kMinWidth / p.channels)),
        chunk(width * std::max<int64_t>(1, kPixelChunk / width)),
        chunks(chunks_of(p.sample_size(), chunk)) {}
};

// f(column, channel, group) for every column; an integer division a column would take longer than all the rest.
template <class F>
void for_each_column(const GroupNorm& p, int64_t width, F f) {
  for (int64_t first = 0; first < width; first += p.channels) {
    for (int64_t g = 0, c = 0; g < p.groups; ++g) {
      for (const int64_t end = c + p.group_size(); c < end; ++c) {
        f(first + c, c, g);
      }
    }
  }
}

// Every column's share of a channels_last sample: what the norm knows of it, and what is summed over its rows.
struct Columns {
  std::vector<float> mean, scale, gamma, beta, a, b;

  Columns(const GroupNorm& p, int64_t width, int64_t sample, const std::vector<Normaliser>& groups)
      : mean(width), scale(width), gamma(width), beta(width), a(width), b(width) {
    for_each_column(p, width, [&](int64_t j, int64_t c, int64_t g) {
      mean[j] = groups[g].mean;
      scale[j] = groups[g].scale;
      gamma[j] = p.gamma(sample)[c];
      beta[j] = p.beta(sample)[c];
    });
  }
};

template <bool kSilu, class T>
void channels_last(const GroupNorm& p, const Source<T>& source, const T* grad, T* dx, float* all_sums) {
  const Rows rows(p);
  const int64_t size = p.sample_size(), width = rows.width;
  for_each_slab(p.batch, size, [&](int64_t sample) {
    const Layout<T> layout(p, source, sample);
    const std::vector<Normaliser> groups = SampleMoments<T>(p, layout, source.add_of(p, sample)).groups;
    Columns columns(p, width, sample, groups);
    // body(column, at, n, x, grad) for runs inside one row of the chunks [begin, end).
    const auto for_each_run = [&](int64_t begin, int64_t end, auto body) {
      float x_room[kRun], grad_room[kRun];
      for (int64_t at = begin * rows.chunk; at < std::min(size, end * rows.chunk);) {
        const int64_t column = at % width, n = std::min({kRun, width - column, size - at});
        body(column, at, n, source.rows(p, sample, at, n, x_room), as_float(grad + sample * size + at, grad_room, n));
        at += n;
      }
    };
    // Sums over the rows of all chunks: body(column, at, n, x, grad, sums) adds to kSums rows of columns; `member` says
    // what they are.
    const auto sum_rows = [&]<size_t kSums>(double Sums::*const (&member)[kSums], std::vector<Sums>& sums, auto body) {
      std::vector<float> parts(rows.chunks * kSums * width);
      in_parallel(rows.chunks, rows.chunk, [&](int64_t begin, int64_t end) {
        std::vector<float> chains(kSums * width);
        for (int64_t k = begin; k < end; ++k) {
          const auto fold = [&] {
            for (size_t j = 0; j < kSums * width; ++j) {
              parts[k * kSums * width + j] += chains[j];
              chains[j] = 0;
            }
          };
          for_each_run(k, k + 1, [&](int64_t column, int64_t at, int64_t n, const float* x, const float* g) {
            if (column == 0 && (at - k * rows.chunk) % (kRows * width) == 0) {
              fold();
            }
            body(column, at, n, x, g, &chains[column]);
          });
          fold();
        }
      });
      for (size_t s = 0; s < rows.chunks * kSums; ++s) {
        for_each_column(p, width, [&](int64_t j, int64_t c, int64_t) {
          sums[c].*member[s % kSums] += parts[s * width + j];
        });
      }
    };
    std::vector<Sums> sums(p.channels);
    sum_rows({&Sums::slope, &Sums::product}, sums,
             [&](int64_t column, int64_t, int64_t n, const float* x, const float* g, float* slope) {
      const float *mean = &columns.mean[column], *scale = &columns.scale[column];
      const float *gamma = &columns.gamma[column], *beta = &columns.beta[column];
      float* product = slope + width;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const Term t = term<kSilu>(x[i], g[i], mean[i], scale[i], gamma[i], beta[i]);
        slope[i] += t.slope;
        product[i] += t.slope * t.normal;
      }
    });
    std::vector<Common> common;
    for (int64_t first = 0; first < p.channels; first += p.group_size()) {
      common.emplace_back(p, p.gamma(sample) + first, &sums[first]);
    }
    for_each_column(p, width, [&](int64_t j, int64_t, int64_t g) {
      columns.a[j] = common[g].a;
      columns.b[j] = common[g].b;
    });
    sum_rows({&Sums::dx}, sums, [&](int64_t column, int64_t at, int64_t n, const float* x, const float* g, float* sum) {
      float out_room[kRun];
      const float *mean = &columns.mean[column], *scale = &columns.scale[column];
      const float *gamma = &columns.gamma[column], *beta = &columns.beta[column];
      const float *a = &columns.a[column], *b = &columns.b[column];
      float* to = place(dx + sample * size + at, out_room);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const Term t = term<kSilu>(x[i], g[i], mean[i], scale[i], gamma[i], beta[i]);
        to[i] = scale[i] * (t.slope * gamma[i] - a[i] - t.normal * b[i]);
        sum[i] += to[i];
      }
      put(to, dx + sample * size + at, n);
    });
    store(sums, 0, p.channels, all_sums + sample * 3 * p.channels);
  });
}

std::tuple<Tensor, Tensor> group_norm_silu_backward(const Tensor& x, const Tensor& grad, int64_t num_groups,
                                                    const MaybeTensor& weight, const MaybeTensor& bias, double eps,
                                                    bool silu, const MaybeTensor& add, const MaybeTensor& scale,
                                                    const MaybeTensor& shift, const MaybeTensor& skip) {
  const GroupNorm p = group_norm(kOp, x, num_groups, weight, bias, eps, scale, shift, skip);
  Tensor dx = empty_result(x, p), sums = empty({p.batch, 3, p.channels}, ScalarType::Float);
  with_dtype(kOp, x.scalar_type(), [&]<class T>(T*) {
    const Source<T> source = source_of<T>(kOp, p, x, add, skip);
    const T* grad_data = data_like<T>(kOp, "grad", grad, x.scalar_type(), dx, p.batch);
    if (dx.numel() == 0) {
      std::fill_n(data_of<float>(sums), sums.numel(), 0.0f);
      return;
    }
    const auto run = p.channels_last ? (silu ? channels_last<true, T> : channels_last<false, T>)
                                     : (silu ? contiguous<true, T> : contiguous<false, T>);
    run(p, source, grad_data, data_of<T>(dx), data_of<float>(sums));
  });
  return {dx, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def(
      "group_norm_silu_backward(Tensor x, Tensor grad, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, "
      "bool silu, Tensor? add, Tensor? scale, Tensor? shift, Tensor? skip) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) {
  m.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward));
}

}  // namespace diffkern

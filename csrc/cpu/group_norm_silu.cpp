// group_norm_silu, see diffkern/ops/group_norm_silu.py. Two passes over memory: moments, then normalise and SiLU.
//
// Moments are taken a chunk at a time, twice over a chunk that is in the cache: its mean, then the squares about that
// mean; never E[x^2] - E[x]^2. Chunks are merged in order (Chan et al. 1979). What a chunk is depends on the sample's
// shape alone, so that neither threads nor the batch change a bit of the result.
#include "rows.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::group_norm_silu";
constexpr int64_t kChunk = 4096;       // elements of a contiguous chunk: 16 KB of float32
constexpr int64_t kPixelChunk = 16384;  // of a channels_last chunk: long enough to spread the folding of its columns
constexpr int64_t kMinWidth = 64;      // channels_last rows shorter than this are taken several at a time

struct Problem {
  int64_t batch, channels, pixels, groups;
  std::vector<float> weight, bias;
  double eps;

  int64_t group_size() const { return channels / groups; }
};

// The moments of all chunks so far.
struct Total {
  double n = 0, mean = 0, squares = 0;

  void add(const Moments& chunk, int64_t size) {
    const double count = n + size, delta = chunk.mean - mean;
    mean += delta * size / count;
    squares += chunk.squares + delta * delta * n * size / count;
    n = count;
  }

  float scale(double eps) const { return static_cast<float>(1 / std::sqrt(squares / n + eps)); }
};

// f(slab) for every slab: one a thread if there are enough of them, which keeps a slab in its core's cache between the
// two passes; else one after the other, each by all threads.
template <class F>
void for_each_slab(int64_t slabs, int64_t elements_each, F f) {
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      f(i);
    }
  };
  if (slabs >= torch::stable::get_num_threads()) {
    in_parallel(slabs, elements_each, some);
  } else {
    some(0, slabs);
  }
}

template <bool kSilu, class T>
void contiguous(const Problem& p, const T* x, T* y) {
  const int64_t size = p.group_size() * p.pixels, chunks = (size + kChunk - 1) / kChunk;
  for_each_slab(p.batch * p.groups, size, [&](int64_t slab) {
    const T* in = x + slab * size;
    T* out = y + slab * size;
    std::vector<Moments> parts(chunks);
    in_parallel(chunks, kChunk, [&](int64_t begin, int64_t end) {
      float room[kChunk];
      for (int64_t k = begin; k < end; ++k) {
        const int64_t n = std::min(kChunk, size - k * kChunk);
        parts[k] = moments(as_float(in + k * kChunk, room, n), n);
      }
    });
    Total total;
    for (int64_t k = 0; k < chunks; ++k) {
      total.add(parts[k], std::min(kChunk, size - k * kChunk));
    }
    const float mean = static_cast<float>(total.mean), scale = total.scale(p.eps);
    in_parallel(chunks, kChunk, [&](int64_t begin, int64_t end) {
      float in_room[kChunk], out_room[kChunk];
      for (int64_t at = begin * kChunk; at < std::min(size, end * kChunk);) {
        const int64_t channel = at / p.pixels, c = slab % p.groups * p.group_size() + channel;
        const int64_t n = std::min({kChunk, (channel + 1) * p.pixels - at, end * kChunk - at});
        const float* v = as_float(in + at, in_room, n);
        float* to = place(out + at, out_room);
        const float a = scale * p.weight[c], b = p.bias[c];
        for (int64_t i = 0; i < n; ++i) {
          const float normal = (v[i] - mean) * a + b;
          to[i] = kSilu ? fast_silu(normal) : normal;
        }
        put(to, out + at, n);
        at += n;
      }
    });
  });
}

// A channels_last sample as rows of `width` columns, one or several pixels a row, so that loops over columns are long.
struct Rows {
  int64_t width, height;  // of a chunk

  explicit Rows(const Problem& p)
      : width(p.channels * std::max<int64_t>(1, kMinWidth / p.channels)),
        height(std::max<int64_t>(1, kPixelChunk / width)) {}
};

// sum[j] += f(value, j) for every value of column j; the last row may be short. Four rows at a time save traffic.
template <class F>
void sum_columns(const float* x, int64_t size, int64_t width, float* sum, F f) {
  std::fill_n(sum, width, 0.0f);
  int64_t at = 0;
  for (; at + 4 * width <= size; at += 4 * width) {
    const float *r0 = x + at, *r1 = r0 + width, *r2 = r1 + width, *r3 = r2 + width;
    for (int64_t j = 0; j < width; ++j) {
      sum[j] += (f(r0[j], j) + f(r1[j], j)) + (f(r2[j], j) + f(r3[j], j));
    }
  }
  for (; at < size; at += width) {
    for (int64_t j = 0; j < std::min(width, size - at); ++j) {
      sum[j] += f(x[at + j], j);
    }
  }
}

// The moments of every group over one chunk of `size` elements. `columns` has room for two rows.
void chunk_moments(const Problem& p, const float* x, int64_t size, int64_t width, float* columns, Moments* out) {
  float *sum = columns, *center = columns + width;
  const float count = static_cast<float>(size / p.channels * p.group_size());
  const auto fold = [&](auto store) {
    for (int64_t g = 0; g < p.groups; ++g) {
      float total = 0;
      for (int64_t first = g * p.group_size(); first < width; first += p.channels) {
        for (int64_t c = 0; c < p.group_size(); ++c) {
          total += sum[first + c];
        }
      }
      store(g, total);
    }
  };
  sum_columns(x, size, width, sum, [](float v, int64_t) { return v; });
  fold([&](int64_t g, float total) { out[g].mean = total / count; });
  for (int64_t j = 0; j < width; ++j) {
    center[j] = out[j % p.channels / p.group_size()].mean;
  }
  sum_columns(x, size, width, sum, [=](float v, int64_t j) { return (v - center[j]) * (v - center[j]); });
  fold([&](int64_t g, float total) { out[g].squares = total; });
}

template <bool kSilu, class T>
void channels_last(const Problem& p, const T* x, T* y) {
  const auto [width, height] = Rows(p);
  const int64_t size = p.channels * p.pixels, chunk = width * height, chunks = (size + chunk - 1) / chunk;
  for_each_slab(p.batch, size, [&, width = width](int64_t sample) {
    const T* in = x + sample * size;
    T* out = y + sample * size;
    std::vector<Moments> parts(chunks * p.groups);
    in_parallel(chunks, chunk, [&](int64_t begin, int64_t end) {
      std::vector<float> room(std::is_same_v<T, float> ? 0 : chunk), columns(2 * width);
      for (int64_t k = begin; k < end; ++k) {
        const int64_t n = std::min(chunk, size - k * chunk);
        const float* v = as_float(in + k * chunk, room.data(), n);
        chunk_moments(p, v, n, width, columns.data(), &parts[k * p.groups]);
      }
    });
    std::vector<float> mean(width), a(width), b(width);  // of every column
    for (int64_t g = 0; g < p.groups; ++g) {
      Total total;
      for (int64_t k = 0; k < chunks; ++k) {
        total.add(parts[k * p.groups + g], std::min(chunk, size - k * chunk) / p.groups);
      }
      for (int64_t c = g * p.group_size(); c < (g + 1) * p.group_size(); ++c) {
        for (int64_t j = c; j < width; j += p.channels) {
          mean[j] = static_cast<float>(total.mean);
          a[j] = total.scale(p.eps) * p.weight[c];
          b[j] = p.bias[c];
        }
      }
    }
    in_parallel(chunks, chunk, [&](int64_t begin, int64_t end) {
      float in_room[kRun], out_room[kRun];
      for (int64_t at = begin * chunk; at < std::min(size, end * chunk);) {
        const int64_t column = at % width, n = std::min({kRun, width - column, size - at});
        const float* v = as_float(in + at, in_room, n);
        float* to = place(out + at, out_room);
        const float *mean_at = &mean[column], *a_at = &a[column], *b_at = &b[column];
        for (int64_t i = 0; i < n; ++i) {
          const float normal = (v[i] - mean_at[i]) * a_at[i] + b_at[i];
          to[i] = kSilu ? fast_silu(normal) : normal;
        }
        put(to, out + at, n);
        at += n;
      }
    });
  });
}

Tensor group_norm_silu(const Tensor& x, int64_t num_groups, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& bias, double eps, bool silu) {
  check(x.dim() >= 2, kOp, ": x must be [B, C, ...], got ", shape_of(x));
  const int64_t channels = x.size(1);
  check(num_groups >= 1 && channels % num_groups == 0, kOp, ": num_groups is ", num_groups,
        ", allowed are the divisors of the ", channels, " channels");
  Problem p{x.size(0), channels, 0, num_groups, {}, {}, eps};
  p.weight = parameter(kOp, "weight", weight, channels, 1.0f);
  p.bias = parameter(kOp, "bias", bias, channels, 0.0f);
  Tensor y = empty_as(x, x.scalar_type(), p.batch);
  if (x.numel() == 0) {
    return y;
  }
  p.pixels = x.numel() / (p.batch * channels);
  const bool last = dense(kOp, "x", x).channels_last || p.pixels == 1;
  with_dtype(kOp, x.scalar_type(), [&]<class T>(T*) {
    const auto run = last ? (silu ? channels_last<true, T> : channels_last<false, T>)
                          : (silu ? contiguous<true, T> : contiguous<false, T>);
    run(p, static_cast<const T*>(x.const_data_ptr()), data_of<T>(y));
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def(
      "group_norm_silu(Tensor x, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, bool silu) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) { m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu)); }

}  // namespace diffkern

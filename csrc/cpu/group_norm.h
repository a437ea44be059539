// What group_norm_silu and its gradient share: the input as the norm sees it, its moments, and the loops over it.
//
// Moments are taken a chunk at a time, twice over a chunk that is in the cache: its mean, then the squares about that
// mean; never E[x^2] - E[x]^2. Chunks are merged in order (Chan et al. 1979). What a chunk is depends on the sample's
// shape alone, so that neither threads nor the batch change a bit of the result.
#pragma once

#include "rows.h"

namespace diffkern {

constexpr int64_t kChunk = 4096;        // elements of a contiguous chunk: 16 KB of float32
constexpr int64_t kPixelChunk = 16384;  // of a channels_last chunk: long enough to spread the folding of its columns
constexpr int64_t kMinWidth = 256;      // channels_last rows shorter than this are taken several at a time

using MaybeTensor = std::optional<Tensor>;

// f(slab) for every slab: one a thread if there are enough of them, which keeps a slab in its core's cache between the
// passes; else one after the other, each by all threads.
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

// Sizes and parameters. `gamma` and `beta` scale and shift the normalised values of a sample: the norm's own affine
// parameters and, if given, the modulation of that sample, in one. A stride of 0 means that all samples share them.
struct GroupNorm {
  int64_t batch = 0, channels = 0, pixels = 0, groups = 0;
  double eps = 0;
  bool channels_last = false;
  int64_t parameter_stride = 0;
  std::vector<float> gammas, betas;

  int64_t group_size() const { return channels / groups; }
  int64_t sample_size() const { return channels * pixels; }
  const float* gamma(int64_t sample) const { return gammas.data() + sample * parameter_stride; }
  const float* beta(int64_t sample) const { return betas.data() + sample * parameter_stride; }
};

// What is normalised: x, after its channels those of `skip` if there is one, plus `add` if given: [B, C] a pixel.
template <class T>
struct Source {
  const T* x;
  const T* skip;
  int64_t own;  // channels of x
  std::vector<float> add;

  // n elements of a channels_last sample from `at` on; in `room` unless they are there as they are needed.
  const float* rows(const GroupNorm& p, int64_t sample, int64_t at, int64_t n, float* room) const {
    if (!skip && add.empty()) {
      return as_float(x + sample * p.sample_size() + at, room, n);
    }
    int64_t pixel = sample * p.pixels + at / p.channels, c = at % p.channels;
    for (int64_t i = 0, run; i < n; i += run) {
      const int64_t end = c < own ? own : p.channels;
      run = std::min(end - c, n - i);
      const T* from = c < own ? x + pixel * own + c : skip + pixel * (p.channels - own) + c - own;
      widen(from, room + i, run);
      if (!add.empty()) {
        const float* add_at = &add[sample * p.channels + c];
        for (int64_t j = 0; j < run; ++j) {
          room[i + j] += add_at[j];
        }
      }
      c += run;
      if (c == p.channels) {
        c = 0;
        ++pixel;
      }
    }
    return room;
  }

  // n elements of a contiguous group from `at` on.
  const float* planes(const GroupNorm& p, int64_t slab, int64_t at, int64_t n, float* room) const {
    if (!skip && add.empty()) {
      return as_float(x + slab * p.group_size() * p.pixels + at, room, n);
    }
    const int64_t sample = slab / p.groups, first = slab % p.groups * p.group_size();
    for (int64_t i = 0, run; i < n; i += run) {
      const int64_t c = first + (at + i) / p.pixels, pixel = (at + i) % p.pixels;
      run = std::min(p.pixels - pixel, n - i);
      const T* plane = c < own ? x + (sample * own + c) * p.pixels
                               : skip + (sample * (p.channels - own) + c - own) * p.pixels;
      widen(plane + pixel, room + i, run);
      if (!add.empty()) {
        for (int64_t j = 0; j < run; ++j) {
          room[i + j] += add[sample * p.channels + c];
        }
      }
    }
    return room;
  }
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

struct Normaliser {
  float mean, scale;
};

inline int64_t chunks_of(int64_t size, int64_t chunk) { return (size + chunk - 1) / chunk; }

// The moments of a contiguous group.
template <class T>
Normaliser group_moments(const GroupNorm& p, const Source<T>& source, int64_t slab) {
  const int64_t size = p.group_size() * p.pixels, chunks = chunks_of(size, kChunk);
  std::vector<Moments> parts(chunks);
  in_parallel(chunks, kChunk, [&](int64_t begin, int64_t end) {
    float room[kChunk];
    for (int64_t k = begin; k < end; ++k) {
      const int64_t n = std::min(kChunk, size - k * kChunk);
      parts[k] = moments(source.planes(p, slab, k * kChunk, n, room), n);
    }
  });
  Total total;
  for (int64_t k = 0; k < chunks; ++k) {
    total.add(parts[k], std::min(kChunk, size - k * kChunk));
  }
  return {static_cast<float>(total.mean), total.scale(p.eps)};
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
inline void chunk_moments(const GroupNorm& p, const float* x, int64_t size, int64_t width, float* columns,
                          Moments* out) {
  float *sum = columns, *center = columns + width;
  const float count = static_cast<float>(size / p.channels * p.group_size());
  const auto fold = [&](float Moments::*member, float factor) {
    for (int64_t g = 0; g < p.groups; ++g) {
      out[g].*member = 0;
    }
    for (int64_t first = 0; first < width; first += p.channels) {
      for (int64_t g = 0; g < p.groups; ++g) {
        const float* of_group = sum + first + g * p.group_size();
        float total = 0;  // in a register, where out[g] would go by way of memory at every column
        for (int64_t c = 0; c < p.group_size(); ++c) {
          total += of_group[c];
        }
        out[g].*member += total * factor;
      }
    }
  };
  sum_columns(x, size, width, sum, [](float v, int64_t) { return v; });
  fold(&Moments::mean, 1.0f / count);
  for_each_column(p, width, [&](int64_t j, int64_t, int64_t g) { center[j] = out[g].mean; });
  sum_columns(x, size, width, sum, [=](float v, int64_t j) { return (v - center[j]) * (v - center[j]); });
  fold(&Moments::squares, 1.0f);
}

// The moments of all groups of a channels_last sample.
template <class T>
std::vector<Normaliser> sample_moments(const GroupNorm& p, const Source<T>& source, int64_t sample) {
  const Rows rows(p);
  const int64_t size = p.sample_size();
  std::vector<Moments> parts(rows.chunks * p.groups);
  in_parallel(rows.chunks, rows.chunk, [&](int64_t begin, int64_t end) {
    std::vector<float> room(rows.chunk), columns(2 * rows.width);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t n = std::min(rows.chunk, size - k * rows.chunk);
      const float* x = source.rows(p, sample, k * rows.chunk, n, room.data());
      chunk_moments(p, x, n, rows.width, columns.data(), &parts[k * p.groups]);
    }
  });
  std::vector<Normaliser> out(p.groups);
  for (int64_t g = 0; g < p.groups; ++g) {
    Total total;
    for (int64_t k = 0; k < rows.chunks; ++k) {
      total.add(parts[k * p.groups + g], std::min(rows.chunk, size - k * rows.chunk) / p.groups);
    }
    out[g] = {static_cast<float>(total.mean), total.scale(p.eps)};
  }
  return out;
}

// A parameter of a shape in float32; empty if there is none.
inline std::vector<float> parameter(const char* op, const char* name, const MaybeTensor& t,
                                    const std::vector<int64_t>& shape) {
  if (!t) {
    return {};
  }
  check(t->is_contiguous() && has_shape(*t, shape), op, ": ", name, " must be ", shape_of(shape), ", got ",
        shape_of(*t));
  return widened(op, *t);
}

// Reads and checks the arguments that the norm and its gradient share.
inline GroupNorm group_norm(const char* op, const Tensor& x, int64_t groups, const MaybeTensor& weight,
                            const MaybeTensor& bias, double eps, const MaybeTensor& scale, const MaybeTensor& shift,
                            const MaybeTensor& skip) {
  check(x.dim() >= 2, op, ": x must be [B, C, ...], got ", shape_of(x));
  if (skip) {
    bool same = skip->dim() == x.dim() && skip->scalar_type() == x.scalar_type();
    for (int64_t i = 0; same && i < x.dim(); ++i) {
      same = i == 1 || skip->size(i) == x.size(i);
    }
    check(same, op, ": skip must have the dtype and, but for the channels, the shape of x, ", shape_of(x), ", got ",
          shape_of(*skip));
  }
  GroupNorm p{x.size(0), x.size(1) + (skip ? skip->size(1) : 0), 1, groups, eps};
  for (int64_t i = 2; i < x.dim(); ++i) {
    p.pixels *= x.size(i);
  }
  check(groups >= 1 && p.channels % groups == 0, op, ": num_groups is ", groups, ", allowed are the divisors of the ",
        p.channels, " channels");
  p.channels_last = dense(op, "x", x).channels_last || p.pixels == 1;
  if (skip) {
    check(x.is_contiguous() ? skip->is_contiguous() : is_channels_last(*skip), op, ": skip must have the layout of x");
  }
  p.gammas = parameter(op, "weight", weight, p.channels, 1.0f);
  p.betas = parameter(op, "bias", bias, p.channels, 0.0f);
  const std::vector<int64_t> matrix = {p.batch, p.channels};
  const std::vector<float> scales = parameter(op, "scale", scale, matrix);
  const std::vector<float> shifts = parameter(op, "shift", shift, matrix);
  if (!scales.empty() && !shifts.empty()) {
    std::vector<float> gammas(scales.size()), betas(scales.size());
    for (size_t i = 0; i < scales.size(); ++i) {
      gammas[i] = p.gammas[i % p.channels] * (1 + scales[i]);
      betas[i] = p.betas[i % p.channels] * (1 + scales[i]) + shifts[i];
    }
    p.gammas = std::move(gammas);
    p.betas = std::move(betas);
    p.parameter_stride = p.channels;
  }
  return p;
}

template <class T>
Source<T> source_of(const char* op, const GroupNorm& p, const Tensor& x, const MaybeTensor& add,
                    const MaybeTensor& skip) {
  const T* second = skip && skip->size(1) ? static_cast<const T*>(skip->const_data_ptr()) : nullptr;
  return {static_cast<const T*>(x.const_data_ptr()), second, x.size(1),
          parameter(op, "add", add, std::vector<int64_t>{p.batch, p.channels})};
}

// An uninitialised tensor for a value a (pixel, channel) of the norm, in the layout of x.
inline Tensor empty_result(const Tensor& x, const GroupNorm& p) {
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size[1] = p.channels;
  return empty(size, x.scalar_type(), !x.is_contiguous());
}

}  // namespace diffkern

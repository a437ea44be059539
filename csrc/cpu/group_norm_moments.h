// The moments that group_norm_silu and its gradient normalise by, and the loops over their input.
//
// Moments are taken a chunk at a time, twice over a chunk that is in the cache: its mean, then the squares about that
// mean; never E[x^2] - E[x]^2. Chunks are merged in order (Chan et al. 1979). What a chunk is depends on the sample's
// shape alone, so that neither threads nor the batch change a bit of the result.
#pragma once

#include "group_norm.h"

namespace diffkern {

constexpr int64_t kChunk = 4096;        // elements of a contiguous chunk: 16 KB of float32
constexpr int64_t kPixelChunk = 16384;  // of a channels_last chunk: long enough to spread the folding of its columns
constexpr int64_t kMinWidth = 256;      // channels_last rows shorter than this are taken several at a time

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

}  // namespace diffkern

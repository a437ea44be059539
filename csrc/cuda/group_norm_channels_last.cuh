// How a block reads a slab of a channels_last sample. A thread keeps to one vector of V channels and takes every
// `rows`-th pixel of a run; a place is a pixel.
#pragma once

#include "group_norm.cuh"

namespace diffkern {

template <class T, int V>
struct ChannelsLast : Slab {
  static constexpr int kSums = V;  // moments that a thread keeps: its channels may be of different groups

  int rows, column, row;  // of the block's threads, of this thread; row == rows if it has nothing to do
  int parts;              // that the rows are pooled into, then to be pooled by a warp a group

  __device__ ChannelsLast(const GroupNorm& p, const GroupCut& cut, int unit, float* room)
      : Slab(p, cut, unit, room, rest_size(blockDim.x, cut.width)) {
    const int columns = stride / V, thread = threadIdx.x;
    rows = rows_of(blockDim.x, stride);
    parts = parts_of(blockDim.x, stride);
    column = thread % columns;
    row = thread / columns < rows && column * V < width ? thread / columns : rows;
  }

  __host__ __device__ static int rows_of(int threads, int stride) { return threads / (stride / V); }
  __host__ __device__ static int parts_of(int threads, int stride) {
    const int parts = threads / stride, rows = rows_of(threads, stride);
    return parts < 1 ? 1 : parts < rows ? parts : rows;
  }
  __host__ __device__ static int rest_size(int threads, int stride) {
    return (rows_of(threads, stride) + parts_of(threads, stride)) * (2 * stride + 1);
  }
  __host__ __device__ static int64_t length(const GroupNorm& p) { return p.pixels; }

  __device__ int64_t start() const { return row; }
  __device__ int64_t step() const { return rows; }

  // The vectors at `at`, at + step, ... < end: how many there are.
  template <int kVectors>
  __device__ int read(Numbers<T, V> (&raw)[kVectors], int64_t at, int64_t end) const {
    const int c = first + column * V;
    const bool mine = c < p.own;
    const int64_t pixel = mine ? p.own : p.channels - p.own;
    const T* in = static_cast<const T*>(mine ? p.x : p.skip) + (sample * p.pixels + at) * pixel + (mine ? c : c - p.own);
    int count = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (row < rows && at + i * rows < end) {
        raw[i].read(in + i * (rows * pixel));
        count = i + 1;
      }
    }
    return count;
  }

  template <int kVectors>
  __device__ void moments(const Numbers<T, V> (&raw)[kVectors], int count, int64_t, float (&mean)[V],
                          float (&squares)[V]) const {
    float added[V];
    from_shared(add + column * V, added);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      mean[k] = 0, squares[k] = 0;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i < count) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          mean[k] += to_float(raw[i][k]) + added[k];
        }
      }
    }
    const float share = 1.0f / static_cast<float>(count > 0 ? count : 1);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      mean[k] *= share;
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i < count) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const float d = to_float(raw[i][k]) + added[k] - mean[k];
          squares[k] += d * d;
        }
      }
    }
  }

  // What all threads have, n values of each channel, pooled into `group`. The caller makes the block wait before that
  // is read.
  __device__ void pool(float n, const float (&mean)[V], const float (&squares)[V]) const {
    float *means = rest, *all_squares = means + rows * stride;
    float *part_means = all_squares + rows * stride, *part_squares = part_means + parts * stride;
    float *ns = part_squares + parts * stride, *part_ns = ns + rows;
    const int thread = threadIdx.x, threads = blockDim.x;
    if (row < rows) {
      to_shared(mean, means + row * stride + column * V);
      to_shared(squares, all_squares + row * stride + column * V);
      if (column == 0) {
        ns[row] = n;
      }
    }
    __syncthreads();
    for (int e = thread; e < parts * stride; e += threads) {
      const int part = e / stride, c = e % stride;
      if (c < width) {
        const Moments m = pooled(part, rows, parts, [&](int r) {
          return Moments{ns[r], means[r * stride + c], all_squares[r * stride + c]};
        });
        part_means[e] = m.mean, part_squares[e] = m.squares;
        if (c == 0) {
          part_ns[part] = m.n;
        }
      }
    }
    __syncthreads();
    for (int g = thread / 32; g < groups(); g += threads / 32) {
      const Moments m = warp_pooled(parts * p.per_group, [&](int e) {
        const int part = e / p.per_group, at = part * stride + g * p.per_group + e % p.per_group;
        return Moments{part_ns[part], part_means[at], part_squares[at]};
      });
      if (thread % 32 == 0) {
        group[g] = m;
      }
    }
  }

  // Normalise what was read at `at` and write it.
  template <int kVectors>
  __device__ void write(Numbers<T, V> (&raw)[kVectors], int count, int64_t at) const {
    constexpr int kStep = V < 4 ? V : 4;  // channels whose parameters are in registers at a time
    T* out = static_cast<T*>(p.y) + (sample * p.pixels + at) * p.channels + first + column * V;
#pragma unroll
    for (int from = 0; from < V; from += kStep) {
      const int c = column * V + from;
      float added[kStep], middle[kStep], a[kStep], b[kStep];
      from_shared(add + c, added);
      from_shared(centre + c, middle);
      from_shared(gain + c, a);
      from_shared(offset + c, b);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (i < count) {
          float y[kStep];
#pragma unroll
          for (int k = 0; k < kStep; ++k) {
            y[k] = (to_float(raw[i][from + k]) + added[k] - middle[k]) * a[k] + b[k];
            y[k] = p.silu ? silu(y[k]) : y[k];
          }
          raw[i].set(from, y);
          if (from + kStep == V) {
            raw[i].write(out + i * (int64_t{rows} * p.channels));
          }
        }
      }
    }
  }
};

}  // namespace diffkern

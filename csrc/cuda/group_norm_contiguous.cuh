// How a block reads a group of a contiguous sample: a run of memory, but for the joint of x and skip. A place is a
// vector of V pixels of one channel; a slab is one group.
#pragma once

#include "group_norm.cuh"

namespace diffkern {

template <class T, int V>
struct Contiguous : Slab {
  static constexpr int kSums = 1;
  static constexpr int kMostWarps = 32;

  int per_channel;  // vectors

  __device__ Contiguous(const GroupNorm& p, const GroupCut& cut, int unit, float* room)
      : Slab(p, cut, unit, room, rest_size(0, 0)), per_channel(static_cast<int>(p.pixels / V)) {}

  __host__ __device__ static int rest_size(int, int) { return 3 * kMostWarps; }
  __host__ __device__ static int64_t length(const GroupNorm& p) { return p.pixels / V * p.per_group; }

  __device__ int64_t start() const { return threadIdx.x; }
  __device__ int64_t step() const { return blockDim.x; }
  __device__ int channel(int64_t at) const { return static_cast<int>(static_cast<uint32_t>(at) / per_channel); }

  template <int kVectors>
  __device__ int read(Numbers<T, V> (&raw)[kVectors], int64_t at, int64_t end) const {
    const T* x = static_cast<const T*>(p.x) + (sample * p.own + first) * p.pixels;
    const T* skip = static_cast<const T*>(p.skip) + (sample * (p.channels - p.own) + first - p.own) * p.pixels;
    int count = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int64_t here = at + i * static_cast<int>(blockDim.x);
      if (here < end) {
        const T* in = first + channel(here) < p.own ? x : skip;
        raw[i].read(in + here * V);
        count = i + 1;
      }
    }
    return count;
  }

  template <int kVectors>
  __device__ void moments(const Numbers<T, V> (&raw)[kVectors], int count, int64_t at, float (&mean)[1],
                          float (&squares)[1]) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i < count) {
        const float added = add[channel(at + i * static_cast<int>(blockDim.x))];
#pragma unroll
        for (int k = 0; k < V; ++k) {
          sum += to_float(raw[i][k]) + added;
        }
      }
    }
    mean[0] = sum / static_cast<float>(count > 0 ? count * V : 1);
    squares[0] = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i < count) {
        const float added = add[channel(at + i * static_cast<int>(blockDim.x))];
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const float d = to_float(raw[i][k]) + added - mean[0];
          squares[0] += d * d;
        }
      }
    }
  }

  // n vectors a thread.
  __device__ void pool(float n, const float (&mean)[1], const float (&squares)[1]) const {
    Moments* of_warp = reinterpret_cast<Moments*>(rest);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Moments mine = warp_pooled(Moments{n * V, mean[0], squares[0]});
    if (lane == 0) {
      of_warp[warp] = mine;
    }
    __syncthreads();
    if (warp == 0) {
      const Moments m = warp_pooled(static_cast<int>(blockDim.x / 32), [&](int w) { return of_warp[w]; });
      if (lane == 0) {
        group[0] = m;
      }
    }
  }

  template <int kVectors>
  __device__ void write(Numbers<T, V> (&raw)[kVectors], int count, int64_t at) const {
    T* out = static_cast<T*>(p.y) + (sample * p.channels + first) * p.pixels;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i < count) {
        const int64_t here = at + i * static_cast<int>(blockDim.x);
        const int c = channel(here);
        const float added = add[c], middle = centre[c], a = gain[c], b = offset[c];
        float y[V];
#pragma unroll
        for (int k = 0; k < V; ++k) {
          y[k] = (to_float(raw[i][k]) + added - middle) * a + b;
          y[k] = p.silu ? silu(y[k]) : y[k];
        }
        raw[i].set(0, y);
        raw[i].write(out + here * V);
      }
    }
  }
};

}  // namespace diffkern

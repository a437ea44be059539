// What the kernels of a group norm share: how a block reads a channels_last sample, and the moments of groups.
//
// A block reads whole rows of a run of pixels. A thread keeps to one vector of V channels and takes every `rows`-th
// pixel. Moments are sums of deviations from one of the values that they are of, so that nothing cancels far from zero,
// and are pooled in a fixed order; never E[x^2] - E[x]^2.
#pragma once

#include "approx.cuh"
#include "numbers.cuh"

namespace diffkern {

constexpr int kGroupThreads = 320;  // of a block at most; a multiple of the vectors in the rows of most UNets and VAEs
constexpr int kInFlight = 4;      // vectors that a thread reads at a time

struct GroupNorm {
  const void *x, *skip;  // skip: null, or the channels after those of x
  void* y;
  Parameter add, weight, bias, scale, shift;  // of a sample: add, scale and shift
  int64_t pixels;
  int own, channels, per_group;  // own: channels of x
  float eps;
  bool silu;
};

// How a sample is cut: slabs of `width` channels, nearly always one, each into `runs` of `length` pixels; decided by
// its shape alone.
struct GroupCut {
  int width, slabs, runs, threads;
  int moments;  // of a group that `normalise` finds: one a run, or one of all where they are pooled before
  int parts;  // that the moments of runs are pooled into, each a thread a group
  int64_t length;
  uint32_t per_group;  // 2^32 / channels of a group, rounded up: a product is quicker than a division

  __host__ __device__ int groups(const GroupNorm& p) const { return width / p.per_group; }
  // Exact while channel * channels of a group < 2^32.
  __host__ __device__ int group_of(int channel) const {
    return per_group == 0 ? channel : static_cast<int>((static_cast<uint64_t>(channel) * per_group) >> 32);
  }
};

struct Mean {
  float mean, squares;  // and the squares about it
};

struct Moments {
  float n;
  Mean of;
};

// Pools the moments of parts, by deviations from what lies among them. Sums of two with the same `from` are the sum.
struct Pool {
  float from, sum = 0, squares = 0;

  __device__ explicit Pool(float from) : from(from) {}
  __device__ void add(float n, const Mean& part) {
    const float d = part.mean - from, nd = n * d;
    sum += nd;
    squares += part.squares + nd * d;
  }
  __device__ Mean of(float n) const {
    const float d = sum / n, rest = squares - sum * d;
    return {from + d, rest < 0 ? 0.0f : rest};  // NaN stays
  }
};

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, lane);
  }
  return x;
}

// Where a block is in its sample, and a thread in its block.
template <class T, int V>
struct Place {
  int64_t sample, begin, end;  // pixels
  int unit, run;               // of all slabs, of this one
  int first, width;            // channels of the slab; the last of a sample may be narrower than the others
  int rows, row, column;       // of the block's threads, of this thread; row == rows if it has nothing to do

  __device__ Place(const GroupNorm& p, const GroupCut& cut, int block) {
    const int columns = cut.width / V, thread = threadIdx.x;
    unit = block / cut.runs, run = block % cut.runs;
    sample = unit / cut.slabs;
    first = unit % cut.slabs * cut.width;
    width = cut.width < p.channels - first ? cut.width : p.channels - first;
    begin = run * cut.length;
    end = begin + cut.length < p.pixels ? begin + cut.length : p.pixels;
    rows = blockDim.x / columns;
    row = thread / columns;
    column = thread - row * columns;
    row = row < rows && column * V < width ? row : rows;
  }

  __device__ int channel() const { return first + column * V; }

  // The vectors at pixel `at`, at + rows, ... of this run: how many there are.
  __device__ __forceinline__ int read(const GroupNorm& p, Numbers<T, V> (&raw)[kInFlight], int64_t at) const {
    const bool mine = channel() < p.own;
    const int pixel = mine ? p.own : p.channels - p.own;
    const T* in = static_cast<const T*>(mine ? p.x : p.skip) + (sample * p.pixels + at) * pixel + channel() -
                  (mine ? 0 : p.own);
    const int64_t step = int64_t{rows} * pixel;
    const int left = row < rows ? static_cast<int>(end - at) : 0;
    int count = 0;
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (i * rows < left) {
        raw[i].read(in + i * step);
        count = i + 1;
      }
    }
    return count;
  }
};

__device__ inline float silu(float x) { return x * approx_reciprocal(1 + approx_exp2(x * -1.44269504f)); }

}  // namespace diffkern

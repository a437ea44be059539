// group_norm_silu, see diffkern/ops/group_norm_silu.py.
//
// `one_pass`: a slab stays in the registers of one block, or of the blocks of a cluster, which exchange the moments of
// their runs through distributed shared memory: it is read once. `group_moments` and `normalise`: the same in two passes
// over memory, for what does not fit. How a sample is cut depends on its own shape only, so that its result does not
// depend on its batch.
#pragma once

#include "cluster.cuh"
#include "group_norm_channels_last.cuh"
#include "group_norm_contiguous.cuh"

#include <algorithm>
#include <numeric>

namespace diffkern {

// Threads of a block at most, by the vectors that each has in registers; and of the two-pass kernels, one number a
// thread or a vector.
constexpr int one_pass_threads(int vectors) { return vectors == 4 ? 384 : vectors == 8 ? 320 : 512; }
constexpr int two_pass_threads(int vector) { return vector > 1 ? 256 : 512; }
constexpr int kInFlight = 4;  // vectors that a thread of the two-pass kernels has in flight

// The places of a block's run.
struct Run {
  int64_t begin, end;

  __device__ Run(const GroupCut& cut, int run, int64_t length)
      : begin(run * cut.length), end(begin + cut.length < length ? begin + cut.length : length) {}
};

template <class Layout, class T, int V, int kVectors>
__global__ void __launch_bounds__(one_pass_threads(kVectors), kVectors > 8 ? 1 : 2)
    one_pass(GroupNorm p, GroupCut cut) {
  const Layout slab(p, cut, blockIdx.x / cut.runs, dynamic_shared());
  const Run run(cut, block_rank(), Layout::length(p));
  const int64_t at = run.begin + slab.start();
  Numbers<T, V> raw[kVectors];
  const int count = slab.read(raw, at, run.end);
  slab.template load_parameters<T>();
  __syncthreads();

  float mean[Layout::kSums], squares[Layout::kSums];
  slab.moments(raw, count, at, mean, squares);
  slab.pool(static_cast<float>(count), mean, squares);
  cluster_arrive();
  cluster_wait();
  for (int g = threadIdx.x / 32; g < slab.groups(); g += blockDim.x / 32) {
    slab.set_group(g, warp_pooled(cut.runs, [&](int rank) { return *of_block(slab.group + g, rank); }));
  }
  cluster_arrive();  // the others may leave: their moments have been read
  __syncthreads();
  slab.write(raw, count, at);
  cluster_wait();
}

// partial: [B, slabs, groups of a slab, runs].
template <class Layout, class T, int V>
__global__ void __launch_bounds__(two_pass_threads(V), V > 1 ? 2 : 1)
    group_moments(GroupNorm p, GroupCut cut, Moments* partial) {
  const int unit = blockIdx.x / cut.runs, part = blockIdx.x % cut.runs;
  const Layout slab(p, cut, unit, dynamic_shared());
  const Run run(cut, part, Layout::length(p));
  slab.template load_parameters<T>();
  __syncthreads();

  float n = 0, mean[Layout::kSums] = {}, squares[Layout::kSums] = {};
  for (int64_t at = run.begin + slab.start(); at < run.end; at += kInFlight * slab.step()) {
    Numbers<T, V> raw[kInFlight];
    const int count = slab.read(raw, at, run.end);
    if (count == 0) {
      break;
    }
    float more_mean[Layout::kSums], more_squares[Layout::kSums];
    slab.moments(raw, count, at, more_mean, more_squares);
    const float more = static_cast<float>(count), share = more / (n + more);
#pragma unroll
    for (int k = 0; k < Layout::kSums; ++k) {
      const float d = more_mean[k] - mean[k];
      mean[k] += d * share;
      squares[k] += more_squares[k] + d * d * (n * share) * (V / Layout::kSums);
    }
    n += more;
  }
  slab.pool(n, mean, squares);
  __syncthreads();
  for (int g = threadIdx.x; g < slab.groups(); g += blockDim.x) {
    partial[(int64_t{unit} * (cut.width / p.per_group) + g) * cut.runs + part] = slab.group[g];
  }
}

template <class Layout, class T, int V>
__global__ void __launch_bounds__(two_pass_threads(V), V > 1 ? 2 : 1)
    normalise(GroupNorm p, GroupCut cut, const Moments* partial) {
  // Backwards: what `group_moments` read last is still in the cache.
  const int block = gridDim.x - 1 - blockIdx.x, unit = block / cut.runs, part = block % cut.runs;
  const Layout slab(p, cut, unit, dynamic_shared());
  const Run run(cut, part, Layout::length(p));
  int64_t at = run.begin + slab.start();
  Numbers<T, V> raw[kInFlight];
  int count = slab.read(raw, at, run.end);  // on its way while moments are pooled
  slab.template load_parameters<T>();
  __syncthreads();
  for (int g = threadIdx.x / 32; g < slab.groups(); g += blockDim.x / 32) {
    const Moments* of_group = partial + (int64_t{unit} * (cut.width / p.per_group) + g) * cut.runs;
    slab.set_group(g, warp_pooled(cut.runs, [&](int r) { return of_group[r]; }));
  }
  __syncthreads();
  while (count > 0) {
    slab.write(raw, count, at);
    at += kInFlight * slab.step();
    count = slab.read(raw, at, run.end);
  }
}

}  // namespace diffkern

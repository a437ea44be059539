// group_norm_silu, see diffkern/ops/group_norm_silu.py: `group_moments` reads what `normalise` reads again, from the
// cache if that is large enough; or, where whoever made the inputs gave their moments, `pool_moments` reads those. How a
// sample is cut depends on its own shape only, so that its result does not depend on its batch.
#pragma once

#include "chained.cuh"
#include "group_norm.cuh"

namespace diffkern {

// Floats that the blocks share, for so many parts that moments are pooled into.
inline int pooling_room(int parts, int groups) { return 2 * parts * groups; }

// partial: [B, slabs, runs, groups of a slab].
template <class T, int V>
__global__ void __launch_bounds__(kGroupThreads, 3) group_moments(GroupNorm p, GroupCut cut, Mean* partial) {
  let_next_begin();
  const Place<T, V> here(p, cut, blockIdx.x, blockIdx.y, blockIdx.z);
  Numbers<T, V> raw[kInFlight];
  int64_t at = here.begin + here.row;
  int count = here.read(p, raw, at);

  float from[V], sum[V], squares[V], n = 0;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    from[k] = count > 0 ? raw[0][k] : 0.0f, sum[k] = 0, squares[k] = 0;
  }
  while (count > 0) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (i < count) {
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const float d = raw[i][k] - from[k];
          sum[k] += d;
          squares[k] += d * d;
        }
      }
    }
    n += static_cast<float>(count);
    at += kInFlight * here.rows;
    count = here.read(p, raw, at);
  }

  const float share = 1.0f / (n > 0 ? n : 1.0f);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const float d = sum[k] * share;
    squares[k] = squares[k] < sum[k] * d ? 0.0f : squares[k] - sum[k] * d;  // NaN stays
    sum[k] = from[k] + d;
  }
  const SharedRows shared(dynamic_shared(), cut);
  shared.share(p, here, n, sum, squares);
  __syncthreads();
  Mean* of_block = partial + here.index(cut) * cut.groups();
  for (int g = threadIdx.x / 32; g < cut.by_group(here.width); g += blockDim.x / 32) {
    const Mean of_run = shared.pooled(p, cut, g, static_cast<int>(here.end - here.begin));
    if (threadIdx.x % 32 == 0) {
      of_block[g] = of_run;
    }
  }
}

// The moments of channels that were given: [B, chunks, 2 channels of each input], of runs of `length` pixels the means,
// then the squares about them.
struct GivenMoments {
  const float *x, *skip;
  int chunks;
  int64_t length;
};

constexpr int kPoolThreads = 256;  // of a block, which pools one group

// partial: [B, slabs, groups of a slab].
template <class T>
__global__ void __launch_bounds__(kPoolThreads) pool_moments(GroupNorm p, GroupCut cut, GivenMoments given,
                                                             Mean* partial) {
  let_next_begin();
  const int groups = p.channels / p.per_group, group = blockIdx.x % groups, first = group * p.per_group;
  const int64_t sample = blockIdx.x / groups;
  const int entries = given.chunks * p.per_group;
  const auto entry = [&](int e) {
    const int chunk = e / p.per_group, c = first + e - chunk * p.per_group;
    const bool mine = c < p.own;
    const int width = mine ? p.own : p.channels - p.own;
    const float* at = (mine ? given.x : given.skip) + (sample * given.chunks + chunk) * 2 * width + c -
                      (mine ? 0 : p.own);
    const float added = p.add.data ? p.add.at<T>(sample * p.channels + c) : 0.0f;
    const int64_t left = p.pixels - chunk * given.length;  // of a last chunk fewer, or none
    const int64_t n = left < given.length ? (left < 0 ? 0 : left) : given.length;
    return Moments{static_cast<float>(n), {at[0] + added, at[width]}};
  };
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  // From the mean of the first 32, the same in all warps.
  Pool pool(warp_sum(lane < entries ? entry(lane).of.mean : 0) / static_cast<float>(entries < 32 ? entries : 32));
#pragma unroll 4
  for (int e = threadIdx.x; e < entries; e += blockDim.x) {
    const Moments m = entry(e);
    pool.add(m.n, m.of);
  }
  pool.sum = warp_sum(pool.sum), pool.squares = warp_sum(pool.squares);
  Mean* shared = reinterpret_cast<Mean*>(dynamic_shared());
  if (lane == 0) {
    shared[warp] = {pool.sum, pool.squares};
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < warps; ++w) {
      pool.sum += shared[w].mean;
      pool.squares += shared[w].squares;
    }
    partial[sample * cut.slabs * cut.groups() + group] = pool.of(static_cast<float>(p.pixels * p.per_group));
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kGroupThreads, 2) normalise(GroupNorm p, GroupCut cut, const Mean* partial) {
  // Backwards: what `group_moments` read last is still in the cache.
  const Place<T, V> here(p, cut, gridDim.x - 1 - blockIdx.x, gridDim.y - 1 - blockIdx.y, gridDim.z - 1 - blockIdx.z);
  const int groups = cut.groups(), rows = here.rows, parts = cut.parts;
  Numbers<T, V> raw[kInFlight];
  int64_t at = here.begin + here.row;
  int count = here.read(p, raw, at);  // on its way, as the parameters are, while moments are pooled
  Affine<T, V> affine(p, here);

  wait_for_last();
  Mean* pooled = reinterpret_cast<Mean*>(dynamic_shared());  // [parts, groups]: sums first, then moments in the first
  const Mean* of_slab = partial + (here.sample * cut.slabs + here.slab) * cut.moments * groups;
  const int there = cut.by_group(here.width);
  for (int e = threadIdx.x; e < parts * groups; e += blockDim.x) {
    const int part = cut.by_groups(e), g = e - part * groups;
    if (g < there) {
      Pool pool(of_slab[g].mean);
#pragma unroll 4
      for (int turn = 0; turn < cut.turns; ++turn) {
        if (const int run = part + turn * parts; run < cut.moments) {
          pool.add(numbers_of(cut, run), of_slab[run * groups + g]);
        }
      }
      pooled[e] = {pool.sum, pool.squares};
    }
  }
  __syncthreads();
  for (int g = threadIdx.x; g < there; g += blockDim.x) {
    Pool pool(of_slab[g].mean);
#pragma unroll 4
    for (int part = 0; part < parts; ++part) {
      pool.sum += pooled[part * groups + g].mean;
      pool.squares += pooled[part * groups + g].squares;
    }
    const float n = cut.full * static_cast<float>(cut.moments - 1) + cut.last;
    const Mean m = pool.of(n);
    pooled[g] = {m.mean, approx_reciprocal_sqrt(m.squares / n + p.eps)};
  }
  __syncthreads();
  affine.standardise(cut, here, pooled);

  T* out = static_cast<T*>(p.y) + (here.sample * p.pixels + at) * p.channels + here.channel();
  const int64_t step = int64_t{rows} * p.channels;
  while (count > 0) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (i < count) {
        affine.apply(raw[i], p.silu);
        raw[i].write(out + i * step);
      }
    }
    out += kInFlight * step;
    at += kInFlight * rows;
    count = here.read(p, raw, at);
  }
}

}  // namespace diffkern

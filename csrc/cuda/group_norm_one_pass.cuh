// group_norm_silu with its input read once: what a block reads of a slab stays in its registers while the blocks of its
// cluster, which have the rest, tell each other the moments of their runs. The squares are those about the mean of the
// thread that they are of: its numbers are still there when it is known.
#pragma once

#include "chained.cuh"
#include "cluster.cuh"
#include "group_norm.cuh"

namespace diffkern {

// Threads of a block at most, by the vectors that each of them has in registers: those of two blocks, or of one of the
// largest, leave none of a multiprocessor's registers unused, and spill none.
constexpr int one_pass_threads(int vectors) { return vectors > 8 ? 512 : vectors > 4 ? 256 : 320; }

// Bytes that a block shares: its rows, then, on 8 bytes, the moments that the blocks of its cluster send, the slab's, and
// the mailbox.
__host__ __device__ inline int rows_room(const GroupCut& cut) { return (SharedRows::floats(cut) + 1) / 2 * 8; }
inline int one_pass_room(const GroupCut& cut, int groups) {
  return rows_room(cut) + static_cast<int>((cut.runs + 1) * groups * sizeof(float2) + sizeof(Mailbox));
}

// A cluster is the runs of a slab.
template <class T, int V, int kVectors>
__global__ void __launch_bounds__(one_pass_threads(kVectors), kVectors > 8 ? 1 : 2)
    one_pass(GroupNorm p, GroupCut cut) {
  const Place<T, V> here(p, cut, blockIdx.x, blockIdx.y, blockIdx.z);
  const int64_t at = here.begin + here.row;
  Numbers<T, V> raw[kVectors];
  const int count = here.read(p, raw, at);
  const int groups = cut.groups();  // as many in each slab
  const SharedRows shared(dynamic_shared(), cut);
  float2* of_runs = reinterpret_cast<float2*>(dynamic_shared() + rows_room(cut) / 4);  // [runs, groups]
  Mean* of_slab = reinterpret_cast<Mean*>(of_runs + cut.runs * groups);
  Mailbox& mailbox = *reinterpret_cast<Mailbox*>(of_slab + groups);
  if (threadIdx.x == 0) {
    mailbox.open(cut.runs * groups * static_cast<int>(sizeof(float2)));
  }
  cluster_arrive();

  float mean[V], squares[V];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    mean[k] = 0, squares[k] = 0;
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (i < count) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        mean[k] += raw[i][k];
      }
    }
  }
  const float n = static_cast<float>(count), share = 1.0f / (count > 0 ? n : 1.0f);
#pragma unroll
  for (int k = 0; k < V; ++k) {
    mean[k] *= share;
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (i < count) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float d = raw[i][k] - mean[k];
        squares[k] += d * d;
      }
    }
  }
  shared.share(p, here, n, mean, squares);
  __syncthreads();
  cluster_wait();  // long since over: all have opened their mailboxes
  for (int g = threadIdx.x / 32; g < groups; g += blockDim.x / 32) {
    const Mean of_run = shared.pooled(p, cut, g, static_cast<int>(here.end - here.begin));
    if (static_cast<int>(threadIdx.x % 32) < cut.runs) {
      mailbox.send(threadIdx.x % 32, of_runs + here.run * groups + g, {of_run.mean, of_run.squares});
    }
  }
  Affine<T, V> affine(p, here);  // on its way, as the moments of the other runs are
  mailbox.receive();

  const float all = cut.full * static_cast<float>(cut.runs - 1) + cut.last;
  for (int g = threadIdx.x; g < groups; g += blockDim.x) {
    Pool pool(of_runs[g].x);
#pragma unroll 4
    for (int run = 0; run < cut.runs; ++run) {
      const float2 part = of_runs[run * groups + g];
      pool.add(numbers_of(cut, run), {part.x, part.y});
    }
    const Mean m = pool.of(all);
    of_slab[g] = {m.mean, approx_reciprocal_sqrt(m.squares / all + p.eps)};
  }
  __syncthreads();
  affine.standardise(cut, here, of_slab);
  T* out = static_cast<T*>(p.y) + (here.sample * p.pixels + at) * p.channels + here.channel();
  const int64_t step = int64_t{here.rows} * p.channels;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (i < count) {
      affine.apply(raw[i], p.silu);
      raw[i].write(out + i * step);
    }
  }
}

}  // namespace diffkern

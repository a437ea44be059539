// randn: normals from a counter. Bound by arithmetic in 16 bits, by memory in 32.
#pragma once

#include "runs.cuh"
#include "vector.cuh"

namespace diffkern {

// Number i of a sample is the normal of element 4 block + skew + i of its stream; runs are of the stream's elements.
// With kAligned, skew is 0 and n a multiple of a run.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads)
    randn(const int64_t* __restrict__ keys, T* __restrict__ out, Cut cut, int64_t draw, int64_t block, int skew) {
  constexpr int N = kWide<T>, kTurn = 8;  // normals of a run, and of a turn of the loop
  const int64_t sample = sample_index();
  if (sample >= cut.batch) {
    return;
  }
  const Stream stream = stream_of(key_of(keys, sample), draw);
  T* to = out + sample * (cut.n - skew);
  for_each_run<N, kTurn / N>(cut, [&](int64_t at, int count) {
    float z[N];
    normals(stream, static_cast<uint32_t>(block) + block_at(at), z);
    if constexpr (kAligned) {
      store(z, to + at);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (i < count && at + i >= skew) {
          from_float(z[i], to[at + i - skew]);
        }
      }
    }
  });
}

}  // namespace diffkern

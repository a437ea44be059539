// reparameterize: z = mean + exp(logvar / 2) epsilon in one pass.
#pragma once

#include "runs.cuh"
#include "vector.cuh"

namespace diffkern {

template <class T, bool kAligned, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    reparameterize(const T* __restrict__ mean, const T* __restrict__ logvar, const int64_t* __restrict__ keys,
                   T* __restrict__ out, Cut cut, int64_t draw) {
  constexpr int N = kWide<T>;
  constexpr float kHalfLog2e = 0.72134752044f;
  const int64_t sample = sample_index();
  if (sample >= cut.batch) {
    return;
  }
  const int64_t first = sample * cut.n;
  struct Moments {
    Early<kAligned, T, N> mean, logvar;
  };
  const auto read = [&](int64_t at, int count) {
    Moments held;
    held.mean.read(mean + first + at, count);
    held.logvar.read(logvar + first + at, count);
    return held;
  };
  const Stream stream = stream_of(key_of(keys, sample), draw);
  for_each_noisy_run<kChannelsLast, N>(cut, stream, read, [&](int64_t at, int count, auto& z, const Moments& held) {
    float m[N], v[N];
    held.mean.get_numbers(m);
    held.logvar.get_numbers(v);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      m[i] += approx_exp2(kHalfLog2e * v[i]) * z[i];
    }
    store<kAligned>(m, count, out + first + at);
  });
}

}  // namespace diffkern

// add_noise: x_t = alpha_t x_0 + sigma_t epsilon in one pass, the schedule looked up by the program.
#pragma once

#include "runs.cuh"
#include "vector.cuh"

namespace diffkern {

template <class T, bool kAligned, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    add_noise(const T* __restrict__ x0, const int64_t* __restrict__ timestep, const float* __restrict__ alpha_sigma,
              const int64_t* __restrict__ keys, T* __restrict__ x_t, T* __restrict__ epsilon, Cut cut, int64_t rows,
              int64_t draw) {
  constexpr int N = kWide<T>;
  const int64_t sample = sample_index();
  if (sample >= cut.batch) {
    return;
  }
  const int64_t row = timestep[sample];
  const float alpha = number_of(alpha_sigma, rows, 2, row, 0), sigma = number_of(alpha_sigma, rows, 2, row, 1);
  const int64_t first = sample * cut.n;
  const auto read = [&](int64_t at, int count) {
    Early<kAligned, T, N> x;
    x.read(x0 + first + at, count);
    return x;
  };
  const Stream stream = stream_of(key_of(keys, sample), draw);
  for_each_noisy_run<kChannelsLast, N>(cut, stream, read, [&](int64_t at, int count, auto& z, const auto& held) {
    float x[N];
    held.get_numbers(x);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = alpha * x[i] + sigma * z[i];
    }
    store<kAligned>(x, count, x_t + first + at);
    if (epsilon != nullptr) {
      store<kAligned>(z, count, epsilon + first + at);
    }
  });
}

}  // namespace diffkern

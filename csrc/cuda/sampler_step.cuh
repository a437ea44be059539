// sampler_step: one row of a sampler's table applied in one pass, a run of numbers a thread. Each asks for all it reads
// of the tensors, then for the row, and only then waits: memory's latency is met once.
#pragma once

#include "runs.cuh"
#include "vector.cuh"

namespace diffkern {

// The columns of a row, as in diffkern/ops/sampler_step.py. A block of weights is for x, m, x0, h0, h1, h2, base.
enum Column { kCIn = 1, kA = 2, kB = 3, kClip = 4, kNoise = 5, kDraw = 6, kNext = 8, kNextBase = 16, kNextH = 24 };
constexpr int kWidth = 32;
constexpr int kRead = kWidth + kCIn + 1;  // of the table, from a row on: all of it, and c_in of the next

// A call. S is what the state is kept in, T what the model reads and writes; a null pointer is an input or a result
// that is not there.
template <class S, class T>
struct Step {
  const S* x;
  const T* output;
  const float* table;
  const int64_t* row;
  const int64_t* keys;
  const float* guidance;
  const S* past[4];  // h0, h1, h2, base: the terms after x, m and x0
  S* made[3];        // x_next, base_next, h_next
  T* model_input;
  Cut cut;
  int64_t rows;
};

// Within -bound and bound; a NaN stays one.
__device__ __forceinline__ float clamp(float x, float bound) {
#ifdef __CUDA_ARCH__
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(bound));
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(-bound));
  return x;
#else
  x = x > bound ? bound : x;
  return x < -bound ? -bound : x;
#endif
}

// What a run reads of the tensors.
template <bool kAligned, int N, class S, class T>
struct Terms {
  Early<kAligned, S, N> x, past[4];
  Early<kAligned, T, N> output, conditional;

  __device__ __forceinline__ void read(const Step<S, T>& c, int64_t at, int count) {
    x.read(c.x + at, count);
    output.read(c.output + at, count);
    if (c.guidance != nullptr) {
      conditional.read(c.output + c.cut.batch * c.cut.n + at, count);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (c.past[j] != nullptr) {
        past[j].read(c.past[j] + at, count);
      }
    }
  }
};

// One run: `row` is that of its sample, z the noise.
template <bool kAligned, int N, class S, class T>
__device__ __forceinline__ void step_run(const Step<S, T>& c, const Terms<kAligned, N, S, T>& terms, const float* row,
                                         float guidance, int64_t at, int count, const float (&z)[N]) {
  float x[N], m[N], x0[N], term[N];
  terms.x.get_numbers(x);
  terms.output.get_numbers(m);
  if (c.guidance != nullptr) {
    terms.conditional.get_numbers(term);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      m[i] += guidance * (term[i] - m[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x0[i] = clamp(row[kA] * x[i] + row[kB] * m[i], row[kClip]);
  }
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const bool next = k == 0;  // of which the model's input is made too
    if (c.made[k] == nullptr && !(next && c.model_input != nullptr)) {
      continue;
    }
    const float* w = row + kNext + (kNextBase - kNext) * k;
    float sum[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {  // a term with weight zero counts too, so that its NaN shows
      sum[i] = w[0] * x[i] + w[1] * m[i] + w[2] * x0[i];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (c.past[j] != nullptr) {
        terms.past[j].get_numbers(term);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          sum[i] += w[3 + j] * term[i];
        }
      }
    }
    if (next && c.keys != nullptr) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sum[i] += row[kNoise] * z[i];
      }
    }
    if (c.made[k] != nullptr) {
      store<kAligned>(sum, count, c.made[k] + at);
    }
    if (next && c.model_input != nullptr) {
      const float c_in = row[kWidth + kCIn];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sum[i] *= c_in;
      }
      store<kAligned>(sum, count, c.model_input + at);
      if (c.guidance != nullptr) {
        store<kAligned>(sum, count, c.model_input + c.cut.batch * c.cut.n + at);
      }
    }
  }
}

// Only a call that draws noise is kChannelsLast: without it all layouts are alike.
template <class S, class T, bool kAligned, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads) sampler_step(const Step<S, T> c) {
  constexpr int N = kWide<S>;
  const int64_t sample = sample_index();
  if (sample >= c.cut.batch) {
    return;
  }
  const int64_t first = sample * c.cut.n, at = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * N;
  const int count = static_cast<int>(at + N <= c.cut.n ? N : c.cut.n - at);
  Terms<kAligned, N, S, T> terms;
  if (!kChannelsLast && count > 0) {
    terms.read(c, first + at, count);
  }
  alignas(16) __shared__ float row[kRead];
  if (threadIdx.x < kRead) {
    // The last row only ends the table (its c_in is what the model would see next), so no sample is at it.
    row[threadIdx.x] = number_of(c.table, c.rows - 1, kWidth, c.row[sample], threadIdx.x);
  }
  const float guidance = c.guidance == nullptr ? 0.0f : c.guidance[sample];
  const Key key = c.keys == nullptr ? Key{} : key_of(c.keys, sample);
  __syncthreads();
  const auto stream = [&] { return stream_of(key, static_cast<int64_t>(row[kDraw])); };
  if constexpr (kChannelsLast) {
    for_each_run_channels_last<N>(c.cut, stream(), [&](int64_t at, int count, const float (&z)[N]) {
      terms.read(c, first + at, count);
      step_run(c, terms, row, guidance, first + at, count, z);
    });
  } else if (count > 0) {
    float z[N];
    if (c.keys != nullptr) {
      normals(stream(), block_at(at), z);
    }
    step_run(c, terms, row, guidance, first + at, count, z);
  }
}

}  // namespace diffkern

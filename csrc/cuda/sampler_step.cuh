// sampler_step: one row of a sampler's table applied in one pass. A program reads the row of its sample once.
#pragma once

#include "runs.cuh"
#include "vector.cuh"

namespace diffkern {

// The columns of a row, as in diffkern/ops/sampler_step.py. A block of weights is for x, m, x0, h0, h1, h2, base.
enum Column { kCIn = 1, kA = 2, kB = 3, kClip = 4, kNoise = 5, kDraw = 6, kNext = 8, kNextBase = 16, kNextH = 24 };
constexpr int kWidth = 32;

// A call. S is what the state is kept in, T what the model reads and writes; a null pointer is an input or a result that
// is not there.
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

// One run: `r` is the row of its sample, `c_in` of the next row, z the noise.
template <bool kAligned, int N, class S, class T>
__device__ __forceinline__ void step_run(const Step<S, T>& c, const float (&r)[kWidth], float c_in, float guidance,
                                         int64_t at, int count, const float (&z)[N]) {
  const int64_t conditional = at + c.cut.batch * c.cut.n;  // in the second half of a guided batch
  float x[N], m[N], x0[N], term[N], sum[3][N];
  load<kAligned>(c.x + at, count, x);
  load<kAligned>(c.output + at, count, m);
  if (c.guidance != nullptr) {
    load<kAligned>(c.output + conditional, count, term);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      m[i] += guidance * (term[i] - m[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float v = r[kA] * x[i] + r[kB] * m[i];
    v = v > r[kClip] ? r[kClip] : v;  // written so that a NaN stays one
    x0[i] = v < -r[kClip] ? -r[kClip] : v;
  }
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    const float* w = r + kNext + (kNextBase - kNext) * k;
#pragma unroll
    for (int i = 0; i < N; ++i) {  // a term with weight zero counts too, so that its NaN shows
      sum[k][i] = w[0] * x[i] + w[1] * m[i] + w[2] * x0[i];
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (c.past[j] != nullptr) {
      load<kAligned>(c.past[j] + at, count, term);
#pragma unroll
      for (int k = 0; k < 3; ++k) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
          sum[k][i] += r[kNext + (kNextBase - kNext) * k + 3 + j] * term[i];
        }
      }
    }
  }
  if (c.keys != nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum[0][i] += r[kNoise] * z[i];
    }
  }
#pragma unroll
  for (int k = 0; k < 3; ++k) {
    if (c.made[k] != nullptr) {
      store<kAligned>(sum[k], count, c.made[k] + at);
    }
  }
  if (c.model_input != nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum[0][i] *= c_in;
    }
    store<kAligned>(sum[0], count, c.model_input + at);
    if (c.guidance != nullptr) {
      store<kAligned>(sum[0], count, c.model_input + conditional);
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
  // The last row only ends the table (its c_in is what the model would see next), so no sample is at it.
  const float* from = c.table + kWidth * clamp_row(c.row[sample], c.rows - 1);
  float r[kWidth];
  load<kAligned>(from, kWidth, r);
  const float c_in = from[kWidth + kCIn], guidance = c.guidance == nullptr ? 0.0f : c.guidance[sample];
  const int64_t first = sample * c.cut.n;
  const Stream stream = c.keys == nullptr ? Stream{} : stream_of(c.keys, sample, static_cast<int64_t>(r[kDraw]));
  if constexpr (kChannelsLast) {
    for_each_run_channels_last<N>(c.cut, stream, [&](int64_t at, int count, const float (&z)[N]) {
      step_run<kAligned, N>(c, r, c_in, guidance, first + at, count, z);
    });
  } else {
    for_each_run<N>(c.cut, [&](int64_t at, int count) {
      float z[N];
      if (c.keys != nullptr) {
        normals(stream, at, z);
      }
      step_run<kAligned, N>(c, r, c_in, guidance, first + at, count, z);
    });
  }
}

}  // namespace diffkern

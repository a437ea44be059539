// The norms of a transformer's tokens: rows [B, T, C], and what follows: weight and bias of a channel, scale and shift
// of a sample's. A row is read once and stays in registers: its mean, then the squares about that mean, then the
// result. Who reads which number depends on the width alone, so that a row's result does not depend on its batch.
#pragma once

#include "approx.cuh"
#include "numbers.cuh"

namespace diffkern {

struct Rows {
  const void *x, *y;  // y: what joins the residual stream x
  void *r, *out;      // r: the sum of both
  Parameter gate, shift, scale, weight, bias;  // of a sample: gate, shift and scale
  int64_t rows;
  int tokens, channels;  // tokens: rows of a sample
  float share, eps;      // share: 1 / channels
};

// The sum over the kWarps warps of a row. `room`: one float a warp of the block.
template <int kWarps>
__device__ float row_sum(float x, float* room) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, lane);
  }
  if constexpr (kWarps > 1) {
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) {
      room[warp] = x;
    }
    __syncthreads();
    x = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      x += room[warp / kWarps * kWarps + i];
    }
  }
  return x;
}

// Rows of a block, each of kWarps warps.
template <int kWarps>
constexpr int kBlockRows = kWarps > 4 ? 1 : 4 / kWarps;

// kGated: of x + gate * y. kVectors vectors of V numbers a thread, kWarps warps a row.
template <bool kGated, class T, int V, int kVectors, int kWarps>
__global__ void __launch_bounds__(32 * kWarps * kBlockRows<kWarps>, kWarps > 4 ? 16 / kWarps : 4)
    norm_rows(Rows p) {
  constexpr int kThreads = 32 * kWarps;
  __shared__ float room[2][kWarps * kBlockRows<kWarps>];
  const int64_t row = int64_t{blockIdx.x} * kBlockRows<kWarps> + threadIdx.x / kThreads;
  if (kWarps == 1 && row >= p.rows) {
    return;
  }
  const int width = row < p.rows ? p.channels : 0;  // without a row it only takes part in the barriers
  const int64_t at = row * p.channels;
  const int64_t of_sample = row < p.rows ? row / p.tokens * p.channels : 0;
  // What this thread has of a row: `channel(n)`, and the following V - 1, for each n with channel(n) < width.
  const auto channel = [](int n) { return static_cast<int>(threadIdx.x % kThreads + n * kThreads) * V; };

  // The last affine map, by `a` and `b`; with scale and shift that of weight and bias comes before. They stay apart:
  // folded, an infinity in one would meet one of the other and make a NaN.
  const bool modulated = p.scale.data != nullptr;
  const Parameter &a = modulated ? p.scale : p.weight, &b = modulated ? p.shift : p.bias;
  const int64_t last = modulated ? of_sample : 0;

  // All is asked for before any of it is waited for, but for parameters in another dtype than x.
  Numbers<T, V> x[kVectors], y[kVectors], gates[kVectors], early_a[kVectors], early_b[kVectors];
  const bool is_early_gate = V > 1 && !p.gate.wide;
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    if (channel(n) < width) {
      x[n].read(static_cast<const T*>(p.x) + at + channel(n));
      if constexpr (kGated) {
        y[n].read(static_cast<const T*>(p.y) + at + channel(n));
        if (is_early_gate) {
          gates[n].read(static_cast<const T*>(p.gate.data) + of_sample + channel(n));
        }
      }
    }
  }
  const bool is_early = V > 1 && a.data && b.data && !a.wide && !b.wide;
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    if (is_early && channel(n) < width) {
      early_a[n].read(static_cast<const T*>(a.data) + last + channel(n));
      early_b[n].read(static_cast<const T*>(b.data) + last + channel(n));
    }
  }

  float v[kVectors][V], sum = 0;
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    const bool there = channel(n) < width;
    float gate[V];
    if (kGated && there && !is_early_gate) {
      p.gate.read<T>(of_sample + channel(n), gate);
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (kGated && is_early_gate) {
        gate[k] = gates[n][k];
      }
      v[n][k] = !there ? 0.0f : kGated ? x[n][k] + gate[k] * y[n][k] : x[n][k];
      sum += v[n][k];
    }
  }
  if constexpr (kGated) {
#pragma unroll
    for (int n = 0; n < kVectors; ++n) {
      if (channel(n) < width) {
        write_numbers(v[n], static_cast<T*>(p.r) + at + channel(n));
      }
    }
  }

  const float mean = row_sum<kWarps>(sum, room[0]) * p.share;
  float squares = 0;
#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      v[n][k] -= mean;
      squares += channel(n) < width ? v[n][k] * v[n][k] : 0.0f;
    }
  }
  const float factor = approx_reciprocal_sqrt(row_sum<kWarps>(squares, room[1]) * p.share + p.eps);

#pragma unroll
  for (int n = 0; n < kVectors; ++n) {
    if (channel(n) < width) {
      float gain[V], offset[V];
#pragma unroll
      for (int k = 0; k < V; ++k) {
        v[n][k] *= factor;
      }
      if (modulated && p.weight.data) {
        p.weight.read<T>(channel(n), gain);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          v[n][k] *= gain[k];
        }
      }
      if (modulated && p.bias.data) {
        p.bias.read<T>(channel(n), offset);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          v[n][k] += offset[k];
        }
      }
#pragma unroll
      for (int k = 0; k < V; ++k) {
        gain[k] = is_early ? early_a[n][k] : modulated ? 0.0f : 1.0f;
        offset[k] = is_early ? early_b[n][k] : 0.0f;
      }
      if (!is_early && a.data) {
        a.read<T>(last + channel(n), gain);
      }
      if (!is_early && b.data) {
        b.read<T>(last + channel(n), offset);
      }
#pragma unroll
      for (int k = 0; k < V; ++k) {
        v[n][k] = v[n][k] * (modulated ? 1 + gain[k] : gain[k]) + offset[k];
      }
      write_numbers(v[n], static_cast<T*>(p.out) + at + channel(n));
    }
  }
}

}  // namespace diffkern

// attention, see diffkern/ops/attention.py: flash attention (Dao et al. 2022; Dao 2023) for heads of up to 160 numbers
// of 16 bits, without a mask.
//
// A block does some queries of one head over all keys, each of its warps 16 or 32 queries: the sums of scores and the
// weights that they become stay in the registers in which the tensor cores leave and take them. Keys and values pass
// through shared memory, two blocks of them under way. Which sum is made in which order depends on the shape of a head
// alone, so that a sample's result does not depend on its batch.
#pragma once

#include "approx.cuh"
#include "chained.cuh"
#include "matrix.cuh"
#include "vector.cuh"

#include <cmath>

namespace diffkern {

constexpr int kAttentionThreads = 128, kRowsOfTile = 16;

// [B, S, H, D], with the numbers of a head side by side; each head begins on 16 bytes.
struct Heads {
  const void* data;
  int64_t sample, token, head;  // strides

  template <class T>
  __device__ const T* at(int64_t b, int64_t h) const {
    return static_cast<const T*>(data) + b * sample + h * head;
  }
};

struct Attention {
  Heads q, k, v;
  void* out;  // [B, S, H, D], contiguous
  int heads, queries, keys, dim;
  float factor;         // of a product, above zero: exp2 of the result is a weight
  uint32_t signs;       // flips those of two queries in a word, for a scale below zero
};

// How a block of heads padded to D numbers lies in shared memory: its queries, then two buffers of keys, each followed
// by the values. A row is an odd number of 16 bytes long, so that eight rows lie in all banks.
template <int D, int kTiles>
struct AttentionRoom {
  static constexpr int kQueries = kTiles * kRowsOfTile * kAttentionThreads / 32;
  static constexpr int kKeys = D <= 64 ? 64 : 32;
  static constexpr int kRow = 2 * (D + 8);  // bytes
  static constexpr int kBlock = kKeys * kRow;
  static constexpr int kBytes = kQueries * kRow + 4 * kBlock;
  // Blocks that a multiprocessor must have registers for: as many as leave each what it needs.
  static constexpr int kAtOnce = kTiles == 1 && D <= 128 ? 3 : 2;
};

// Begins to copy kRows rows of a head, of which `rows` are there, to shared memory. The rest is zero, and so is what a
// row has beyond its `dim` numbers. A thread has one column of 16 bytes: few addresses to keep.
template <int D, int kRows, class T>
__device__ __forceinline__ void fetch(Shared to, const T* from, int64_t token, int rows, int dim) {
  constexpr int kColumns = D / 8, kAtOnce = kAttentionThreads / kColumns;
  const int first = threadIdx.x / kColumns, d = threadIdx.x % kColumns * 8;
  to += 2 * (first * (D + 8) + d);
  from += first * token + d;
#pragma unroll
  for (int row = 0; row < kRows; row += kAtOnce, from += kAtOnce * token) {
    if (first < (kRows - row < kAtOnce ? kRows - row : kAtOnce)) {
      const bool there = first + row < rows && d < dim;
      copy_wide(to + row * 2 * (D + 8), from, there);
    }
  }
}

// What a warp knows of its queries, kTiles times 16 of them: a lane of two rows of each 16.
template <class T, int D, int kTiles>
struct Queries {
  using Room = AttentionRoom<D, kTiles>;
  static constexpr int kKeys = Room::kKeys, kRow = Room::kRow;

  uint32_t q[kTiles][D / 16][4];
  float out[kTiles][D / 8][4], highest[kTiles][2], total[kTiles][2];

  // `first`: the first row of the warp. Its words stay in registers, with these signs flipped.
  __device__ __forceinline__ void begin(Shared first, uint32_t signs) {
    const int lane = threadIdx.x % 32, at = lane % 16 * kRow + lane / 16 * 16;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        load_matrices(q[t][step], first + at + (t * kRowsOfTile * kRow + step * 32));
#pragma unroll
        for (uint32_t& word : q[t][step]) {
          word ^= signs;
        }
      }
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          out[t][n][i] = 0;
        }
      }
      highest[t][0] = highest[t][1] = -INFINITY;
      total[t][0] = total[t][1] = 0;
    }
  }

  // Attends to kKeys keys, or if kLast to the `left` ones, fewer than kKeys, that remain.
  template <bool kLast>
  __device__ __forceinline__ void attend(Shared keys, int left, float factor) {
    float scores[kTiles][kKeys / 8][4] = {};
    score<kLast>(scores, keys, left);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        weigh(scores[t], t, r, factor);
      }
    }
    add<kLast>(scores, keys + Room::kBlock, left);
  }

  template <bool kLast>
  __device__ __forceinline__ void score(float (&scores)[kTiles][kKeys / 8][4], Shared keys, int left) const {
    const int lane = threadIdx.x % 32, at = (lane / 16 * 8 + lane % 8) * kRow + lane / 8 % 2 * 16;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; n += 2) {
        if (!kLast || n * 8 < left) {
          uint32_t k[4];
          load_matrices(k, keys + at + (n * 8 * kRow + step * 32));
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            multiply(scores[t][n], q[t][step], k, T{});
            multiply(scores[t][n + 1], q[t][step], k + 2, T{});
          }
        }
      }
    }
#pragma unroll
    for (int n = 0; kLast && n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (n * 8 + lane % 4 * 2 + i % 2 >= left) {
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            scores[t][n][i] = -INFINITY;
          }
        }
      }
    }
  }

  // The scores of row r of tile t become weights, under the highest score so far.
  __device__ __forceinline__ void weigh(float (&scores)[kKeys / 8][4], int t, int r, float factor) {
    float most = highest[t][r];
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      most = fmaxf(most, fmaxf(scores[n][2 * r], scores[n][2 * r + 1]));  // a NaN is passed over here, not below
    }
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 1));
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
    // If all scores are -inf their weights are zero, not NaN. The product is rounded, as the next decay's will be.
    const float shift = most == -INFINITY ? 0.0f : __fmul_rn(most, factor);
    const float decay = approx_exp2(__fmul_rn(highest[t][r], factor) - shift);
    highest[t][r] = most;
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 2 * r; i < 2 * r + 2; ++i) {
        scores[n][i] = approx_exp2(scores[n][i] * factor - shift);
        sum += scores[n][i];
      }
    }
    total[t][r] = total[t][r] * decay + sum;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      out[t][n][2 * r] *= decay;
      out[t][n][2 * r + 1] *= decay;
    }
  }

  // Adds the weighted values.
  template <bool kLast>
  __device__ __forceinline__ void add(const float (&weights)[kTiles][kKeys / 8][4], Shared values, int left) {
    const int lane = threadIdx.x % 32, at = lane % 16 * kRow + lane / 16 * 16;
#pragma unroll
    for (int n = 0; n < kKeys / 8; n += 2) {
      if (!kLast || n * 8 < left) {
        uint32_t w[kTiles][4];  // what the sum of scores left in a lane is what it is to give of the weights
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            w[t][i] = pack(weights[t][n + i / 2][i % 2 * 2], weights[t][n + i / 2][i % 2 * 2 + 1], T{});
          }
        }
#pragma unroll
        for (int d = 0; d < D / 8; d += 2) {
          uint32_t v[4];
          load_transposed(v, values + at + (n * 8 * kRow + d * 16));
#pragma unroll
          for (int t = 0; t < kTiles; ++t) {
            multiply(out[t][d], w[t], v, T{});
            multiply(out[t][d + 1], w[t], v + 2, T{});
          }
        }
      }
    }
  }

  // The results, to where the queries were.
  __device__ __forceinline__ void end(char* rows) const {
    const int lane = threadIdx.x % 32;
    __syncwarp();  // all have read theirs
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = total[t][r];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const float share = sum == 0 ? 0.0f : approx_reciprocal(sum);
        char* row = rows + (t * kRowsOfTile + r * 8 + lane / 4) * kRow + lane % 4 * 4;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          const uint32_t word = pack(out[t][n][2 * r] * share, out[t][n][2 * r + 1] * share, T{});
          *reinterpret_cast<uint32_t*>(row + n * 16) = word;
        }
      }
    }
    __syncwarp();
  }
};

// kTiles times 64 queries of one head a block.
template <class T, int D, int kTiles>
__global__ void __launch_bounds__(kAttentionThreads, AttentionRoom<D, kTiles>::kAtOnce) attention(Attention p) {
  using Room = AttentionRoom<D, kTiles>;
  constexpr int kKeys = Room::kKeys, kRow = Room::kRow, kOfWarp = kTiles * kRowsOfTile;
  const int blocks = (p.queries + Room::kQueries - 1) / Room::kQueries;
  const int first = blockIdx.x % blocks * Room::kQueries, rows = p.queries - first;
  const int head = blockIdx.x / blocks % p.heads, sample = blockIdx.x / blocks / p.heads;
  const T *k = p.k.at<T>(sample, head), *v = p.v.at<T>(sample, head);
  char* own = reinterpret_cast<char*>(dynamic_shared()) + threadIdx.x / 32 * kOfWarp * kRow;
  const Shared room = shared_of(dynamic_shared()), buffers = room + Room::kQueries * kRow;

  const auto buffer = [&](int start) { return buffers + start / kKeys % 2 * (2 * Room::kBlock); };
  const auto fetch_keys = [&](int start) {
    if (start < p.keys) {
      fetch<D, kKeys>(buffer(start), k + start * p.k.token, p.k.token, p.keys - start, p.dim);
      fetch<D, kKeys>(buffer(start) + Room::kBlock, v + start * p.v.token, p.v.token, p.keys - start, p.dim);
    }
    commit_copies();  // also of none, so that the last but one is always the one to wait for
  };
  const auto arrived = [&](int start) {
    wait_for_copies<1>();
    __syncthreads();
    return buffer(start);
  };
  fetch<D, Room::kQueries>(room, p.q.at<T>(sample, head) + first * p.q.token, p.q.token, rows, p.dim);
  fetch_keys(0);
  fetch_keys(kKeys);

  Queries<T, D, kTiles> queries;
  int start = 0;
  Shared keys = arrived(start);
  queries.begin(shared_of(own), p.signs);
  for (; start + kKeys <= p.keys; start += kKeys, keys = arrived(start)) {
    queries.template attend<false>(keys, kKeys, p.factor);
    __syncthreads();
    fetch_keys(start + 2 * kKeys);
  }
  if (start < p.keys) {
    queries.template attend<true>(keys, p.keys - start, p.factor);
  }

  queries.end(own);
  T* out = static_cast<T*>(p.out) + ((int64_t{sample} * p.queries + first) * p.heads + head) * p.dim;
  for (int i = threadIdx.x % 32; i < kOfWarp * (D / 8); i += 32) {
    const int row = i / (D / 8), d = i % (D / 8) * 8, of_block = threadIdx.x / 32 * kOfWarp + row;
    if (of_block < rows && d < p.dim) {
      uint32_t words[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        words[n] = reinterpret_cast<const uint32_t*>(own + row * kRow + d * 2)[n];
      }
      put(words, reinterpret_cast<uint4*>(out + int64_t{of_block} * p.heads * p.dim + d));
    }
  }
}

}  // namespace diffkern

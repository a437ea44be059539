// The noise of diffkern/ops/randn.py on a GPU. The integers are the reference's; the normals, by approximate functions,
// are within 1e-5 of its: a fifth of the instructions, which is what makes noise as fast as memory.
#pragma once

#include "../common/philox.h"
#include "approx.cuh"

namespace diffkern {

// The normals of one sample and draw, in blocks of 4: the keys of the third round, and what the first two make of those
// words of the counter that all blocks have in common. Once a stream, not once a block.
struct Stream {
  uint32_t key0, key1, mix0, mix1, mix2, word3;
};

// The seed and the id of a sample.
struct Key {
  uint64_t seed, id;
};

__device__ __forceinline__ Key key_of(const int64_t* keys, int64_t sample) {
  return {static_cast<uint64_t>(keys[2 * sample]), static_cast<uint64_t>(keys[2 * sample + 1])};
}

__device__ __forceinline__ Stream stream_of(const Key& key, int64_t draw) {
  const auto key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
  const uint32_t next0 = key0 + philox::kWeyl0, next1 = key1 + philox::kWeyl1;
  uint32_t high, low, high_next, low_next;
  philox::multiply(philox::kMultiplier1, static_cast<uint32_t>(key.id), high, low);
  philox::multiply(philox::kMultiplier0, high ^ static_cast<uint32_t>(draw) ^ key0, high_next, low_next);
  return {next0 + philox::kWeyl0, next1 + philox::kWeyl1, static_cast<uint32_t>(key.id >> 32) ^ key1, low ^ next0,
          high_next ^ next1, low_next};
}

// The random words of a block.
__device__ __forceinline__ philox::Words words_of(const Stream& s, uint32_t block) {
  uint32_t high0, low0, high1, low1;
  philox::multiply(philox::kMultiplier0, block, high0, low0);
  philox::multiply(philox::kMultiplier1, high0 ^ s.mix0, high1, low1);
  return philox::words(s.key0, s.key1, {{high1 ^ s.mix1, low1, low0 ^ s.mix2, s.word3}}, 2);
}

// Two normals from two words, cosine first. Operations are named where one could be fused with a neighbour's: the bits
// are the same in every kernel.
__device__ __forceinline__ void box_muller(uint32_t radius_word, uint32_t angle_word, float& first, float& second) {
  const float u = philox::uniform(radius_word), gap = 1.0f - u;
  // Near 1 the approximate logarithm has an absolute error only, which the root would blow up: a series there. Its last
  // factor, 2/3 and what makes up for the terms left out, keeps the error of the radius below 1e-7.
  const float series = gap * fmaf(gap, fmaf(gap, 0.6815f, 1.0f), 2.0f);
  const float radius = approx_sqrt(gap < 1.0f / 32 ? series : approx_log2(u) * -1.3862943611198906f);
  // 2 pi (v - 1/2), for the uniform v, at once: centred, because sine and cosine are accurate in [-pi, pi] only.
  const float angle = fmaf(static_cast<float>(angle_word), 0x1.921fb6p-30f, -0x1.921fb6p1f);
  first = __fmul_rn(radius, approx_cos(angle));
  second = __fmul_rn(radius, approx_sin(angle));
}

// The normals of the blocks from `block` on.
template <int N>
__device__ __forceinline__ void normals(const Stream& s, uint32_t block, float (&out)[N]) {
  static_assert(N % 4 == 0);
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const philox::Words words = words_of(s, block + i / 4);
    box_muller(words.w[0], words.w[1], out[i], out[i + 1]);
    box_muller(words.w[2], words.w[3], out[i + 2], out[i + 3]);
  }
}

}  // namespace diffkern

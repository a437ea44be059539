// The noise of diffkern/ops/randn.py on a GPU. The integers are the reference's; the normals, by approximate functions,
// are within 1e-5 of its: a fifth of the instructions, which is what makes noise as fast as memory.
#pragma once

#include "../common/philox.h"
#include "approx.cuh"

namespace diffkern {

// The normals of one sample and draw, in blocks of 4.
struct Stream {
  uint32_t key0, key1, draw, sample0, sample1;
};

__device__ __forceinline__ Stream stream_of(const int64_t* keys, int64_t sample, int64_t draw) {
  const auto seed = static_cast<uint64_t>(keys[2 * sample]), id = static_cast<uint64_t>(keys[2 * sample + 1]);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(draw),
          static_cast<uint32_t>(id), static_cast<uint32_t>(id >> 32)};
}

// Two normals from two words, cosine first. Operations are named where one could be fused with a neighbour's: the bits
// are the same in every kernel.
__device__ __forceinline__ void box_muller(uint32_t radius_word, uint32_t angle_word, float& first, float& second) {
  const float u = philox::uniform(radius_word), gap = 1.0f - u;
  // Near 1 the approximate logarithm has an absolute error only, which the root would blow up: a series there.
  const float series = gap * fmaf(gap, fmaf(gap, fmaf(gap, 0.5f, 2.0f / 3), 1.0f), 2.0f);
  const float radius = approx_sqrt(gap < 1.0f / 32 ? series : approx_log2(u) * -1.3862943611198906f);
  // 2 pi (v - 1/2), for the uniform v, at once: centred, because sine and cosine are accurate in [-pi, pi] only.
  const float angle = fmaf(static_cast<float>(angle_word), 0x1.921fb6p-30f, -0x1.921fb6p1f);
  first = __fmul_rn(radius, approx_cos(angle));
  second = __fmul_rn(radius, approx_sin(angle));
}

// The normals of the elements from `element`, a multiple of 4, on.
template <int N>
__device__ __forceinline__ void normals(const Stream& s, int64_t element, float (&out)[N]) {
  static_assert(N % 4 == 0);
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const auto block = static_cast<uint32_t>((element + i) >> 2);
    const philox::Words words = philox::words(s.key0, s.key1, {{block, s.draw, s.sample0, s.sample1}});
    box_muller(words.w[0], words.w[1], out[i], out[i + 1]);
    box_muller(words.w[2], words.w[3], out[i + 2], out[i + 3]);
  }
}

}  // namespace diffkern

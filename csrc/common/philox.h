// Philox4x32-10 (Salmon et al. 2011), for the CPU and for CUDA: four random words from a 64-bit key and a 128-bit
// counter.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DIFFKERN_HD __host__ __device__ __forceinline__
#else
#define DIFFKERN_HD inline
#endif

namespace diffkern::philox {

constexpr int kRounds = 10;
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;

struct Words {
  uint32_t w[4];
};

DIFFKERN_HD Words words(uint32_t key0, uint32_t key1, Words c) {
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = uint64_t{kMultiplier0} * c.w[0], p1 = uint64_t{kMultiplier1} * c.w[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.w[1] ^ key0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.w[3] ^ key1, static_cast<uint32_t>(p0)}};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return c;
}

// Uniform in (0, 1], by definition a float32: the scaling is exact, the sum rounds once.
DIFFKERN_HD float uniform(uint32_t word) { return static_cast<float>(word) * 0x1p-32f + 0x1p-33f; }

}  // namespace diffkern::philox

// Philox4x32-10 (Salmon et al. 2011), for the CPU and for CUDA: four random words from a 64-bit key and a 128-bit
// counter.
#pragma once

#include "host_device.h"

#include <cstdint>

namespace diffkern::philox {

constexpr int kRounds = 10;
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;

struct Words {
  uint32_t w[4];
};

// The 64-bit product of two words.
DIFFKERN_HD void multiply(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
#ifdef __CUDA_ARCH__  // nvcc 13 adds a zero to the high word of each product in the form below
  asm("{ .reg .b64 p; mul.wide.u32 p, %2, %3; mov.b64 {%0, %1}, p; }" : "=r"(low), "=r"(high) : "r"(a), "r"(b));
#else
  const uint64_t product = uint64_t{a} * b;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
#endif
}

// The random words of a counter; or of one after `done` rounds, with the keys of the next.
DIFFKERN_HD Words words(uint32_t key0, uint32_t key1, Words c, int done = 0) {
  for (int round = done; round < kRounds; ++round) {
    uint32_t high0, low0, high1, low1;
    multiply(kMultiplier0, c.w[0], high0, low0);
    multiply(kMultiplier1, c.w[2], high1, low1);
    c = {{high1 ^ c.w[1] ^ key0, low1, high0 ^ c.w[3] ^ key1, low0}};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return c;
}

// Uniform in (0, 1], by definition a float32: the scaling is exact, the sum rounds once.
DIFFKERN_HD float uniform(uint32_t word) { return static_cast<float>(word) * 0x1p-32f + 0x1p-33f; }

}  // namespace diffkern::philox

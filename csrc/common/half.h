// The dtypes in memory, for the CPU and for CUDA, and their conversion from and to the float32 in which every kernel
// computes. A GPU has instructions for it; elsewhere it is arithmetic on bits that vectorises.
#pragma once

#include "host_device.h"

#include <bit>
#include <cstdint>

namespace diffkern {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

DIFFKERN_HD float to_float(float x) { return x; }

DIFFKERN_HD float to_float(BFloat16 x) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(uint32_t{x.bits} << 16);
#else
  return std::bit_cast<float>(uint32_t{x.bits} << 16);
#endif
}

DIFFKERN_HD float to_float(Half x) {
#ifdef __CUDA_ARCH__
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(x.bits));
  return out;
#else
  const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13;
  // Scaling by 2^112 moves the exponent bias and makes subnormals normal; infinity and NaN keep a full exponent.
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t value = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
  return std::bit_cast<float>(value | uint32_t{x.bits & 0x8000u} << 16);
#endif
}

DIFFKERN_HD void from_float(float x, float& out) { out = x; }

DIFFKERN_HD void from_float(float x, BFloat16& out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  out.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
#endif
}

DIFFKERN_HD void from_float(float x, Half& out) {
#ifdef __CUDA_ARCH__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  // Adding 1/2 makes the FPU round at the place of half's last subnormal bit.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x47800000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  out.bits = static_cast<uint16_t>(result | (bits >> 16 & 0x8000u));
#endif
}

}  // namespace diffkern

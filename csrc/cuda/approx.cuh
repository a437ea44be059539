// The GPU's approximate functions: one instruction each, zero for subnormal numbers. The errors are those of the PTX
// manual. Elsewhere, in the tests, they are the exact ones.
#pragma once

#include "../common/host_device.h"

#include <cmath>

namespace diffkern {

#ifdef __CUDA_ARCH__
#define DIFFKERN_APPROXIMATE(instruction, exact)            \
  float out;                                                \
  asm(instruction ".approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x)); \
  return out
#else
#define DIFFKERN_APPROXIMATE(instruction, exact) return exact
#endif

// Absolute error 2^-22 for x in (1/2, 2), else relative.
DIFFKERN_HD float approx_log2(float x) { DIFFKERN_APPROXIMATE("lg2", std::log2(x)); }

// Relative error 2^-22.
DIFFKERN_HD float approx_exp2(float x) { DIFFKERN_APPROXIMATE("ex2", std::exp2(x)); }

// Absolute error 2^-20.5 for x in [-pi, pi].
DIFFKERN_HD float approx_sin(float x) { DIFFKERN_APPROXIMATE("sin", std::sin(x)); }
DIFFKERN_HD float approx_cos(float x) { DIFFKERN_APPROXIMATE("cos", std::cos(x)); }

// Relative errors 2^-23 and about 2^-22.9.
DIFFKERN_HD float approx_sqrt(float x) { DIFFKERN_APPROXIMATE("sqrt", std::sqrt(x)); }
DIFFKERN_HD float approx_reciprocal_sqrt(float x) { DIFFKERN_APPROXIMATE("rsqrt", 1.0f / std::sqrt(x)); }

// Relative error 2^-23.
DIFFKERN_HD float approx_reciprocal(float x) { DIFFKERN_APPROXIMATE("rcp", 1.0f / x); }

#undef DIFFKERN_APPROXIMATE

}  // namespace diffkern

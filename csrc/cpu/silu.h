// x / (1 + e^-x) of two registers of numbers, as exact as the dtype that they are rounded to needs it.
#pragma once

#include "../common/math.h"
#include "blocks.h"

namespace diffkern {

#ifdef __AVX512F__
template <class T>
inline constexpr bool kRoughSilu = std::is_same_v<T, BFloat16>;
#else
template <class T>
inline constexpr bool kRoughSilu = false;
#endif

constexpr float kSiluUnit = -kLog2eHigh;

#ifdef __AVX512F__
// Of x = t / kSiluUnit, a unit that costs nothing in a product before. With L for log2(e) that is t / (-L - L 2^t): the
// polynomial, for the fraction of t, has the factor -L in it. Fit: 7.5e-5, and 6.1e-5 is the error of the reciprocal:
// together at most a twenty-eighth of the last place of bfloat16. An x above 2.3e38 counts as infinite.
[[gnu::always_inline]] inline Vector rough_silu(Vector t) {
  const Vector fraction = (Vector)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEG_INF);
  Vector p = fraction * -0.11256559f - 0.32614596f;
  p = p * fraction - 1.0038756f;
  p = p * fraction - 1.44258715f;
  const Vector power = (Vector)_mm512_scalef_ps((__m512)p, (__m512)t);  // by the whole part of t
  return t * (Vector)_mm512_rcp14_ps((__m512)(power + kSiluUnit));
}

// Beyond 104 a power is zero or infinite; the quotient keeps NaN and infinity.
[[gnu::always_inline]] inline Vector exact_silu(Vector x) {
  const __m512 unit = _mm512_set1_ps(kSiluUnit);
  const __m512 near = _mm512_range_ps((__m512)x, _mm512_set1_ps(104.0f), 2);  // the smaller in magnitude
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(near, unit), _MM_FROUND_TO_NEAREST_INT);
  const Vector f = (Vector)_mm512_fmsub_ps(near, unit, whole) - (Vector)near * kLog2eRest;  // the product not rounded
  const Vector p = power_of_two_rise(f) * f + 1.0f;
  return x / ((Vector)_mm512_scalef_ps((__m512)p, whole) + 1.0f);
}
#endif

// Of x, or of t for rough_silu.
template <class T>
[[gnu::always_inline]] inline Block silu(Block x) {
#ifdef __AVX512F__
  if constexpr (kRoughSilu<T>) {
    return {rough_silu(x.a), rough_silu(x.b)};
  }
  return {exact_silu(x.a), exact_silu(x.b)};
#else
  alignas(64) float numbers[kBlock];
  vector(numbers) = x.a, vector(numbers + kLanes) = x.b;
  for (int64_t i = 0; i < kBlock; ++i) {
    numbers[i] = fast_silu(numbers[i]);
  }
  return {vector(numbers), vector(numbers + kLanes)};
#endif
}

}  // namespace diffkern

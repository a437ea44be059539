// A tensor's dtype as a type, and rows of numbers from and to the float32 in which every kernel computes.
#pragma once

#include "check.h"
#include "half.h"

#include <type_traits>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace diffkern {

// Calls f with a null pointer of the type that stands for `dtype` in memory.
template <class F>
void with_dtype(const char* op, ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::Half:
      return f(static_cast<Half*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    default:
      check(false, op, ": takes float32, float16 and bfloat16");
  }
}

template <class T>
void widen(const T* in, float* out, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__  // half's own instructions are several times faster than the bit arithmetic
  if constexpr (std::is_same_v<T, Half>) {
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
    }
  }
#endif
  for (; i < n; ++i) {
    out[i] = to_float(in[i]);
  }
}

#ifdef __AVX512BF16__
// Takes the numbers in registers, so that they need not be in memory for a call that is hardly ever made.
[[gnu::noinline, gnu::cold]] inline void narrow_by_bits(__m512 in, BFloat16* out) {
  for (int i = 0; i < 16; ++i) {
    from_float(in[i], out[i]);
  }
}

// 32 numbers, by the instruction for it. That takes numbers below 2^-126 for zero: where there is one, by their bits.
[[gnu::always_inline]] inline void narrow_32(const float* in, BFloat16* out) {
  constexpr int kSubnormal = 0x20;
  const __m512 low = _mm512_loadu_ps(in), high = _mm512_loadu_ps(in + 16);
  if ((_mm512_fpclass_ps_mask(low, kSubnormal) | _mm512_fpclass_ps_mask(high, kSubnormal)) != 0) [[unlikely]] {
    narrow_by_bits(low, out);
    return narrow_by_bits(high, out + 16);
  }
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}
#endif

// Always inline: called for a few numbers at a time, it takes them from registers.
template <class T>
[[gnu::always_inline]] inline void narrow(const float* in, T* out, int64_t n) {
#ifdef __AVX512BF16__
  if constexpr (std::is_same_v<T, BFloat16>) {
    for (; n >= 32; n -= 32, in += 32, out += 32) {
      narrow_32(in, out);
    }
  }
#endif
#ifdef __F16C__
  if constexpr (std::is_same_v<T, Half>) {
    for (; n >= 8; n -= 8, in += 8, out += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), half);
    }
  }
#endif
  for (int64_t i = 0; i < n; ++i) {
    from_float(in[i], out[i]);
  }
}

// n values as float32: where they are if that is what they are, else converted into `buffer`.
inline const float* as_float(const float* in, float*, int64_t) { return in; }

template <class T>
const float* as_float(const T* in, float* buffer, int64_t n) {
  widen(in, buffer, n);
  return buffer;
}

// Where to compute n float32 results for `out`: in place, or in `buffer`; `put` then brings them to `out`.
inline float* place(float* out, float*) { return out; }
template <class T>
float* place(T*, float* buffer) {
  return buffer;
}
inline void put(const float*, float*, int64_t) {}
template <class T>
void put(const float* from, T* out, int64_t n) {
  narrow(from, out, n);
}

}  // namespace diffkern

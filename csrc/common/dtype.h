// The dtypes in memory, and their conversion from and to the float32 in which every kernel computes.
#pragma once

#include "check.h"

#include <bit>
#include <cstring>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace diffkern {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

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

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

inline float to_float(Half x) {
  const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13;
  // Scaling by 2^112 moves the exponent bias and makes subnormals normal; infinity and NaN keep a full exponent.
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t value = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
  return std::bit_cast<float>(value | uint32_t{x.bits & 0x8000u} << 16);
}

inline void from_float(float x, float& out) { out = x; }

inline void from_float(float x, BFloat16& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
  out.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

inline void from_float(float x, Half& out) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13;
  // Adding 1/2 makes the FPU round at the place of half's last subnormal bit.
  const uint32_t subnormal = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x47800000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  out.bits = static_cast<uint16_t>(result | (bits >> 16 & 0x8000u));
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

template <class T>
void narrow(const float* in, T* out, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  if constexpr (std::is_same_v<T, Half>) {
    for (; i + 8 <= n; i += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
    }
  }
#endif
  for (; i < n; ++i) {
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

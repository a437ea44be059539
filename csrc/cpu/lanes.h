// A vector of neighbouring numbers of any dtype, of which the first n > 0 count, from memory and to it.
#pragma once

#include "../common/dtype.h"
#include "vector.h"

#include <algorithm>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace diffkern {

typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t)), may_alias));

// Numbers rounded to bfloat16, in the upper halves of their words; what the lower ones hold does not count.
inline Bits rounded(Vector x) {
  const Bits bits = (Bits)x;
  return x != x ? Bits{} + 0x7fc00000u : bits + 0x7fffu + (bits >> 16 & 1);
}

#ifdef __AVX512F__

inline __mmask16 lanes(int64_t n) { return n < kLanes ? (1u << n) - 1 : 0xffff; }

// The others are zero.
inline Vector load_lanes(const float* in, int64_t n) { return _mm512_maskz_loadu_ps(lanes(n), in); }

inline Vector load_lanes(const Half* in, int64_t n) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), in)); }

inline Vector load_lanes(const BFloat16* in, int64_t n) {
  return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(n), in)), 16);
}

inline void store_lanes(Vector x, float* out, int64_t n) { _mm512_mask_storeu_ps(out, lanes(n), x); }

inline void store_lanes(Vector x, Half* out, int64_t n) {
  _mm256_mask_storeu_epi16(out, lanes(n), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline void store_by_bits(Vector x, BFloat16* out, int64_t n) {
  _mm256_mask_storeu_epi16(out, lanes(n), _mm512_cvtepi32_epi16((__m512i)(rounded(x) >> 16)));
}

inline void store_lanes(Vector x, BFloat16* out, int64_t n) {
#ifdef __AVX512BF16__
  constexpr int kSubnormal = 0x20;  // which the instruction takes for zero
  if (_mm512_fpclass_ps_mask(x, kSubnormal) == 0) [[likely]] {
    return _mm256_mask_storeu_epi16(out, lanes(n), (__m256i)_mm512_cvtneps_pbh(x));
  }
#endif
  store_by_bits(x, out, n);
}

#else

template <class T>
Vector load_lanes(const T* in, int64_t n) {
  Vector x = {};
  auto* lanes = reinterpret_cast<float*>(&x);
  n < kLanes ? widen(in, lanes, n) : widen(in, lanes, kLanes);  // of a number that the compiler knows: in registers
  return x;
}

template <class T>
void store_lanes(Vector x, T* out, int64_t n) {
  const auto* lanes = reinterpret_cast<const float*>(&x);
  n < kLanes ? narrow(lanes, out, n) : narrow(lanes, out, kLanes);
}

#ifdef __AVX2__
// Of bfloat16 the compiler takes them through memory.
inline Vector load_lanes(const BFloat16* in, int64_t n) {
  BFloat16 some[kLanes] = {};
  if (n < kLanes) {
    std::copy_n(in, n, some);
    in = some;
  }
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
  return (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
}

inline void store_lanes(Vector x, BFloat16* out, int64_t n) {
  const auto high = (__m256i)(rounded(x) >> 16);
  const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  if (n >= kLanes) [[likely]] {
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(out), halves);
  }
  BFloat16 some[kLanes];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(some), halves);
  std::copy_n(some, n, out);
}
#endif

#endif

}  // namespace diffkern

// A vector of neighbouring numbers of any dtype, of which the first n > 0 count, from memory and to it.
#pragma once

#include "../common/dtype.h"
#include "vector.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace diffkern {

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
  const auto bits = (__m512i)x;
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even);
  const __mmask16 unordered = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(rounded, unordered, _mm512_set1_epi32(0x7fc00000));
  _mm256_mask_storeu_epi16(out, lanes(n), _mm512_cvtepi32_epi16(_mm512_srli_epi32(result, 16)));
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

#endif

}  // namespace diffkern

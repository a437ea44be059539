// The words of 32 bits that attention multiplies: float32 numbers or, in bfloat16 where the machine has AVX512_BF16,
// pairs of them, whose two products one instruction adds to a sum in float32: twice the rate.
#pragma once

#include "lanes.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace diffkern {

// Any dtype, as float32.
template <class T>
struct Singles {
  using Word = float;
  static constexpr int64_t kNumbers = 1;  // in a word
  static constexpr int kDegree = 6;       // of the polynomial that a weight is worth

  // A vector of words of n numbers that are neighbours, n > 0, or of as many as it holds; the others are zero.
  static Vector row(const T* in, int64_t n) { return load_lanes(in, n); }

  // The same of kNumbers rows, a number of each in a word.
  static Vector zip(const T* first, const T*, int64_t n) { return load_lanes(first, n); }

  // Rows of any length, to memory.
  static void row(const T* in, Word* out, int64_t n) { widen(in, out, n); }
  static void zip(const T* first, const T*, Word* out, int64_t n) { widen(first, out, n); }

  static Vector negative(Vector words) { return -words; }

  // kNumbers vectors of weights to one of words; added to `total` as they will be multiplied, rounded or not, so that
  // rounding cannot move the mean of the values.
  static Vector join(const Vector* weights, Vector& total) {
    total += weights[0];
    return weights[0];
  }
};

#ifdef __AVX512BF16__

struct __attribute__((may_alias)) Pair {
  uint32_t bits;  // the first number in the low half
};

// Numbers and sums below 2^-126 count as zero here, whatever the mode of the thread: no attention depends on them.
inline void add_product(Vector& sum, Pair left, Vector right) {
  sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(left.bits)), (__m512bh)right);
}

struct Pairs {
  using Word = Pair;
  static constexpr int64_t kNumbers = 2;
  static constexpr int kDegree = 3;

  static Vector row(const BFloat16* in, int64_t n) {
    return (Vector)_mm512_maskz_loadu_epi16(n < 32 ? (1u << n) - 1 : ~0u, in);
  }

  // Where there is no second row, its numbers are zero.
  static Vector zip(const BFloat16* first, const BFloat16* second, int64_t n) {
    const __m512i low = (__m512i)load_lanes(first, n), high = second ? (__m512i)load_lanes(second, n) : __m512i{};
    return (Vector)_mm512_or_si512(_mm512_srli_epi32(low, 16), high);
  }

  static void row(const BFloat16* in, Word* out, int64_t n) {
    if (n % 2 != 0) {
      out[n / 2] = {in[n - 1].bits};
    }
    std::memcpy(out, in, n / 2 * sizeof(Word));
  }

  static void zip(const BFloat16* first, const BFloat16* second, Word* out, int64_t n) {
    if (second == nullptr) {
      std::transform(first, first + n, out, [](BFloat16 a) { return Word{a.bits}; });
      return;
    }
    for (int64_t i = 0; i < n; ++i) {
      out[i].bits = first[i].bits | uint32_t{second[i].bits} << 16;
    }
  }

  static Vector negative(Vector words) {
    return (Vector)_mm512_xor_si512((__m512i)words, _mm512_set1_epi32(0x80008000));
  }

  static Vector join(const Vector* weights, Vector& total) {
    typedef int16_t Numbers __attribute__((vector_size(64)));
    const Numbers order = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const auto numbers = (__m512i)_mm512_cvtne2ps_pbh(weights[1], weights[0]);
    const auto words = (Vector)_mm512_permutexvar_epi16((__m512i)order, numbers);
    add_product(total, Pair{0x3f803f80}, words);  // twice one
    return words;
  }
};

template <class T>
using Words = std::conditional_t<std::is_same_v<T, BFloat16>, Pairs, Singles<T>>;

#else

template <class T>
using Words = Singles<T>;

#endif

template <class W>
int64_t words_of(int64_t numbers) {
  return (numbers + W::kNumbers - 1) / W::kNumbers;
}

}  // namespace diffkern

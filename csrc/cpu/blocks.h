// Rows in the cache, two registers of numbers at a time: what is summed over one, and what is made of it. The numbers of
// a block lie in an order of their dtype's, and so do the parameters beside them: of bfloat16 every second one is in the
// first register, as pairs of them are widened by a shift and a mask.
#pragma once

#include "lanes.h"
#include "rows.h"
#include "vector.h"

#include <array>

namespace diffkern {

constexpr int64_t kBlock = 2 * kLanes;

struct Block {
  Vector a, b;
};

inline Block operator+(Block x, Block y) { return {x.a + y.a, x.b + y.b}; }
inline Block operator*(Block x, Block y) { return {x.a * y.a, x.b * y.b}; }
inline Block operator-(Block x, Block y) { return {x.a - y.a, x.b - y.b}; }
inline Block operator-(Block x, float y) { return {x.a - y, x.b - y}; }
inline Block operator*(Block x, float y) { return {x.a * y, x.b * y}; }

typedef uint32_t LooseBits __attribute__((vector_size(kLanes * sizeof(uint32_t)), may_alias, aligned(2)));

// Which number of a block each place of its two registers holds.
template <class T>
inline constexpr auto kOrder = [] {
  std::array<uint32_t, kBlock> order{};
  for (uint32_t i = 0; i < kBlock; ++i) {
    order[i] = std::is_same_v<T, BFloat16> ? i % kLanes * 2 + i / kLanes : i;
  }
  return order;
}();

inline Block read(const float* in) {
  // Not auto, which would forget that they may be unaligned.
  const LooseVector* vectors = reinterpret_cast<const LooseVector*>(in);
  return {vectors[0], vectors[1]};
}

inline Block read(const BFloat16* in) {
  const Bits pairs = *reinterpret_cast<const LooseBits*>(in);
  return {(Vector)(pairs << 16), (Vector)(pairs & 0xffff0000u)};
}

inline Block read(const Half* in) {
#ifdef __AVX512F__
  const __m256i_u* halves = reinterpret_cast<const __m256i_u*>(in);
  return {(Vector)_mm512_cvtph_ps(halves[0]), (Vector)_mm512_cvtph_ps(halves[1])};
#else
  alignas(64) float numbers[kBlock];
  widen(in, numbers, kBlock);
  return {vector(numbers), vector(numbers + kLanes)};
#endif
}

inline void write(Block x, float* out) {
  LooseVector* vectors = reinterpret_cast<LooseVector*>(out);
  vectors[0] = x.a, vectors[1] = x.b;
}

inline void write_by_bits(Block x, BFloat16* out) {
  *reinterpret_cast<LooseBits*>(out) = rounded(x.a) >> 16 | (rounded(x.b) & 0xffff0000u);
}

#ifdef __AVX512BF16__
// Of a block that has a zero. That may have been a number below 2^-126, which the instruction takes for zero.
[[gnu::noinline, gnu::cold]] inline void write_with_zeros(Vector a, Vector b, BFloat16* out) {
  write_by_bits({a, b}, out);
}
#endif

inline void write(Block x, BFloat16* out) {
#ifdef __AVX512BF16__
  typedef int16_t Numbers __attribute__((vector_size(64)));
  const Numbers order = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto numbers = (__m512i)_mm512_cvtne2ps_pbh((__m512)x.b, (__m512)x.a);
  if (_mm512_testn_epi16_mask(numbers, _mm512_set1_epi16(0x7fff)) != 0) [[unlikely]] {
    return write_with_zeros(x.a, x.b, out);
  }
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16((__m512i)order, numbers));
#else
  write_by_bits(x, out);
#endif
}

inline void write(Block x, Half* out) {
#ifdef __AVX512F__
  __m256i_u* halves = reinterpret_cast<__m256i_u*>(out);
  halves[0] = _mm512_cvtps_ph((__m512)x.a, _MM_FROUND_TO_NEAREST_INT);
  halves[1] = _mm512_cvtps_ph((__m512)x.b, _MM_FROUND_TO_NEAREST_INT);
#else
  alignas(64) float numbers[kBlock];
  vector(numbers) = x.a, vector(numbers + kLanes) = x.b;
  narrow(numbers, out, kBlock);
#endif
}

// The first n numbers of a block, zeros behind them.
template <class T>
Block first(Block x, int64_t n) {
  const LooseBits* order = reinterpret_cast<const LooseBits*>(kOrder<T>.data());
  const auto end = static_cast<uint32_t>(n);
  return {(Vector)((Bits)x.a & (Bits)(order[0] < end)), (Vector)((Bits)x.b & (Bits)(order[1] < end))};
}

template <class T>
Block read(const T* in, int64_t n) {
  T some[kBlock] = {};
  std::copy_n(in, n, some);
  return read(some);
}

template <class T>
void write(Block x, T* out, int64_t n) {
  T some[kBlock];
  write(x, some);
  std::copy_n(some, n, out);
}

inline int64_t in_blocks(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

// A row in memory, and one that was computed: whole blocks of float32 in the order of T's.
template <class T>
struct Row {
  using Number = T;
  const T* in;

  Block whole(int64_t at) const { return read(in + at); }
  Block part(int64_t at, int64_t n) const { return read(in + at, n); }
};

template <class T>
struct Computed {
  using Number = T;
  const float* blocks;

  Block whole(int64_t at) const { return {vector(blocks + at), vector(blocks + at + kLanes)}; }
  Block part(int64_t at, int64_t) const { return whole(at); }
};

// Parameters [rows, n], such as a scale or one a sample, as blocks of T's.
template <class T>
class Arranged {
 public:
  Arranged(const std::vector<float>& values, int64_t n)
      : width_(in_blocks(n)), room_(n ? static_cast<int64_t>(values.size()) / n * width_ : 0),
        blocks_(room_.take(0)) {
    float* to = blocks_;
    for (auto from = values.begin(); from != values.end(); from += n) {
      for (int64_t at = 0; at < n; at += kBlock, to += kBlock) {
        float numbers[kBlock] = {};
        std::copy_n(from + at, std::min(kBlock, n - at), numbers);
        for (int64_t i = 0; i < kBlock; ++i) {
          to[i] = numbers[kOrder<T>[i]];
        }
      }
    }
  }

  Computed<T> row(int64_t r) const { return {blocks_ + r * width_}; }

 private:
  int64_t width_;
  Room room_;
  float* blocks_;
};

// How many rows are summed before results of the first are made: while one's sum is folded and its root is taken, the
// next one's numbers are added. As long as all that is read and written of them stays in the nearest cache.
constexpr int64_t kTogether = 4;
inline int64_t rows_together(int64_t bytes_of_a_row) {
  constexpr int64_t kNear = 20 << 10;  // of 32 KB
  return kTogether * bytes_of_a_row <= kNear ? kTogether : 1;
}

inline float folded(Block x) {
  const Vector sums = x.a + x.b;
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)sums);
#else
  float sum[kLanes];
  std::memcpy(sum, &sums, sizeof sums);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) {
      sum[j] += sum[j + half];
    }
  }
  return sum[0];
#endif
}

// f of each block, summed: blocks in turn to two sums, which hide the latency of an addition.
template <class Source, class F>
float sum_of_blocks(Source row, int64_t n, F f) {
  using T = typename Source::Number;
  Block even{}, odd{};
  int64_t at = 0;
  for (; at + 2 * kBlock <= n; at += 2 * kBlock) {
    even = even + f(row.whole(at));
    odd = odd + f(row.whole(at + kBlock));
  }
  if (at + kBlock <= n) {
    even = even + f(row.whole(at));
    at += kBlock;
  }
  if (at < n) {
    odd = odd + first<T>(f(row.part(at, n - at)), n - at);
  }
  return folded(even + odd);
}

// The sum of a row's squares.
template <class Source>
float squares(Source row, int64_t n) {
  return sum_of_blocks(row, n, [](Block x) { return x * x; });
}

template <class Source>
Moments moments(Source row, int64_t n) {
  const float mean = sum_of_blocks(row, n, [](Block x) { return x; }) / static_cast<float>(n);
  return {mean, sum_of_blocks(row, n, [mean](Block x) { return (x - mean) * (x - mean); })};
}

#ifdef __AVX512BF16__
struct Totals {
  float sum, squares;
};

// Of bfloat16 one instruction adds two products to a sum in float32. It takes numbers below 2^-126 for zero.
[[gnu::always_inline]] inline Totals totals(const BFloat16* row, int64_t n) {
  __m512 sums[4] = {}, squares[4] = {};
  const auto add = [&](int j, const BFloat16* in) {
    const auto pairs = (__m512bh)_mm512_loadu_si512(in), ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    sums[j] = _mm512_dpbf16_ps(sums[j], pairs, ones);
    squares[j] = _mm512_dpbf16_ps(squares[j], pairs, pairs);
  };
  int64_t at = 0;
  for (; at + 4 * kBlock <= n; at += 4 * kBlock) {
    for (int j = 0; j < 4; ++j) {
      add(j, row + at + j * kBlock);
    }
  }
  for (int j = 0; at + kBlock <= n; at += kBlock, ++j) {
    add(j, row + at);
  }
  if (at < n) {
    BFloat16 some[kBlock] = {};
    std::copy_n(row + at, n - at, some);
    add(3, some);
  }
  const auto all = [](const __m512* t) { return folded({(Vector)(t[0] + t[2]), (Vector)(t[1] + t[3])}); };
  return {all(sums), all(squares)};
}

constexpr float kSmall = 0x1p-90f;  // a sum of squares that those below 2^-126 could matter to

inline float squares(Row<BFloat16> row, int64_t n) {
  const float sum = totals(row.in, n).squares;
  return sum > kSmall ? sum : squares<Row<BFloat16>>(row, n);
}

// In one pass, unless more than six bits of the squares belong to the mean: of the 24 that leaves twice what the result
// has. A row's own numbers decide, so that it comes out the same in every batch.
inline Moments moments(Row<BFloat16> row, int64_t n) {
  const Totals t = totals(row.in, n);
  const float mean = t.sum / static_cast<float>(n);
  const auto about_mean = static_cast<float>(t.squares - double{t.sum} * t.sum / static_cast<double>(n));
  const bool enough = t.squares > kSmall && about_mean > 0x1p-6f * t.squares;
  return enough ? Moments{mean, about_mean} : moments<Row<BFloat16>>(row, n);
}
#endif

// out = f(block, where it begins, how many of its numbers are the row's).
template <class Source, class T, class F>
void emit_blocks(Source row, T* out, int64_t n, F f) {
  int64_t at = 0;
  for (; at + kBlock <= n; at += kBlock) {
    write(f(row.whole(at), at, kBlock), out + at);
  }
  if (at < n) {
    write(f(row.part(at, n - at), at, n - at), out + at, n - at);
  }
}

}  // namespace diffkern

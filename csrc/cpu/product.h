// A product that keeps its sums in registers: rows of words, each broadcast, times a panel of the widest vectors; and
// the transpose that brings rows into the lanes of such vectors. What a word is says words.h.
#pragma once

#include "vector.h"

namespace diffkern {

constexpr int kVectors = kRegisters / 8;  // that a panel has at most

// The lanes of a (0 to kLanes - 1) and b (from kLanes on) that are asked for.
template <int64_t... kWhich>
Vector pick(Vector a, Vector b, std::integer_sequence<int64_t, kWhich...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kWhich...);
#else
  typedef int32_t Lanes __attribute__((vector_size(sizeof(Vector))));
  return __builtin_shuffle(a, b, Lanes{kWhich...});
#endif
}

// Transposes a square of kLanes vectors: each round exchanges one bit of the row with that bit of the lane.
template <int64_t kBit = kLanes / 2, int64_t... kLane>
[[gnu::always_inline]] inline void transpose(Vector* x, std::integer_sequence<int64_t, kLane...> lanes) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) {
    if ((i & kBit) == 0) {
      const Vector a = x[i], b = x[i + kBit];
      x[i] = pick(a, b, std::integer_sequence<int64_t, (kLane & kBit ? kLane + kLanes - kBit : kLane)...>());
      x[i + kBit] = pick(a, b, std::integer_sequence<int64_t, (kLane & kBit ? kLane + kLanes : kLane + kBit)...>());
    }
  }
  if constexpr (kBit > 1) {
    transpose<kBit / 2>(x, lanes);
  }
}

// A square of kLanes vectors, transposed: in(i) gives the i-th row, out(i, x) takes the i-th column. Inline: a call
// would take the square through memory.
template <class In, class Out>
[[gnu::always_inline]] inline void transpose(In in, Out out) {
  Vector x[kLanes];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) {
    x[i] = in(i);
  }
  transpose(x, std::make_integer_sequence<int64_t, kLanes>());
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) {
    out(i, x[i]);
  }
}

// The product of a word of one float32; words.h has that of others.
inline void add_product(Vector& sum, float left, const Vector& right) { sum += left * right; }

// R rows of a product: sum over i < n of left[r * row + i * step] * panel[i]. A row of the panel has V vectors, and so has
// one of `out`: store(to, sum, v) puts a sum into the v-th of them.
template <int V, int R, class Word, class Store>
void rows(const Word* left, int64_t row, int64_t step, const Vector* panel, int64_t n, Store store, Vector* out) {
  Vector sum[R][V] = {};
  for (int64_t i = 0; i < n; ++i, left += step, panel += V) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Word word = left[r * row];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        add_product(sum[r][v], word, panel[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      store(out[r * V + v], sum[r][v], v);
    }
  }
}

// All `count` rows: as many at a time as registers hold, then what is left in powers of two.
template <int V, int R = V == 1 ? kRegisters / 2 : kRegisters * 3 / 4 / V, class Word, class Store>
void product(int64_t count, const Word* left, int64_t row, int64_t step, const Vector* panel, int64_t n, Store store,
             Vector* out) {
  int64_t r = 0;
  for (; r + R <= count; r += R) {
    rows<V, R>(left + r * row, row, step, panel, n, store, out + r * V);
  }
  if constexpr (R > 1) {
    if (r < count) {
      constexpr int kFewer = R > 8 ? 8 : R > 4 ? 4 : R / 2;
      product<V, kFewer>(count - r, left + r * row, row, step, panel, n, store, out + r * V);
    }
  }
}

// f.operator()<V>() with the vectors of a panel.
template <class F>
void with_vectors(int64_t width, F f) {
  if constexpr (kVectors > 2) {
    if (width == 4 * kLanes) {
      return f.template operator()<4>();
    }
  }
  width == 2 * kLanes ? f.template operator()<2>() : f.template operator()<1>();
}

}  // namespace diffkern

// A product that keeps its sums in registers: rows of numbers, each broadcast, times a panel of the widest vectors; and
// the transpose that brings rows into the lanes of such vectors.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace diffkern {

#ifdef __AVX512F__
constexpr int64_t kLanes = 16, kRegisters = 32;
#else
constexpr int64_t kLanes = 8, kRegisters = 16;
#endif
constexpr int kVectors = kRegisters / 8;  // that a panel has at most

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), may_alias));

inline Vector& vector(float* aligned) { return *reinterpret_cast<Vector*>(aligned); }

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
void transpose(Vector* x, std::integer_sequence<int64_t, kLane...> lanes) {
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

// A square of kLanes rows, `step` apart, to `out_step` apart and transposed, times a vector of factors before that.
inline void transpose(float* in, int64_t step, float* out, int64_t out_step, Vector factor) {
  Vector x[kLanes];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) {
    x[i] = vector(in + i * step) * factor;
  }
  transpose(x, std::make_integer_sequence<int64_t, kLanes>());
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) {
    vector(out + i * out_step) = x[i];
  }
}

// Memory of one thread, handed out in whole cache lines.
class Room {
 public:
  explicit Room(int64_t floats) : memory_(floats + 16) {
    next_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) & ~uintptr_t{63});
  }

  float* take(int64_t floats) { return std::exchange(next_, next_ + (floats + 15) / 16 * 16); }

 private:
  std::vector<float> memory_;
  float* next_;
};

// R rows of a product: sum over i < n of left[r * row + i * step] * panel[i]. A panel has V vectors. With `decay` (one
// panel) the product is added to what is in out times it.
template <int V, int R>
void rows(const float* left, int64_t row, int64_t step, const Vector* panel, int64_t n, const Vector* decay,
          Vector* out) {
  Vector sum[R][V] = {};
  for (int64_t i = 0; i < n; ++i, left += step, panel += V) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float scalar = left[r * row];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        sum[r][v] += scalar * panel[v];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vector& to = out[r * V + v];
      to = decay ? to * decay[v] + sum[r][v] : sum[r][v];
    }
  }
}

// All `count` rows: as many at a time as registers hold, then what is left in powers of two.
template <int V, int R = V == 1 ? kRegisters / 2 : kRegisters * 3 / 4 / V>
void product(int64_t count, const float* left, int64_t row, int64_t step, const Vector* panel, int64_t n,
             const Vector* decay, Vector* out) {
  int64_t r = 0;
  for (; r + R <= count; r += R) {
    rows<V, R>(left + r * row, row, step, panel, n, decay, out + r * V);
  }
  if constexpr (R > 1) {
    if (r < count) {
      constexpr int kFewer = R > 8 ? 8 : R > 4 ? 4 : R / 2;
      product<V, kFewer>(count - r, left + r * row, row, step, panel, n, decay, out + r * V);
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

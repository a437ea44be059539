// Rows that lie in the cache: loops over many of them, the sums and moments of one, and their parameters.
#pragma once

#include "dense.h"

#include <cmath>
#include <optional>

namespace diffkern {

// f(begin, end) over [0, n), in parallel where that is worth it and this is not already one of several threads.
template <class F>
void in_parallel(int64_t n, int64_t elements_each, F f) {
  const int64_t grain = std::max<int64_t>(1, kSerial / std::max<int64_t>(1, elements_each));
  if (n <= grain) {
    return f(0, n);
  }
  torch::stable::parallel_for(0, n, grain, f);
}

// f(0) + ... + f(n - 1), as many sums side by side as hide the latency of an addition, then folded in pairs.
template <class F>
float sum_of(int64_t n, F f) {
  constexpr int kSums = 64;  // four of the widest registers
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
    // In quarters: one loop over all of them the compiler interleaves with the next one's, and reads memory out of order.
    for (int first = 0; first < kSums; first += kSums / 4) {
      for (int j = first; j < first + kSums / 4; ++j) {
        sums[j] += f(i + j);
      }
    }
  }
  for (int j = 0; i < n; ++i, ++j) {
    sums[j] += f(i);
  }
  for (int half = kSums / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) {
      sums[j] += sums[j + half];
    }
  }
  return sums[0];
}

// out[i] = f(i), rounded on the way, some at a time, which so never leave the registers or the nearest cache.
template <class T, class F>
void emit(T* out, int64_t n, F f) {
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = f(i);
    }
  } else {
    constexpr int64_t kSome = 64;
    int64_t at = 0;
    for (; at + kSome <= n; at += kSome) {
      float some[kSome];
      for (int64_t i = 0; i < kSome; ++i) {
        some[i] = f(at + i);
      }
      narrow(some, out + at, kSome);
    }
    if (const int64_t rest = n - at; rest > 0) {
      float some[kSome];
      for (int64_t i = 0; i < rest; ++i) {
        some[i] = f(at + i);
      }
      narrow(some, out + at, rest);
    }
  }
}

struct Moments {
  float mean, squares;  // squares: the sum of squares about the mean
};

inline Moments moments(const float* x, int64_t n) {
  const float mean = sum_of(n, [x](int64_t i) { return x[i]; }) / static_cast<float>(n);
  return {mean, sum_of(n, [x, mean](int64_t i) { return (x[i] - mean) * (x[i] - mean); })};
}

// n values of any dtype, in float32.
inline std::vector<float> widened(const char* op, const Tensor& t) {
  std::vector<float> out(t.numel());
  with_dtype(op, t.scalar_type(), [&]<class T>(T*) {
    widen(static_cast<const T*>(t.const_data_ptr()), out.data(), t.numel());
  });
  return out;
}

// A parameter [channels] in float32; `absent` everywhere if there is none.
inline std::vector<float> parameter(const char* op, const char* name, const std::optional<Tensor>& t, int64_t channels,
                                    float absent) {
  if (!t) {
    return std::vector<float>(channels, absent);
  }
  check(t->dim() == 1 && t->size(0) == channels && t->is_contiguous(), op, ": ", name, " must be [", channels,
        "], got ", shape_of(*t));
  return widened(op, *t);
}

}  // namespace diffkern

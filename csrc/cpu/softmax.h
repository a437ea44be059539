// The softmax of attention over a block of scores that has queries in its lanes: from scores to the words of weights
// that are multiplied, under a running maximum (Milakov & Gimelshein 2018). Powers are of two: that saves the
// exponential of e its two parts of log2 e.
#pragma once

#include "../common/math.h"
#include "mask.h"
#include "words.h"

namespace diffkern {

// Up to V vectors of queries of one head, and their softmax so far.
struct Panel {
  float *query, *out;              // rows of V kLanes: words of the query, and the D channels of the result
  float *highest, *total, *decay;  // [V kLanes]
};

// 2^x by a polynomial in x - n, |x - n| <= 1/2, for the integer n next to x <= 0; NaN for NaN. Minimax fits of the
// relative error: of degree 3, 7.5e-5, a twenty-sixth of half a last place of bfloat16; of degree 6, that of
// power_of_two_rise, here in a loop, since GCC 12 lets `soften` stand alone when it calls that.
template <int kDegree>
Vector power_of_two(Vector x) {
  const auto polynomial = [](Vector f) {
    constexpr float kThree[] = {0.0551716690926f, 0.242611122224f, 0.693260985454f, 0.999928073535f};
    constexpr float kSix[] = {0.000153533617864f, 0.00133988743782f, 0.00961843735844f, 0.0555033247126f,
                              0.240226479136f,    0.693147202855f,   1.0f};
    const float* c = kDegree == 3 ? kThree : kSix;
    Vector p = Vector{} + c[0];
#pragma GCC unroll 6
    for (int i = 1; i <= kDegree; ++i) {
      p = p * f + c[i];
    }
    return p;
  };
#ifdef __AVX512F__
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const Vector n = _mm512_roundscale_ps(x, kNearest);
  return _mm512_scalef_ps(polynomial(x - n), n);  // zero for n = -infinity, though x - n is NaN
#else
  typedef int32_t Bits __attribute__((vector_size(sizeof(Vector))));
  x = x < -127.0f ? Vector{} - 127.0f : x;
  const Vector shifted = x + kToExponent;
  return polynomial(x - (shifted - kToExponent)) * (Vector)((Bits)shifted << 23);
#endif
}

// The higher of two, or b where a is NaN.
inline Vector higher(Vector a, Vector b) { return a > b ? a : b; }

// Scores [keys, V kLanes], of which `highest` are the highest, to words of weights under the highest score so far;
// `decay` is what that does to earlier weights. Scores times `factor` are exponents of two; only their differences are
// multiplied, since scores may be as large as float32 goes. Returns the number of rows of words.
template <class W, int V>
int64_t soften(const Panel& p, int64_t keys, const Vector* highest, float factor, float* scores) {
  constexpr int64_t kWidth = V * kLanes;
  Vector shift[V], total[V] = {};
  for (int64_t v = 0; v < V; ++v) {
    Vector& old = vector(p.highest + v * kLanes);
    const Vector now = higher(highest[v], old);
    shift[v] = now == kNone ? Vector{} : now;  // all scores are -inf so far: their weights are zero, not NaN
    // No score before: there is nothing to decay, whatever a factor of zero makes of its exponent.
    const Vector decay = old == kNone ? Vector{} : power_of_two<6>((old - shift[v]) * factor);
    vector(p.decay + v * kLanes) = decay;
    vector(p.total + v * kLanes) *= decay;
    old = now;
  }
  const auto weight = [&](int64_t k, int64_t v) {
    return power_of_two<W::kDegree>((vector(scores + k * kWidth + v * kLanes) - shift[v]) * factor);
  };
  const int64_t rows = keys / W::kNumbers;
  for (int64_t row = 0; row < rows; ++row) {
#pragma GCC unroll 4
    for (int64_t v = 0; v < V; ++v) {
      Vector weights[W::kNumbers];
#pragma GCC unroll 2
      for (int64_t i = 0; i < W::kNumbers; ++i) {
        weights[i] = weight(row * W::kNumbers + i, v);
      }
      vector(scores + row * kWidth + v * kLanes) = W::join(weights, total[v]);
    }
  }
  if (keys % W::kNumbers != 0) {  // a key that is none weighs nothing
    for (int64_t v = 0; v < V; ++v) {
      Vector weights[W::kNumbers] = {weight(keys - 1, v)};
      vector(scores + rows * kWidth + v * kLanes) = W::join(weights, total[v]);
    }
  }
  for (int64_t v = 0; v < V; ++v) {
    vector(p.total + v * kLanes) += total[v];
  }
  return words_of<W>(keys);
}

}  // namespace diffkern

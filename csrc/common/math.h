// Elementary functions as short polynomials without branches or tables, so that loops over them vectorise. The
// coefficients are minimax fits (Remez, 40 digits) of the relative error; each comment gives the error of the fit.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace diffkern {

// ln(u) for a positive normal u: u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)). Fit: 5.8e-9.
inline float fast_log(float u) {
  const int32_t bits = std::bit_cast<int32_t>(u);
  const int32_t e = (bits - 0x3f3504f3) >> 23;
  const float f = std::bit_cast<float>(bits - (e << 23)) - 1.0f;
  float p = -0.0763450290965f;
  p = p * f + 0.127615773481f;
  p = p * f - 0.131601804663f;
  p = p * f + 0.142017579983f;
  p = p * f - 0.16623357535f;
  p = p * f + 0.200012268731f;
  p = p * f - 0.250008210285f;
  p = p * f + 0.333333317078f;
  const float square = f * f;
  return static_cast<float>(e) * 0.693147180559945f + (f + square * (p * f - 0.5f));
}

struct SinCos {
  float sin, cos;
};

// sin and cos of `t` full turns, t in [-1/2, 1/2]. Taking out quarter turns leaves r in [-1/8, 1/8] without rounding,
// so that both are right to a few ulp even next to their zeros. Fits: 3.2e-9 and 6.4e-11.
inline SinCos fast_sincos_turns(float t) {
  constexpr float kToInteger = 0x1.8p23f;  // adding it rounds to an integer, which then is the low bits of the sum
  const float shifted = t * 4.0f + kToInteger;
  const uint32_t quarter = std::bit_cast<uint32_t>(shifted);
  const float r = t - (shifted - kToInteger) * 0.25f;
  const float z = r * r;
  const float s = r * (((-75.3935628891f * z + 81.5923535569f) * z - 41.3416614549f) * z + 6.28318528683f);
  const float c = (((59.2292441778f * z - 85.4432362966f) * z + 64.9393218472f) * z - 19.7392086816f) * z + 1.0f;
  const bool swap = quarter & 1;
  const uint32_t sine = std::bit_cast<uint32_t>(swap ? c : s) ^ ((quarter & 2) << 30);
  const uint32_t cosine = std::bit_cast<uint32_t>(swap ? s : c) ^ (((quarter + 1) & 2) << 30);
  return {std::bit_cast<float>(sine), std::bit_cast<float>(cosine)};
}

struct Exp {
  float value, minus_one;
};

// Beyond these e^x is infinite and zero in fast_exp.
constexpr float kExpHighest = 88.8f, kExpLowest = -88.1f;

constexpr double kLog2e = 0x1.71547652b82fep0;
constexpr float kLog2eHigh = static_cast<float>(kLog2e), kLog2eRest = static_cast<float>(kLog2e - kLog2eHigh);
constexpr float kToExponent = 0x1.8p23f + 127.0f;  // leaves n + 127, the exponent of 2^n, in the low bits of a sum

// (2^f - 1) / f for |f| <= 1/2, of a number or a vector of them. Fit of 2^f: 2.0e-9.
template <class F>
[[gnu::always_inline]] inline F power_of_two_rise(F f) {
  F p = f * 0.000153533617864f + 0.00133988743782f;
  p = p * f + 0.00961843735844f;
  p = p * f + 0.0555033247126f;
  p = p * f + 0.240226479136f;
  return p * f + 0.693147202855f;
}

// e^x for kExpLowest <= x <= kExpHighest: zero below 2^-126.5, infinite above 2^127.5; and e^x - 1, which keeps its digits
// near 0.
inline Exp exp_minus_one_within(float x) {
  const float shifted = x * kLog2eHigh + kToExponent;
  const float f = (x * kLog2eHigh - (shifted - kToExponent)) + x * kLog2eRest;
  const float p = power_of_two_rise(f);
  // The power is built, not added to p's exponent: n = -127 then is the pattern of zero and 128 that of infinity.
  const float power = std::bit_cast<float>(std::bit_cast<int32_t>(shifted) << 23);
  const float value = (p * f + 1.0f) * power;
  return {value, power == 1.0f ? p * f : value - 1.0f};
}

// For all x, and NaN for NaN.
inline Exp fast_exp_minus_one(float x) {
  x = x > kExpHighest ? kExpHighest : x;  // comparisons that are false for NaN leave it there
  x = x < kExpLowest ? kExpLowest : x;
  return exp_minus_one_within(x);
}

inline float fast_exp(float x) { return fast_exp_minus_one(x).value; }

// x / (1 + e^u), for a u that is NaN only where x is. Bounds u as integers, which in the order of their size are floats of
// one sign: of comparisons of floats the compiler makes branches, and has the vectors divide once for each.
inline float divided_by_one_plus_exp(float x, float u) {
  u = std::bit_cast<float>(std::min(std::bit_cast<int32_t>(u), std::bit_cast<int32_t>(kExpHighest)));
  u = std::bit_cast<float>(std::min(std::bit_cast<uint32_t>(u), std::bit_cast<uint32_t>(kExpLowest)));
  return x / (1.0f + exp_minus_one_within(u).value);
}

// x / (1 + e^-x)
inline float fast_silu(float x) { return divided_by_one_plus_exp(x, -x); }

// x Phi(x) with Phi the normal distribution, by its tail Phi(-|x|) = e^(-x^2 / 2) t P(t), t = 1 / (1 + 0.283 |x|), which
// keeps the digits of both tails. Fit, for |x| up to 14, where the tail is zero in float32: 7.8e-9.
inline float fast_gelu(float x) {
  const float magnitude = x > 0.0f ? x : -x;
  const float t = 1.0f / (1.0f + 0.282842712475f * magnitude);
  float p = -0.0147969916993f;
  p = p * t + 0.0990056926841f;
  p = p * t - 0.249403707155f;
  p = p * t + 0.273715152994f;
  p = p * t - 0.142181335823f;
  p = p * t + 0.136032108713f;
  p = p * t + 0.0648401261987f;
  p = p * t + 0.107459485652f;
  p = p * t + 0.112476018069f;
  p = p * t + 0.112853454282f;
  const float tail = x * (p * t * fast_exp(-0.5f * x * x));
  return x > 0.0f ? x - tail : tail;
}

// e^(x^2 / 2) Q(x) for x >= 0, with Q(x) the mass of the normal distribution above x: t P(t), t = 1 / (1 + 0.28 x), which
// neither overflows nor vanishes. Fit, for all x up to infinity: 6.1e-9.
inline float fast_scaled_tail(float x) {
  const float t = 1.0f / (1.0f + 0.28f * x);
  float p = -0.0143789754464f;
  p = p * t + 0.0715650104987f;
  p = p * t - 0.126027823603f;
  p = p * t + 0.0813720098165f;
  p = p * t - 0.0296185820091f;
  p = p * t + 0.0459096990262f;
  p = p * t + 0.0591993153818f;
  p = p * t + 0.0856357347758f;
  p = p * t + 0.102935729121f;
  p = p * t + 0.111704047521f;
  p = p * t + 0.111703837835f;
  return p * t;
}

// The tanh form (Hendrycks & Gimpel 2016): x (1 + tanh u) / 2 = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3).
inline float fast_gelu_tanh(float x) {
  return divided_by_one_plus_exp(x, x * (-1.59576912161f - 0.0713548162726f * x * x));
}

}  // namespace diffkern

// The activations of linear and conv2d, of one sum in float32.
#pragma once

#include "../common/check.h"
#include "../common/math.h"

#include <cstdint>
#include <type_traits>

namespace diffkern {

enum Activation : int64_t { kNone, kSilu, kGelu, kGeluTanh, kGeglu, kSwiglu };  // the order of ACTIVATIONS in linear.py

// Whether the second half of a row's sums gates the first.
constexpr bool is_gated(int64_t activation) { return activation == kGeglu || activation == kSwiglu; }

template <class F>
void with_activation(const char* op, int64_t activation, F f) {
  switch (activation) {
    case kNone:
      return f(std::integral_constant<Activation, kNone>());
    case kSilu:
      return f(std::integral_constant<Activation, kSilu>());
    case kGelu:
      return f(std::integral_constant<Activation, kGelu>());
    case kGeluTanh:
      return f(std::integral_constant<Activation, kGeluTanh>());
    case kGeglu:
      return f(std::integral_constant<Activation, kGeglu>());
    case kSwiglu:
      return f(std::integral_constant<Activation, kSwiglu>());
    default:
      check(false, op, ": no activation has the number ", activation);
  }
}

template <Activation kActivation>
float activate(float y, [[maybe_unused]] float gate) {
  switch (kActivation) {
    case kSilu:
      return fast_silu(y);
    case kGelu:
      return fast_gelu(y);
    case kGeluTanh:
      return fast_gelu_tanh(y);
    case kGeglu:
      return y * fast_gelu(gate);
    case kSwiglu:
      return y * fast_silu(gate);
    default:
      return y;
  }
}

}  // namespace diffkern

// The mask of attention, applied to a block of scores that has queries in its lanes.
#pragma once

#include "../common/dtype.h"
#include "product.h"

#include <algorithm>
#include <limits>

namespace diffkern {

constexpr int64_t kKeys = 128;  // at most, in a block of scores
constexpr float kNone = -std::numeric_limits<float>::infinity();

// Entries of a mask, `step` apart: what they add to scores, in float32.
template <class T>
void entries(const T* in, int64_t step, float* out, int64_t n) {
  if (step == 1) {
    return widen(in, out, n);
  }
  for (int64_t i = 0; i < n; ++i) {
    out[i] = to_float(in[i * step]);
  }
}

// For bool 0 or -inf, made of bits: GCC makes no vectors of a choice between floats by bytes.
inline void entries(const bool* in, int64_t step, float* out, int64_t n) {
  const auto* keep = reinterpret_cast<const uint8_t*>(in);
  const auto convert = [=](auto step) {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = std::bit_cast<float>((uint32_t{keep[i * step]} - 1) & std::bit_cast<uint32_t>(kNone));
    }
  };
  step == 1 ? convert(std::integral_constant<int64_t, 1>()) : convert(step);
}

// Scores, scaled, under such entries. Those of bool replace what they do not keep: it may be infinite or NaN.
template <class M>
Vector masked(Vector score, Vector entry) {
  if constexpr (std::is_same_v<M, bool>) {
    return entry == Vector{} ? score : Vector{} + kNone;
  } else {
    return score + entry;
  }
}

// [B, H, S, T], with any strides: bool, or of the dtype of q.
struct Mask {
  const void* data = nullptr;  // nullptr for no mask
  bool keeps = false;          // bool
  int64_t sample = 0, head = 0, query = 0, key = 0;

  // Scales and masks scores [keys, width] of one head: of `queries` queries from `first_query` on (lanes that are none
  // repeat the last one) and of at most kKeys keys from `first_key` on. `room` is aligned and has kLanes rows of kKeys.
  template <class M>
  void apply(int64_t b, int64_t h, int64_t first_query, int64_t queries, int64_t first_key, int64_t keys, int64_t width,
             float scale, float* scores, float* room) const {
    const M* first = static_cast<const M*>(data) + b * sample + h * head + first_query * query + first_key * key;
    if (query == 0) {  // one row for all queries
      entries(first, key, room, keys);
      for (int64_t k = 0; k < keys; ++k) {
        for (int64_t j = 0; j < width; j += kLanes) {
          Vector& score = vector(scores + k * width + j);
          score = masked<M>(score * scale, Vector{} + room[k]);
        }
      }
      return;
    }
    for (int64_t j = 0; j < width; j += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        entries(first + std::min(j + i, queries - 1) * query, key, room + i * kKeys, keys);
      }
      for (int64_t k = 0; k < keys; k += kLanes) {
        const auto apply_to = [&](int64_t i, Vector entry) {
          if (k + i < keys) {
            Vector& score = vector(scores + (k + i) * width + j);
            score = masked<M>(score * scale, entry);
          }
        };
        transpose([&](int64_t i) { return vector(room + i * kKeys + k); }, apply_to);
      }
    }
  }
};

}  // namespace diffkern

// The noise of diffkern/ops/randn.py on the CPU: 64 normals a step, each the same bits wherever and with whatever
// neighbours it is asked for.
#pragma once

#include "../common/math.h"
#include "../common/philox.h"

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace diffkern {

constexpr int kBlocks = 16;  // counters a step; each gives 4 normals

// The normals of one sample and draw, in blocks of 4.
struct Stream {
  uint32_t key0, key1, draw, sample0, sample1;

  Stream(const int64_t* key, int64_t draw)
      : key0(static_cast<uint32_t>(key[0])),
        key1(static_cast<uint32_t>(static_cast<uint64_t>(key[0]) >> 32)),
        draw(static_cast<uint32_t>(draw)),
        sample0(static_cast<uint32_t>(key[1])),
        sample1(static_cast<uint32_t>(static_cast<uint64_t>(key[1]) >> 32)) {}
};

namespace detail {

// A word a 64-bit lane: the machine multiplies the low halves into whole products and ignores what an earlier product
// left in the high halves. GCC does not find this form in a plain loop, and is three times slower there.
#ifdef __AVX512F__
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
using Lanes [[gnu::vector_size(8 * kLanes)]] = uint64_t;

inline Lanes multiply_low(Lanes a, uint32_t b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Lanes>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Lanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#else
  return (a & 0xffffffffu) * uint64_t{b};
#endif
}

struct State {
  Lanes c0, c1, c2, c3;

  State(Lanes block, const Stream& s)
      : c0(block), c1(Lanes{} + s.draw), c2(Lanes{} + s.sample0), c3(Lanes{} + s.sample1) {}

  void round(uint32_t key0, uint32_t key1) {
    const Lanes p0 = multiply_low(c0, philox::kMultiplier0), p1 = multiply_low(c2, philox::kMultiplier1);
    c0 = (p1 >> 32) ^ c1 ^ key0;
    c2 = (p0 >> 32) ^ c3 ^ key1;
    c1 = p1;
    c3 = p0;
  }
};

// The four words of the counters block, ..., block + kBlocks - 1.
inline void philox_words(const Stream& s, uint32_t block, uint32_t (&out)[4][kBlocks]) {
  constexpr int kPair = 2 * kLanes;
  static_assert(kBlocks % kPair == 0);
  for (int i = 0; i < kBlocks; i += kPair) {
    Lanes index;
    for (int j = 0; j < kLanes; ++j) {
      index[j] = 2 * j;
    }
    index += block + i;  // wraps at 2^32 as the counter does: the high halves are ignored
    State even(index, s), odd(index + 1, s);
    uint32_t key0 = s.key0, key1 = s.key1;
#pragma GCC unroll 10
    for (int round = 0; round < philox::kRounds; ++round) {
      even.round(key0, key1);
      odd.round(key0, key1);
      key0 += philox::kWeyl0;
      key1 += philox::kWeyl1;
    }
    const auto store = [i](Lanes low, Lanes high, uint32_t* to) {
      const Lanes both = (low & 0xffffffffu) | (high << 32);
      std::memcpy(to + i, &both, sizeof both);
    };
    store(even.c0, odd.c0, out[0]);
    store(even.c1, odd.c1, out[1]);
    store(even.c2, odd.c2, out[2]);
    store(even.c3, odd.c3, out[3]);
  }
}

// Box-Muller: two normals from a pair of words, cosine first.
inline void box_muller(const uint32_t* u, const uint32_t* v, float* first, float* second) {
  for (int i = 0; i < kBlocks; ++i) {
    const float radius = std::sqrt(-2.0f * fast_log(philox::uniform(u[i])));
    const SinCos angle = fast_sincos_turns(philox::uniform(v[i]) - 0.5f);
    first[i] = radius * angle.cos;
    second[i] = radius * angle.sin;
  }
}

}  // namespace detail

// How many floats `normals` writes for n blocks.
constexpr int64_t normals_room(int64_t blocks) { return (blocks + kBlocks - 1) / kBlocks * kBlocks * 4; }

// Writes the 4 n normals of the blocks from `block` on, and up to the end of the last step behind them.
inline void normals(const Stream& s, int64_t block, int64_t n, float* out) {
  for (int64_t done = 0; done < n; done += kBlocks, out += 4 * kBlocks) {
    alignas(64) uint32_t word[4][kBlocks];
    alignas(64) float lane[4][kBlocks];
    detail::philox_words(s, static_cast<uint32_t>(block + done), word);
    detail::box_muller(word[0], word[1], lane[0], lane[1]);
    detail::box_muller(word[2], word[3], lane[2], lane[3]);
    for (int i = 0; i < kBlocks; ++i) {
      for (int j = 0; j < 4; ++j) {
        out[4 * i + j] = lane[j][i];
      }
    }
  }
}

}  // namespace diffkern

// Numbers between memory, in their dtype and 16 bytes at a time, and registers, in float32.
#pragma once

#include "../common/half.h"

#include <type_traits>

namespace diffkern {

#ifdef __CUDACC__
template <class T>
__device__ T* global(T* pointer) {
  return pointer;
}
#else  // the tests, which run kernels on the CPU, look where it points
using cuda_on_cpu::global;
#endif

// How many numbers of T a thread reads at a time.
template <class T>
constexpr int kWide = 16 / sizeof(T);

// Up to 16 bytes between global memory, never what a block shares, and words, as one instruction. Not assignments:
// nvcc 13 takes those apart. What is read must not be written by the same kernel.
__device__ __forceinline__ void get(const uint4* from, uint32_t* to) {
  const uint4 v = __ldg(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
__device__ __forceinline__ void get(const uint2* from, uint32_t* to) {
  const uint2 v = __ldg(from);
  to[0] = v.x, to[1] = v.y;
}
__device__ __forceinline__ void get(const uint32_t* from, uint32_t* to) { *to = __ldg(from); }

__device__ __forceinline__ void put(const uint32_t* from, uint4* to) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(from[0]), "r"(from[1]), "r"(from[2]),
               "r"(from[3]));
#else
  *global(to) = {from[0], from[1], from[2], from[3]};
#endif
}
__device__ __forceinline__ void put(const uint32_t* from, uint2* to) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(from[0]), "r"(from[1]));
#else
  *global(to) = {from[0], from[1]};
#endif
}
__device__ __forceinline__ void put(const uint32_t* from, uint32_t* to) { *to = *from; }

// What N numbers of T are moved as.
template <class T, int N>
using Word = std::conditional_t<N * sizeof(T) % 16 == 0, uint4,
                                std::conditional_t<N * sizeof(T) % 8 == 0, uint2, uint32_t>>;

// Two numbers of 16 bits in one word, each rounded to nearest.
DIFFKERN_HD uint32_t pack(float low, float high, Half) {
#ifdef __CUDA_ARCH__
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  Half a, b;
  from_float(low, a);
  from_float(high, b);
  return a.bits | uint32_t{b.bits} << 16;
#endif
}

DIFFKERN_HD uint32_t pack(float low, float high, BFloat16) {
#ifdef __CUDA_ARCH__
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  BFloat16 a, b;
  from_float(low, a);
  from_float(high, b);
  return a.bits | uint32_t{b.bits} << 16;
#endif
}

// The two numbers of a word.
DIFFKERN_HD void unpack(uint32_t word, float& low, float& high, Half) {
  low = to_float(Half{static_cast<uint16_t>(word)});
  high = to_float(Half{static_cast<uint16_t>(word >> 16)});
}

DIFFKERN_HD void unpack(uint32_t word, float& low, float& high, BFloat16) {
  low = to_float(BFloat16{static_cast<uint16_t>(word)});
  high = to_float(BFloat16{static_cast<uint16_t>(word >> 16)});
}

// The numbers of some words.
template <class T, int N>
__device__ __forceinline__ void numbers(const uint32_t (&bits)[N * sizeof(T) / 4], float (&out)[N]) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(N * sizeof(T) / 4); ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = __uint_as_float(bits[i]);
    } else {
      unpack(bits[i], out[2 * i], out[2 * i + 1], T{});
    }
  }
}

// N numbers from an address that is a multiple of 16 bytes, or of all their bytes if those are 4 or 8.
template <class T, int N>
__device__ __forceinline__ void load(const T* from, float (&out)[N]) {
  constexpr int kWords = N * sizeof(T) / 4, kStep = sizeof(Word<T, N>) / 4;
  uint32_t bits[kWords];
#pragma unroll
  for (int i = 0; i < kWords; i += kStep) {
    get(reinterpret_cast<const Word<T, N>*>(from) + i / kStep, bits + i);
  }
  numbers<T>(bits, out);
}

template <class T, int N>
__device__ __forceinline__ void store(const float (&in)[N], T* to) {
  constexpr int kWords = N * sizeof(T) / 4, kStep = sizeof(Word<T, N>) / 4;
  uint32_t bits[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if constexpr (sizeof(T) == 4) {
      bits[i] = __float_as_uint(in[i]);
    } else {
      bits[i] = pack(in[2 * i], in[2 * i + 1], T{});
    }
  }
#pragma unroll
  for (int i = 0; i < kWords; i += kStep) {
    put(bits + i, reinterpret_cast<Word<T, N>*>(to) + i / kStep);
  }
}

// The same for memory of any alignment, or where fewer than N numbers are left: one at a time unless `kAligned`, which
// promises alignment and all N. What is not read is zero.
template <bool kAligned, class T, int N>
__device__ __forceinline__ void load(const T* from, int count, float (&out)[N]) {
  if constexpr (kAligned) {
    load(from, out);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out[i] = i < count ? to_float(from[i]) : 0.0f;
    }
  }
}

template <bool kAligned, class T, int N>
__device__ __forceinline__ void store(const float (&in)[N], int count, T* to) {
  if constexpr (kAligned) {
    store(in, to);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) {
        from_float(in[i], to[i]);
      }
    }
  }
}

// N numbers, 8 or 16 bytes if `kAligned`, that are asked for where that is written: a compiler that moves it to where
// they are needed waits for each tensor in turn.
template <bool kAligned, class T, int N>
struct Early {
  uint32_t bits[N * sizeof(T) / 4];

  __device__ __forceinline__ void read(const T* from, int) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof bits == 16) {
      asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
                   : "l"(from));
    } else {
      asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(bits[0]), "=r"(bits[1]) : "l"(from));
    }
#else
    get(reinterpret_cast<const Word<T, N>*>(from), bits);
#endif
  }
  __device__ __forceinline__ void get_numbers(float (&out)[N]) const { numbers<T>(bits, out); }
};

template <class T, int N>
struct Early<false, T, N> {
  float number[N];

  __device__ __forceinline__ void read(const T* from, int count) { load<false>(from, count, number); }
  __device__ __forceinline__ void get_numbers(float (&out)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out[i] = number[i];
    }
  }
};

}  // namespace diffkern

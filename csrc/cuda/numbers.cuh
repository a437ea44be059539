// Numbers that stay in registers as they are in memory.
#pragma once

#include "vector.cuh"

namespace diffkern {

// V numbers: 16 bytes, from an address that is a multiple of 16, or a single one.
template <class T, int V>
struct Numbers {
  static_assert(V == kWide<T>);
  uint32_t bits[4];

  // As `get`, but where it is written: a compiler that moves it to where the numbers are needed waits for each in turn.
  __device__ __forceinline__ void read(const T* from) {
#ifdef __CUDA_ARCH__
    asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
                 : "l"(from));
#else
    get(reinterpret_cast<const uint4*>(from), bits);
#endif
  }
  __device__ __forceinline__ void write(T* to) const { put(bits, reinterpret_cast<uint4*>(to)); }

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(bits[i]);
    } else {
      float low, high;
      unpack(bits[i / 2], low, high, T{});
      return i % 2 ? high : low;
    }
  }

  // Numbers `first` to first + N become those of `in`.
  template <int N>
  __device__ __forceinline__ void set(int first, const float (&in)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if constexpr (sizeof(T) == 4) {
        bits[first + i] = __float_as_uint(in[i]);
      } else if (i % 2 == 0) {
        bits[(first + i) / 2] = pack(in[i], in[i + 1], T{});
      }
    }
  }
};

template <class T>
struct Numbers<T, 1> {
  T number;

  __device__ __forceinline__ void read(const T* from) { number = *from; }
  __device__ __forceinline__ void write(T* to) const { *to = number; }
  __device__ __forceinline__ float operator[](int) const { return to_float(number); }
  __device__ __forceinline__ void set(int, const float (&in)[1]) { from_float(in[0], number); }
};

// V numbers, as `load` and `store` do it, or a single one.
template <class T, int V>
__device__ __forceinline__ void read_numbers(const T* from, float (&out)[V]) {
  load<(V > 1)>(from, V, out);
}

template <class T, int V>
__device__ __forceinline__ void write_numbers(const float (&in)[V], T* to) {
  store<(V > 1)>(in, V, to);
}

// V numbers for the other threads of a block, to what it shares.
template <int V>
__device__ __forceinline__ void share_numbers(const float (&in)[V], float* to) {
  if constexpr (V % 4 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 4) {
      *reinterpret_cast<float4*>(to + i) = {in[i], in[i + 1], in[i + 2], in[i + 3]};
    }
  } else {
    static_assert(V == 1);
    *to = in[0];
  }
}

// A vector of parameters, in float32 or the dtype of what they are applied to.
struct Parameter {
  const void* data = nullptr;
  bool wide = false;  // float32, whatever the dtype of x

  template <class T>
  __device__ float at(int64_t i) const {
    return wide ? static_cast<const float*>(data)[i] : to_float(static_cast<const T*>(data)[i]);
  }

  template <class T, int V>
  __device__ void read(int64_t i, float (&out)[V]) const {
    if (wide) {
      read_numbers(static_cast<const float*>(data) + i, out);
    } else {
      read_numbers(static_cast<const T*>(data) + i, out);
    }
  }
};

}  // namespace diffkern

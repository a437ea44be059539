// Stands in for CUDA's header, so that a C++ compiler makes the kernels and launchers of csrc/cuda into a library that
// runs them on the CPU: the same code, a thread at a time. For tests only.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

#include "fibers.h"

#include "cluster.h"
#include "matrix.h"

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::State::kWaitsForBlock); }
inline void __syncwarp(unsigned = ~0u) { cuda_on_cpu::wait(cuda_on_cpu::State::kWaitsForWarp); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return cuda_on_cpu::shuffle(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_cpu::shuffle(value, threadIdx.x % warpSize ^ mask);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  return cuda_on_cpu::shuffle(value, threadIdx.x % warpSize + delta);
}

template <class T>
T __ldg(const T* from) {
  return *cuda_on_cpu::global(from);
}

inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

// The runtime: one device, which is the CPU.

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeProgrammaticStreamSerialization,
  cudaLaunchAttributeClusterDimension,
};
union cudaLaunchAttributeValue {
  int programmaticStreamSerializationAllowed;
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor };

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

inline cudaError_t cudaGetDevice(int* device) {
  *device = -1;  // the index of a tensor on the CPU
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 9;  // a Hopper
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  cuda_on_cpu::asked[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

// What the tests ask for: how many kernels were launched, and of the last one the clusters, the blocks of each, and the
// threads of a block.
struct Launched {
  unsigned kernels, clusters, blocks, threads;
};
extern "C" {
[[gnu::visibility("default")]] inline Launched cuda_on_cpu_launched;
}
[[gnu::used]] inline const auto keep_launched = &cuda_on_cpu_launched;

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(Parameters...), Arguments... arguments) {
  const auto asked = cuda_on_cpu::asked.find(reinterpret_cast<const void*>(kernel));
  const size_t most = asked == cuda_on_cpu::asked.end() ? cuda_on_cpu::kShared : asked->second;
  const bool clusters = c->numAttrs == 1 && c->attrs[0].id == cudaLaunchAttributeClusterDimension;
  const auto& of = c->attrs[0].val.clusterDim;
  const dim3 cluster = clusters ? dim3(of.x, of.y, of.z) : dim3();
  const unsigned blocks = cuda_on_cpu::volume(cluster);
  cuda_on_cpu_launched = {cuda_on_cpu_launched.kernels + 1, cuda_on_cpu::volume(c->gridDim) / blocks, blocks,
                          c->blockDim.x};
  cuda_on_cpu::run_grid(c->gridDim, cluster, c->blockDim.x, c->dynamicSmemBytes, most, [=] { kernel(arguments...); });
  return cudaSuccess;
}

// Found by the name that a CUDA build of torch gives it.
extern "C" [[gnu::visibility("default")]] inline int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
[[gnu::used]] inline const auto keep_current_stream = &aoti_torch_get_current_cuda_stream;

// Stands in for CUDA's header, so that a C++ compiler makes the kernels and launchers of csrc/cuda into a library that
// runs them on the CPU: the same code, a thread at a time. For tests only.
//
// Each thread of a block is a fiber. It runs until it waits, for its block (__syncthreads) or for its warp (shuffles);
// all others of its warp then do. A warp runs as far as it can before the next one begins: so a thread that reads what
// another has yet to write finds NaN, one that writes what another has yet to read spoils it, and a barrier that not all
// reach is an error. Blocks run one after the other. REVERSED turns round the order of blocks and of warps.
#pragma once

#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

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
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

constexpr size_t kStack = 64 << 10;
constexpr size_t kShared = 48 << 10, kMaxShared = 227 << 10;  // what a kernel gets, and what it can ask for on a Hopper

enum class State { kRuns, kWaitsForWarp, kWaitsForBlock, kEnded };

// Of 16 bytes, begun by a thread and not yet there; zeros if it is from nowhere.
struct Copy {
  char* to;
  const void* from;
  unsigned group;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kRuns;
  // What the thread shows its warp, in turns: the next must not overwrite what a slower lane has yet to read.
  alignas(8) char shown[2][24];
  unsigned turns = 0;
  std::vector<Copy> copies;
  unsigned groups = 0;  // of copies, that were made
};

struct Block {
  std::vector<Fiber> fibers;
  std::function<void()> kernel;
  ucontext_t scheduler;
  unsigned current = 0;
  alignas(128) char shared[kMaxShared];  // dynamic
};

inline Block block;

inline void wait(State state) {
  Fiber& self = block.fibers[block.current];
  self.state = state;
  swapcontext(&self.context, &block.scheduler);
}

inline void run_fiber() {
  block.kernel();
  block.fibers[block.current].state = State::kEnded;
}

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", why);
  std::abort();
}

// Lets the threads in [begin, end) go on if all of them that have not ended wait for the same thing.
inline bool release(unsigned begin, unsigned end, State state) {
  bool waiting = false;
  for (unsigned i = begin; i < end; ++i) {
    if (const State s = block.fibers[i].state; s != state && s != State::kEnded) {
      return false;
    } else {
      waiting |= s == state;
    }
  }
  for (unsigned i = begin; waiting && i < end; ++i) {
    if (block.fibers[i].state == state) {
      block.fibers[i].state = State::kRuns;
    }
  }
  return waiting;
}

// Runs block number `b`. What it shares is NaN before it starts.
inline void run_block(uint64_t b, unsigned threads, size_t shared_bytes, bool reversed) {
  blockIdx = dim3(b % gridDim.x, b / gridDim.x % gridDim.y, b / gridDim.x / gridDim.y);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = block.fibers[i];
    f.state = State::kRuns;
    f.turns = f.groups = 0;
    f.copies.clear();
    getcontext(&f.context);
    f.context.uc_stack = {f.stack.get(), 0, kStack};
    f.context.uc_link = &block.scheduler;
    makecontext(&f.context, run_fiber, 0);
  }
  std::memset(block.shared, 0xff, shared_bytes);
  const unsigned warps = (threads + warpSize - 1) / warpSize;
  do {
    for (unsigned n = 0; n < warps; ++n) {
      const unsigned begin = (reversed ? warps - 1 - n : n) * warpSize;
      const unsigned end = begin + warpSize < threads ? begin + warpSize : threads;
      do {
        for (unsigned i = begin; i < end; ++i) {
          if (block.fibers[i].state == State::kRuns) {
            block.current = i;
            threadIdx = dim3(i);
            swapcontext(&block.scheduler, &block.fibers[i].context);
          }
        }
      } while (release(begin, end, State::kWaitsForWarp));
    }
  } while (release(0, threads, State::kWaitsForBlock));
  for (unsigned i = 0; i < threads; ++i) {
    if (block.fibers[i].state != State::kEnded) {
      fail("threads of one block wait for each other at different places");
    }
  }
}

inline std::map<const void*, size_t> asked;  // shared memory, by kernel

inline void run_grid(dim3 grid, unsigned threads, size_t shared_bytes, size_t most, std::function<void()> kernel) {
  if (threads == 0 || threads > 1024 || shared_bytes > most || most > kMaxShared || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.y > 65535 || grid.z > 65535) {
    fail("a launch that CUDA would refuse");
  }
  if (block.fibers.size() < threads) {
    block.fibers = std::vector<Fiber>(threads);
  }
  block.kernel = std::move(kernel);
  blockDim = dim3(threads);
  gridDim = grid;
  const bool reversed = std::getenv("CUDA_ON_CPU_REVERSED") != nullptr;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    run_block(reversed ? blocks - 1 - i : i, threads, shared_bytes, reversed);
  }
}

// Shows the warp a value, and waits until each lane has shown its own. Returns which turn that was.
template <class T>
unsigned show(const T& value) {
  static_assert(sizeof(T) <= sizeof(Fiber::shown[0]));
  Fiber& self = block.fibers[block.current];
  const unsigned turn = self.turns++ % 2;
  std::memcpy(self.shown[turn], &value, sizeof value);
  wait(State::kWaitsForWarp);
  return turn;
}

// What a lane of this thread's warp showed in that turn.
template <class T>
T shown_by(unsigned lane, unsigned turn) {
  T value;
  std::memcpy(&value, block.fibers[block.current - threadIdx.x % warpSize + lane].shown[turn], sizeof value);
  return value;
}

// What lane `from` of this thread's warp shows; the thread's own value if there is no such lane.
template <class T>
T shuffle(T value, unsigned from) {
  const unsigned turn = show(value);
  const bool there = from < warpSize && threadIdx.x / warpSize * warpSize + from < blockDim.x;
  return there ? shown_by<T>(from, turn) : value;
}

inline float* dynamic_shared() { return reinterpret_cast<float*>(block.shared); }

// The pointer, which instructions for global memory can be given.
template <class T>
T* global(T* pointer) {
  const char* at = reinterpret_cast<const char*>(pointer);
  if (at >= block.shared && at < block.shared + kMaxShared) {
    fail("an access to global memory lies in what a block shares");
  }
  return pointer;
}

}  // namespace cuda_on_cpu

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
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization };
struct cudaLaunchAttributeValue {
  int programmaticStreamSerializationAllowed;
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

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(Parameters...), Arguments... arguments) {
  const auto asked = cuda_on_cpu::asked.find(reinterpret_cast<const void*>(kernel));
  const size_t most = asked == cuda_on_cpu::asked.end() ? cuda_on_cpu::kShared : asked->second;
  cuda_on_cpu::run_grid(c->gridDim, c->blockDim.x, c->dynamicSmemBytes, most, [=] { kernel(arguments...); });
  return cudaSuccess;
}

// Found by the name that a CUDA build of torch gives it.
extern "C" [[gnu::visibility("default")]] inline int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
[[gnu::used]] inline const auto keep_current_stream = &aoti_torch_get_current_cuda_stream;

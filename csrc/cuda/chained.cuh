// Dynamic shared memory, and kernels of which one begins while that before it ends, from sm_90 on (Launch::after).
#pragma once

namespace diffkern {

#ifndef __CUDACC__  // the tests, which run kernels on the CPU one after the other
using cuda_on_cpu::dynamic_shared;
inline void let_next_begin() {}
inline void wait_for_last() {}
#else

__device__ inline float* dynamic_shared() {
  extern __shared__ uint4 room[];
  return reinterpret_cast<float*>(room);
}

// The blocks of the next kernel may begin as soon as all blocks of this one have.
__device__ inline void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernel before has ended and all that it wrote can be read. What is written must wait for this too.
__device__ inline void wait_for_last() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#endif

}  // namespace diffkern

// Dynamic shared memory, and that of a cluster of blocks, which exists from sm_90 on.
#pragma once

namespace diffkern {

#ifndef __CUDACC__  // the tests, which run kernels on the CPU
using cuda_on_cpu::block_rank, cuda_on_cpu::cluster_arrive, cuda_on_cpu::cluster_wait, cuda_on_cpu::of_block;
using cuda_on_cpu::dynamic_shared;
#else

__device__ inline float* dynamic_shared() {
  extern __shared__ uint4 room[];
  return reinterpret_cast<float*>(room);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900  // every block is a cluster of its own

__device__ inline int block_rank() { return 0; }
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_wait() { __syncthreads(); }
template <class T>
__device__ const T* of_block(const T* shared, int) {
  return shared;
}

#else

// Which block of its cluster this one is.
__device__ inline int block_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// What is written before `cluster_arrive` can be read by every block of the cluster after `cluster_wait`.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Where another block of the cluster keeps what `shared` points to in this one.
template <class T>
__device__ const T* of_block(const T* shared, int rank) {
  const T* there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
  return there;
}

#endif
#endif

}  // namespace diffkern

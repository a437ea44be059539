// Clusters of blocks, which run at the same time and write what the others share: from sm_90 on. Before it every block
// is a cluster of its own.
//
// What a block is sent lies in its shared memory, beside a Mailbox that counts its bytes. In this order: thread 0 calls
// `open`, all threads `cluster_arrive`, and `cluster_wait` before any of them sends; who reads what was sent calls
// `receive`. A block that has received all may end: nothing else is sent to it, and it sends nothing more.
#pragma once

#include <cstdint>

namespace diffkern {

constexpr int kMostOfCluster = 8;  // blocks that every device with clusters can run together

#ifndef __CUDACC__  // the tests, which run kernels on the CPU
using cuda_on_cpu::Mailbox, cuda_on_cpu::cluster_arrive, cuda_on_cpu::cluster_wait;
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// Where block number `rank` of the cluster keeps what `shared` points to in this one.
__device__ inline uint32_t of_block(const void* shared, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(there)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "r"(rank));
  return there;
}

// No fence, which would wait for everything that the block has asked of memory: a transaction barrier orders what is
// sent by it.
struct alignas(8) Mailbox {
  uint64_t bits;

  __device__ void open(int bytes) {
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], 1;\n\t"
        "fence.mbarrier_init.release.cluster;\n\t"
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(of_this()),
        "r"(bytes)
        : "memory");
  }
  // To where block number `rank` has `to`.
  __device__ void send(int rank, float2* to, float2 what) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
                     of_block(to, rank)),
                 "f"(what.x), "f"(what.y), "r"(of_block(this, rank))
                 : "memory");
  }
  __device__ void receive() {
    uint32_t all = 0;
    while (!all) {
      asm volatile(
          "{\n\t.reg .pred p;\n\t"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;\n\t"
          "selp.u32 %0, 1, 0, p;\n\t}"
          : "=r"(all)
          : "r"(of_this())
          : "memory");
    }
  }

 private:
  __device__ uint32_t of_this() const { return static_cast<uint32_t>(__cvta_generic_to_shared(this)); }
};

#else

__device__ inline void cluster_arrive() {}
__device__ inline void cluster_wait() {}

struct alignas(8) Mailbox {
  uint64_t bits;

  __device__ void open(int) {}
  __device__ void send(int, float2* to, float2 what) { *to = what; }
  __device__ void receive() { __syncthreads(); }
};

#endif

}  // namespace diffkern

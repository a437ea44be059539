// What a warp does for the tensor cores of sm_80 and later, each as the PTX instruction for it: products of small
// matrices (mma.sync), their loads out of shared memory (ldmatrix), and copies into it that are not waited for
// (cp.async). Which lane holds which number: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" and
// "Warp-level matrix load instruction: ldmatrix". tests/cuda_on_cpu/matrix.h does the same on a CPU.
#pragma once

#include "../common/half.h"

namespace diffkern {

#ifndef __CUDACC__  // the tests
using cuda_on_cpu::commit_copies;
using cuda_on_cpu::copy_wide;
using cuda_on_cpu::load_matrices;
using cuda_on_cpu::load_transposed;
using cuda_on_cpu::multiply;
using cuda_on_cpu::Shared;
using cuda_on_cpu::shared_of;
using cuda_on_cpu::wait_for_copies;
#else

// c += a b, for a [16, 16] and b [16, 8], in float32. Lane 4 g + t holds, two numbers a word, of a the rows g and g + 8
// of columns 2 t, 2 t + 1, then the same of columns 2 t + 8, 2 t + 9; of b rows 2 t, 2 t + 1, then 2 t + 8, 2 t + 9 of
// column g; of c columns 2 t, 2 t + 1 of row g, then of row g + 8.
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b, Half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b, BFloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// An address in shared memory, counted in bytes. Known as one, its constant part is in the instruction that uses it.
using Shared = uint32_t;

__device__ __forceinline__ Shared shared_of(const void* pointer) {
  return static_cast<Shared>(__cvta_generic_to_shared(pointer));
}

// Four matrices [8, 8] of 16 bits out of shared memory. Lane 8 m + i gives the address of row i of matrix m, and gets a
// word of each: lane 4 g + t columns 2 t, 2 t + 1 of row g.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// The same, but lane 4 g + t gets rows 2 t, 2 t + 1 of column g.
__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// Begins to copy 16 bytes from global to shared memory, or 16 zeros if they are not `there`.
__device__ __forceinline__ void copy_wide(Shared to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(there ? 16 : 0)
               : "memory");
}

// Makes a group of the copies that this thread began since it made the last one.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last kLeft groups of this thread have arrived. A barrier must follow for those of others.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

#endif

}  // namespace diffkern

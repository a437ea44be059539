// What one source needs to be compiled for the CPU and for CUDA.
#pragma once

#ifdef __CUDACC__
#define DIFFKERN_HD __host__ __device__ __forceinline__
#else
#define DIFFKERN_HD inline
#endif

// Launchers: the device and stream of a call, its grid, and what a launch is refused for.
//
// torch's own library for CUDA is not linked against, so that this one also loads where there is none: the stream is
// asked for by name when a kernel is launched.
#pragma once

#include "../common/dtype.h"
#include "../common/layout.h"

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>

#ifndef DIFFKERN_KEY  // the tests build this library for the CPU, to run its kernels without a GPU
#define DIFFKERN_KEY CUDA
#endif

namespace diffkern {

// Makes the device of a call's tensors current for as long as it lives, and launches kernels on its stream.
class Launch {
 public:
  // All tensors must be on the device of the first; an absent optional one is on any.
  template <class... Others>
  explicit Launch(const char* op, const Tensor& first, const Others&... others) : op_(op) {
    device_ = first.get_device_index();
    (together(first, others), ...);
    int current = -1;
    if (cudaGetDevice(&current) != cudaSuccess || current != device_) {
      guard_.emplace(device_);  // torch's guard takes longer than a launch: only where it is needed
    }
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(current_stream()(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Starts the kernel with these arguments. Raises if that is refused; what goes wrong later, a later call is told.
  template <class... Parameters, class... Arguments>
  void operator()(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                  Arguments... arguments) const {
    start({}, kernel, grid, threads, shared_bytes, arguments...);
  }

  // The same, but it may begin before the kernel that was launched last, by this object, has ended: see chained.cuh.
  template <class... Parameters, class... Arguments>
  void after(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, Arguments... arguments) const {
    Attribute early;
    if (since_hopper()) {
      early.emplace().id = cudaLaunchAttributeProgrammaticStreamSerialization;
      early->val.programmaticStreamSerializationAllowed = 1;
    }
    start(early, kernel, grid, threads, shared_bytes, arguments...);
  }

  // The same in clusters of these blocks: see cluster.cuh. Every device runs those of one.
  template <class... Parameters, class... Arguments>
  void in_clusters(dim3 blocks, void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
                   Arguments... arguments) const {
    Attribute cluster;
    if (blocks.x * blocks.y * blocks.z > 1) {
      cluster.emplace().id = cudaLaunchAttributeClusterDimension;
      cluster->val.clusterDim.x = blocks.x;
      cluster->val.clusterDim.y = blocks.y;
      cluster->val.clusterDim.z = blocks.z;
    }
    start(cluster, kernel, grid, threads, shared_bytes, arguments...);
  }

  // Whether the device has what came with Hopper, and this library was compiled for one that has.
  bool since_hopper() const {
#ifdef __CUDA_ARCH_LIST__
    constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};
    if (*std::max_element(std::begin(kArchitectures), std::end(kArchitectures)) < 900) {
      return false;
    }
#endif
    int major = 0;
    return cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_) == cudaSuccess && major >= 9;
  }

 private:
  using Attribute = std::optional<cudaLaunchAttribute>;

  template <class... Parameters, class... Arguments>
  void start(Attribute attribute, void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes,
             Arguments... arguments) const {
    constexpr int kUnasked = 48 << 10;  // bytes that every kernel can have
    cudaError_t error = cudaSuccess;
    if (shared_bytes > kUnasked) {  // at every launch: each device must be asked
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    }
    cudaLaunchConfig_t config{};
    config.attrs = attribute ? &*attribute : nullptr;
    config.numAttrs = attribute.has_value();
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_;
    if (error == cudaSuccess) {
      error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
    }
    check(error == cudaSuccess, op_, ": the launch failed: ", cudaGetErrorString(error));
  }

  using CurrentStream = AOTITorchError (*)(int32_t, void**);

  static CurrentStream current_stream() {
    static const auto found = [] {
      constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
      void* stream_of_device = dlsym(RTLD_DEFAULT, kName);
      if (stream_of_device == nullptr) {  // Python loads torch's libraries out of the sight of others
        void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        stream_of_device = torch_cuda == nullptr ? nullptr : dlsym(torch_cuda, kName);
      }
      return reinterpret_cast<CurrentStream>(stream_of_device);
    }();
    check(found != nullptr, "diffkern: this torch has no CUDA streams");
    return found;
  }

  void together(const Tensor& first, const Tensor& other) const {
    check(other.device() == first.device(), op_, ": all tensors must be on one device");
  }
  void together(const Tensor& first, const std::optional<Tensor>& other) const {
    if (other) {
      together(first, *other);
    }
  }

  const char* op_;
  int32_t device_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

// Uninitialised memory for a result, on the device of `like`.
inline Tensor empty_on(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype,
                       bool channels_last = false) {
  int32_t type, index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  return uninitialised(shape, dtype, channels_last, type, index);
}

// The same with the shape and layout of `like`, but for dtype and batch.
inline Tensor empty_as(const Tensor& like, ScalarType dtype, int64_t batch) {
  return empty_on(like, shape_with_batch(like, batch), dtype, !like.is_contiguous());
}

// Whether these pointers can be read and written 16 bytes at a time; an absent one can.
template <class... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace diffkern

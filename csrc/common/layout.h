// How dense tensors lie in memory, contiguous or channels_last, on any device.
#pragma once

#include "check.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>  // its macro is also in torch 2.11, the stable one is not

#include <algorithm>
#include <vector>

namespace diffkern {

// How a batch lies in memory: samples of `pixels` rows of `channels` elements. A contiguous sample is one channel.
struct Dense {
  int64_t batch = 0, channels = 1, pixels = 0;
  bool channels_last = false;

  int64_t sample() const { return channels * pixels; }
};

inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4) {
    return false;
  }
  const int64_t c = t.size(1), h = t.size(2), w = t.size(3);
  const int64_t want[] = {h * w * c, 1, w * c, c};
  for (int i = 0; i < 4; ++i) {
    if (t.size(i) != 1 && t.stride(i) != want[i]) {
      return false;
    }
  }
  return true;
}

inline Dense dense(const char* op, const char* name, const Tensor& t) {
  check(t.dim() >= 1, op, ": ", name, " must have a batch axis, got ", shape_of(t));
  const int64_t batch = t.size(0), sample = t.numel() / std::max<int64_t>(batch, 1);
  if (t.is_contiguous()) {
    return {batch, 1, sample, false};
  }
  check(is_channels_last(t), op, ": ", name, " must be contiguous or channels_last");
  return {batch, t.size(1), t.size(2) * t.size(3), true};
}

// The data of `t`, which must have the dtype, the layout and, but for the batch, the shape of `like`.
template <class T>
const T* data_like(const char* op, const char* name, const Tensor& t, ScalarType dtype, const Tensor& like,
                   int64_t batch) {
  bool same = t.dim() == like.dim() && t.size(0) == batch;
  for (int64_t i = 1; same && i < t.dim(); ++i) {
    same = t.size(i) == like.size(i);
  }
  check(same, op, ": ", name, " must have batch ", batch, " and otherwise the shape ", shape_of(like), ", got ",
        shape_of(t));
  check(t.scalar_type() == dtype, op, ": ", name, " has the wrong dtype");
  check(like.is_contiguous() ? t.is_contiguous() : is_channels_last(t), op, ": ", name, " must have the layout of ",
        "the first tensor");
  return static_cast<const T*>(t.const_data_ptr());
}

// The data of a result.
template <class T>
T* data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// An uninitialised tensor on a device.
inline Tensor uninitialised(const std::vector<int64_t>& shape, ScalarType dtype, bool channels_last,
                            int32_t device_type, int32_t device) {
  // Not torch::stable::empty: that looks the op up by its name, which takes longer than a small kernel.
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  const auto stride_at = [&](size_t axis) {
    strides[axis] = stride;
    check(!__builtin_mul_overflow(stride, std::max<int64_t>(shape[axis], 1), &stride),
          "diffkern: no memory is large enough for a result of the shape ", shape_of(shape));
  };
  if (channels_last) {
    for (const size_t axis : {1, 3, 2, 0}) {
      stride_at(axis);
    }
  } else {
    for (size_t axis = shape.size(); axis-- > 0;) {
      stride_at(axis);
    }
  }
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  type, device_type, device, &handle));
  return Tensor(handle);
}

// The shape of `like`, but for the batch.
inline std::vector<int64_t> shape_with_batch(const Tensor& like, int64_t batch) {
  std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
  shape[0] = batch;
  return shape;
}

}  // namespace diffkern

// What group_norm_silu and its gradient share: their arguments, and the input as the norm sees it. Its moments, and the
// loops over it, are in group_norm_moments.h.
#pragma once

#include "rows.h"

namespace diffkern {

using MaybeTensor = std::optional<Tensor>;

// Sizes and parameters. `gamma` and `beta` scale and shift the normalised values of a sample: the norm's own affine
// parameters and, if given, the modulation of that sample, in one. A stride of 0 means that all samples share them.
struct GroupNorm {
  int64_t batch = 0, channels = 0, pixels = 0, groups = 0;
  double eps = 0;
  bool channels_last = false;
  int64_t parameter_stride = 0;
  std::vector<float> gammas, betas;

  int64_t group_size() const { return channels / groups; }
  int64_t sample_size() const { return channels * pixels; }
  const float* gamma(int64_t sample) const { return gammas.data() + sample * parameter_stride; }
  const float* beta(int64_t sample) const { return betas.data() + sample * parameter_stride; }
};

// What is normalised: x, after its channels those of `skip` if there is one, plus `add` if given: [B, C] a pixel.
template <class T>
struct Source {
  const T* x;
  const T* skip;
  int64_t own;  // channels of x
  std::vector<float> add;

  // What is added to the channels of a sample; nullptr for nothing.
  const float* add_of(const GroupNorm& p, int64_t sample) const {
    return add.empty() ? nullptr : &add[sample * p.channels];
  }

  // n elements of a channels_last sample from `at` on; in `room` unless they are there as they are needed.
  const float* rows(const GroupNorm& p, int64_t sample, int64_t at, int64_t n, float* room) const {
    if (!skip && add.empty()) {
      return as_float(x + sample * p.sample_size() + at, room, n);
    }
    int64_t pixel = sample * p.pixels + at / p.channels, c = at % p.channels;
    for (int64_t i = 0, run; i < n; i += run) {
      const int64_t end = c < own ? own : p.channels;
      run = std::min(end - c, n - i);
      const T* from = c < own ? x + pixel * own + c : skip + pixel * (p.channels - own) + c - own;
      widen(from, room + i, run);
      if (!add.empty()) {
        const float* add_at = &add[sample * p.channels + c];
        for (int64_t j = 0; j < run; ++j) {
          room[i + j] += add_at[j];
        }
      }
      c += run;
      if (c == p.channels) {
        c = 0;
        ++pixel;
      }
    }
    return room;
  }

  // n elements of a contiguous group from `at` on.
  const float* planes(const GroupNorm& p, int64_t slab, int64_t at, int64_t n, float* room) const {
    if (!skip && add.empty()) {
      return as_float(x + slab * p.group_size() * p.pixels + at, room, n);
    }
    const int64_t sample = slab / p.groups, first = slab % p.groups * p.group_size();
    for (int64_t i = 0, run; i < n; i += run) {
      const int64_t c = first + (at + i) / p.pixels, pixel = (at + i) % p.pixels;
      run = std::min(p.pixels - pixel, n - i);
      const T* plane = c < own ? x + (sample * own + c) * p.pixels
                               : skip + (sample * (p.channels - own) + c - own) * p.pixels;
      widen(plane + pixel, room + i, run);
      if (!add.empty()) {
        for (int64_t j = 0; j < run; ++j) {
          room[i + j] += add[sample * p.channels + c];
        }
      }
    }
    return room;
  }
};

// A parameter of a shape in float32; empty if there is none.
inline std::vector<float> parameter(const char* op, const char* name, const MaybeTensor& t,
                                    const std::vector<int64_t>& shape) {
  if (!t) {
    return {};
  }
  check(t->is_contiguous() && has_shape(*t, shape), op, ": ", name, " must be ", shape_of(shape), ", got ",
        shape_of(*t));
  return widened(op, *t);
}

// Reads and checks the arguments that the norm and its gradient share.
inline GroupNorm group_norm(const char* op, const Tensor& x, int64_t groups, const MaybeTensor& weight,
                            const MaybeTensor& bias, double eps, const MaybeTensor& scale, const MaybeTensor& shift,
                            const MaybeTensor& skip) {
  check(x.dim() >= 2, op, ": x must be [B, C, ...], got ", shape_of(x));
  if (skip) {
    bool same = skip->dim() == x.dim() && skip->scalar_type() == x.scalar_type();
    for (int64_t i = 0; same && i < x.dim(); ++i) {
      same = i == 1 || skip->size(i) == x.size(i);
    }
    check(same, op, ": skip must have the dtype and, but for the channels, the shape of x, ", shape_of(x), ", got ",
          shape_of(*skip));
  }
  GroupNorm p{x.size(0), x.size(1) + (skip ? skip->size(1) : 0), 1, groups, eps};
  for (int64_t i = 2; i < x.dim(); ++i) {
    p.pixels *= x.size(i);
  }
  check(groups >= 1 && p.channels % groups == 0, op, ": num_groups is ", groups, ", allowed are the divisors of the ",
        p.channels, " channels");
  p.channels_last = dense(op, "x", x).channels_last || p.pixels == 1;
  if (skip) {
    check(x.is_contiguous() ? skip->is_contiguous() : is_channels_last(*skip), op, ": skip must have the layout of x");
  }
  p.gammas = parameter(op, "weight", weight, p.channels, 1.0f);
  p.betas = parameter(op, "bias", bias, p.channels, 0.0f);
  const std::vector<int64_t> matrix = {p.batch, p.channels};
  const std::vector<float> scales = parameter(op, "scale", scale, matrix);
  const std::vector<float> shifts = parameter(op, "shift", shift, matrix);
  if (!scales.empty() && !shifts.empty()) {
    std::vector<float> gammas(scales.size()), betas(scales.size());
    for (size_t i = 0; i < scales.size(); ++i) {
      gammas[i] = p.gammas[i % p.channels] * (1 + scales[i]);
      betas[i] = p.betas[i % p.channels] * (1 + scales[i]) + shifts[i];
    }
    p.gammas = std::move(gammas);
    p.betas = std::move(betas);
    p.parameter_stride = p.channels;
  }
  return p;
}

template <class T>
Source<T> source_of(const char* op, const GroupNorm& p, const Tensor& x, const MaybeTensor& add,
                    const MaybeTensor& skip) {
  const T* second = skip && skip->size(1) ? static_cast<const T*>(skip->const_data_ptr()) : nullptr;
  return {static_cast<const T*>(x.const_data_ptr()), second, x.size(1),
          parameter(op, "add", add, std::vector<int64_t>{p.batch, p.channels})};
}

// An uninitialised tensor for a value a (pixel, channel) of the norm, in the layout of x.
inline Tensor empty_result(const Tensor& x, const GroupNorm& p) {
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size[1] = p.channels;
  return empty(size, x.scalar_type(), !x.is_contiguous());
}

}  // namespace diffkern

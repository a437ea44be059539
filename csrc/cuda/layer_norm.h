// Launches the norms of rows (layer_norm.cuh): how many vectors a thread and warps a row.
#pragma once

#include "layer_norm.cuh"
#include "parameters.h"

namespace diffkern {

constexpr int64_t kWidestRow = 8192;  // channels; diffkern/ops/layer_norm_modulate.py knows it too

template <bool kGated, class T, int V, int kVectors, int kWarps>
void launch_rows(const Launch& launch, const Rows& p) {
  constexpr int kRows = kBlockRows<kWarps>;
  const int64_t blocks = (p.rows + kRows - 1) / kRows;
  launch(norm_rows<kGated, T, V, kVectors, kWarps>, dim3(static_cast<unsigned>(blocks)), 32 * kWarps * kRows, 0, p);
}

// Normalises the rows, if there are any. `aligned`: all that p points to lies on 16 bytes.
template <bool kGated>
void normalise_rows(const char* op, const Launch& launch, ScalarType dtype, bool aligned, const Rows& p) {
  check(p.channels <= kWidestRow, op, ": takes at most ", kWidestRow, " channels, got ", p.channels);
  check(p.rows <= INT32_MAX, op, ": takes at most ", INT32_MAX, " rows");
  if (p.rows == 0 || p.channels == 0) {
    return;
  }
  with_dtype(op, dtype, [&]<class T>(T*) {
    constexpr int V = kWide<T>;
    const int vectors = p.channels / V;
    if (!aligned || p.channels % V != 0) {
      return launch_rows<kGated, T, 1, 16, 16>(launch, p);
    }
    if (vectors <= 64) {
      return launch_rows<kGated, T, V, 2, 1>(launch, p);
    }
    if (vectors <= 192) {
      return launch_rows<kGated, T, V, 3, 2>(launch, p);
    }
    if (vectors <= 384) {
      return launch_rows<kGated, T, V, 3, 4>(launch, p);
    }
    if (vectors <= 1024) {
      return launch_rows<kGated, T, V, 4, 8>(launch, p);
    }
    if constexpr (sizeof(T) == 4) {
      launch_rows<kGated, T, V, 4, 16>(launch, p);
    }
  });
}

// What layer_norm_modulate and gate_residual_norm_modulate are given, without data: x is [B, T, C].
inline Rows rows_of(const char* op, const Tensor& x, const MaybeTensor& shift, const MaybeTensor& scale,
                    const MaybeTensor& weight, const MaybeTensor& bias, double eps) {
  check(x.dim() == 3 && x.is_contiguous(), op, ": x must be contiguous [B, T, C], got ", shape_of(x));
  check(shift.has_value() == scale.has_value(), op, ": give shift and scale together or neither");
  const int64_t batch = x.size(0), tokens = x.size(1), channels = x.size(2);
  const ScalarType dtype = x.scalar_type();
  Rows p{};
  p.x = x.const_data_ptr();
  p.shift = parameter(op, "shift", shift, {batch, channels}, dtype);
  p.scale = parameter(op, "scale", scale, {batch, channels}, dtype);
  p.weight = parameter(op, "weight", weight, {channels}, dtype);
  p.bias = parameter(op, "bias", bias, {channels}, dtype);
  p.rows = batch * tokens;
  p.tokens = static_cast<int>(tokens);
  p.channels = static_cast<int>(channels);
  p.share = 1.0f / static_cast<float>(channels);
  p.eps = static_cast<float>(eps);
  return p;
}

inline bool aligned(const Rows& p) {
  return aligned(p.x, p.y, p.r, p.out, p.gate.data, p.shift.data, p.scale.data, p.weight.data, p.bias.data);
}

}  // namespace diffkern

// layer_norm_modulate_backward, see diffkern/ops/layer_norm_modulate_backward.py. A row of x and of grad is read from
// memory once. The sums over tokens are taken a chunk of tokens at a time and folded in order, so that neither threads
// nor the batch change a bit of them.
#include "layer_norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::layer_norm_modulate_backward";
constexpr int64_t kTokens = 32;  // of a chunk

// One row: the gradient of x, and what the row adds to the sums over tokens. `normal` and `room` hold a row each; g may
// be in `room`.
template <class T>
void row(const float* g, const float* x, const float* factor, int64_t n, double eps, float* normal, float* room, T* out,
         float* sum, float* sum_normal) {
  const Normal norm = normal_of(moments(x, n), n, eps);
#pragma omp simd  // seven arrays: too many for the compiler to compare their places before it dares
  for (int64_t i = 0; i < n; ++i) {
    normal[i] = norm(x[i]);
    sum[i] += g[i];
    sum_normal[i] += g[i] * normal[i];
    room[i] = g[i] * factor[i];  // rounded here once, so that the mean of a row of equal values takes all of it away
  }
  const float mean = sum_of(n, [=](int64_t i) { return room[i]; }) / static_cast<float>(n);
  const float along = sum_of(n, [=](int64_t i) { return room[i] * normal[i]; }) / static_cast<float>(n);
  emit(out, n, [=](int64_t i) { return norm.scale * (room[i] - mean - normal[i] * along); });
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_modulate_backward(const Tensor& grad, const Tensor& x,
                                                                const std::optional<Tensor>& scale,
                                                                const std::optional<Tensor>& weight, double eps) {
  check(x.dim() == 3 && x.is_contiguous(), kOp, ": x must be contiguous [B, T, C], got ", shape_of(x));
  const int64_t batch = x.size(0), tokens = x.size(1), n = x.size(2), chunks = (tokens + kTokens - 1) / kTokens;
  const std::vector<float> w = parameter(kOp, "weight", weight, n, 1.0f);
  std::vector<float> factor(batch * n, 0.0f);
  if (scale) {
    factor = per_sample(kOp, "scale", *scale, batch, n);
  }
  for (int64_t i = 0; i < batch * n; ++i) {
    factor[i] = w[i % n] * (1.0f + factor[i]);
  }
  Tensor grad_x = empty_as(x, x.scalar_type(), batch);
  Tensor sum = empty({batch, n}, ScalarType::Float);
  Tensor sum_normal = empty({batch, n}, ScalarType::Float);
  std::vector<float> parts(batch * chunks * 2 * n, 0.0f);
  with_dtype(kOp, x.scalar_type(), [&]<class T>(T*) {
    const T* in = static_cast<const T*>(x.const_data_ptr());
    const T* from = data_like<T>(kOp, "grad", grad, x.scalar_type(), x, batch);
    T* out = data_of<T>(grad_x);
    in_parallel(batch * chunks, kTokens * n, [&](int64_t begin, int64_t end) {
      std::vector<float> g_room(n), x_room(n), normal(n);
      for (int64_t k = begin; k < end; ++k) {
        const int64_t b = k / chunks, first = k % chunks * kTokens, last = std::min(tokens, first + kTokens);
        float *s = &parts[k * 2 * n], *sn = s + n;
        for (int64_t at = (b * tokens + first) * n; at < (b * tokens + last) * n; at += n) {
          const float *g = as_float(from + at, g_room.data(), n), *v = as_float(in + at, x_room.data(), n);
          row(g, v, &factor[b * n], n, eps, normal.data(), g_room.data(), out + at, s, sn);
        }
      }
    });
  });
  float *s = data_of<float>(sum), *sn = data_of<float>(sum_normal);
  for (int64_t b = 0; b < batch; ++b) {
    std::fill_n(s + b * n, n, 0.0f);
    std::fill_n(sn + b * n, n, 0.0f);
    for (int64_t k = b * chunks; k < (b + 1) * chunks; ++k) {
      for (int64_t i = 0; i < n; ++i) {
        s[b * n + i] += parts[k * 2 * n + i];
        sn[b * n + i] += parts[k * 2 * n + n + i];
      }
    }
  }
  return {grad_x, sum, sum_normal};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def(
      "layer_norm_modulate_backward(Tensor grad, Tensor x, Tensor? scale, Tensor? weight, float eps) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) {
  m.impl("layer_norm_modulate_backward", TORCH_BOX(&layer_norm_modulate_backward));
}

}  // namespace diffkern

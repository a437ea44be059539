// qk_norm_rope, see diffkern/ops/qk_norm_rope.py. A head is read from memory once; the angles serve all of a token.
#include "rms_norm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::qk_norm_rope";

struct Rotation {
  const float *cos, *sin;  // [S, D], or nullptr for none
  bool interleaved;

  // The other half of each rotated pair, with its sign: (-b, a) for (a, b).
  void turned(const float* x, int64_t n, float* out) const {
    const int64_t half = n / 2;
    if (interleaved) {
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        out[2 * i] = -x[2 * i + 1];
        out[2 * i + 1] = x[2 * i];
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        out[i] = -x[i + half];
        out[i + half] = x[i];
      }
    }
  }
};

// N: the numbers of a head where they are known beforehand, which makes one of 64 a few registers; or 0.
template <class T, int64_t N>
void heads(const Tensor& x, const std::optional<Tensor>& weight, const char* name, const Rotation& rotation, double eps,
           Tensor& y) {
  const int64_t tokens = x.size(1), count = x.size(2), n = N ? N : x.size(3);
  const std::vector<float> weights = parameter(kOp, name, weight, n, 1.0f);
  const T* in = static_cast<const T*>(x.const_data_ptr());
  T* out = data_of<T>(y);
  if (rotation.cos == nullptr) {
    if (weight) {
      rms_norm_rows<N>(in, weights, eps, x.size(0) * tokens * count, n, out);
    } else {
      std::copy_n(in, x.numel(), out);
    }
    return;
  }
  in_parallel(x.size(0) * tokens, count * n, [&](int64_t begin, int64_t end) {
    std::vector<float> room(n), normal(n), other(n);
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t at = r * count * n; at < (r + 1) * count * n; at += n) {
        const float* v = as_float(in + at, room.data(), n);
        if (weight) {
          const float scale = rms_scale(Row<float>{v}, n, eps);
          float* scaled = normal.data();
          const float* w = weights.data();
          for (int64_t i = 0; i < n; ++i) {
            scaled[i] = v[i] * scale * w[i];
          }
          v = scaled;
        }
        const float *cos = rotation.cos + r % tokens * n, *sin = rotation.sin + r % tokens * n, *o = other.data();
        rotation.turned(v, n, other.data());
        emit(out + at, n, [=](int64_t i) { return v[i] * cos[i] + o[i] * sin[i]; });
      }
    }
  });
}

const float* angles(const char* name, const std::optional<Tensor>& t, const Tensor& q) {
  if (!t) {
    return nullptr;
  }
  check(t->dim() == 2 && t->size(0) == q.size(1) && t->size(1) == q.size(3), kOp, ": ", name, " must be [", q.size(1),
        ", ", q.size(3), "], got ", shape_of(*t));
  return float_data(kOp, name, *t);
}

std::tuple<Tensor, Tensor> qk_norm_rope(const Tensor& q, const Tensor& k, const std::optional<Tensor>& q_weight,
                                        const std::optional<Tensor>& k_weight, const std::optional<Tensor>& cos,
                                        const std::optional<Tensor>& sin, bool interleaved, double eps) {
  check(q.dim() == 4 && q.is_contiguous(), kOp, ": q must be contiguous [B, S, H, D], got ", shape_of(q));
  check(k.dim() == 4 && k.is_contiguous() && k.scalar_type() == q.scalar_type() && k.size(0) == q.size(0) &&
            k.size(1) == q.size(1) && k.size(3) == q.size(3),
        kOp, ": k must be contiguous [", q.size(0), ", ", q.size(1), ", Hk, ", q.size(3), "] in the dtype of q, got ",
        shape_of(k));
  check(cos.has_value() == sin.has_value(), kOp, ": give cos and sin together or neither");
  check(!cos || q.size(3) % 2 == 0, kOp, ": D is ", q.size(3), ", a rotation needs pairs");
  const Rotation rotation{angles("cos", cos, q), angles("sin", sin, q), interleaved};
  Tensor q_out = empty_as(q, q.scalar_type(), q.size(0)), k_out = empty_as(k, k.scalar_type(), k.size(0));
  with_dtype(kOp, q.scalar_type(), [&]<class T>(T*) {
    const auto run = [&]<int64_t N>(std::integral_constant<int64_t, N>) {
      heads<T, N>(q, q_weight, "q_weight", rotation, eps, q_out);
      heads<T, N>(k, k_weight, "k_weight", rotation, eps, k_out);
    };
    switch (q.size(3)) {
      case 64:
        return run(std::integral_constant<int64_t, 64>{});
      case 128:
        return run(std::integral_constant<int64_t, 128>{});
      default:
        return run(std::integral_constant<int64_t, 0>{});
    }
  });
  return {q_out, k_out};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def(
      "qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, "
      "bool interleaved, float eps) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) { m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope)); }

}  // namespace diffkern

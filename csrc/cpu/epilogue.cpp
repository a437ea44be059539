// What follows the product of linear and conv2d, in one pass: activation(y + add) * gate + residual, see
// diffkern/ops/linear.py and conv2d.py. Rows are tokens or pixels; add and gate hold one row a sample.
#include "activation.h"
#include "dense.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <type_traits>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::epilogue";

struct Problem {
  int64_t rows, width, rows_a_sample;
  std::vector<float> add, gate;  // [B, width], empty for none
};

// The loops say `simd` because out may be y itself: in place is no hazard, but the compiler's own check would see one.
template <Activation kActivation, class In, class Out>
void run(const Problem& p, const In* y, const Out* residual, Out* out) {
  constexpr bool kHalves = is_gated(kActivation);
  const int64_t stride = kHalves ? 2 * p.width : p.width, grain = std::max<int64_t>(1, kSerial / p.width);
  torch::stable::parallel_for(0, p.rows, grain, [&](int64_t begin, int64_t end) {
    float y_room[kRun], half_room[kRun], residual_room[kRun], out_room[kRun];
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t at = 0; at < p.width; at += kRun) {
        const int64_t n = std::min(kRun, p.width - at), sample = row / p.rows_a_sample * p.width + at;
        const float* v = as_float(y + row * stride + at, y_room, n);
        const float* half = kHalves ? as_float(y + row * stride + p.width + at, half_room, n) : v;
        float* to = place(out + row * p.width + at, out_room);
        if (p.add.empty()) {
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) {
            to[i] = activate<kActivation>(v[i], half[i]);
          }
        } else {
          const float* add = &p.add[sample];
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) {
            to[i] = activate<kActivation>(v[i] + add[i], half[i]);
          }
        }
        if (!p.gate.empty()) {
          const float* gate = &p.gate[sample];
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) {
            to[i] *= gate[i];
          }
        }
        if (residual != nullptr) {
          const float* rest = as_float(residual + row * p.width + at, residual_room, n);
#pragma omp simd
          for (int64_t i = 0; i < n; ++i) {
            to[i] += rest[i];
          }
        }
        put(to, out + row * p.width + at, n);
      }
    }
  });
}

// A row a sample [B, width] in float32, empty if there is none. Sets how many rows of the result a sample has.
std::vector<float> rows_of(const char* name, const std::optional<Tensor>& t, Problem& p) {
  std::vector<float> wide;
  if (t) {
    check(t->dim() == 2 && t->size(1) == p.width && t->is_contiguous() && t->size(0) > 0 && p.rows % t->size(0) == 0,
          kOp, ": ", name, " must be contiguous [B, ", p.width, "], got ", shape_of(*t));
    p.rows_a_sample = p.rows / t->size(0);
    wide.resize(t->numel());
    with_dtype(kOp, t->scalar_type(), [&]<class T>(T*) {
      widen(static_cast<const T*>(t->const_data_ptr()), wide.data(), t->numel());
    });
  }
  return wide;
}

// out may be y itself, if they have one dtype and the activation takes no halves.
void epilogue(Tensor out, const Tensor& y, const std::optional<Tensor>& add, int64_t activation,
              const std::optional<Tensor>& gate, const std::optional<Tensor>& residual) {
  check(out.dim() >= 1 && out.is_contiguous() && y.is_contiguous(), kOp, ": y and out must be contiguous");
  if (out.numel() == 0) {
    return;
  }
  const int64_t width = out.size(out.dim() - 1), halves = is_gated(activation) ? 2 : 1;
  check(y.numel() == halves * out.numel(), kOp, ": y has ", y.numel(), " elements, out has ", out.numel());
  Problem p{out.numel() / width, width, out.numel() / width, {}, {}};
  p.add = rows_of("add", add, p);
  p.gate = rows_of("gate", gate, p);
  const ScalarType dtype = out.scalar_type();
  check(!residual || (residual->numel() == out.numel() && residual->is_contiguous() && residual->scalar_type() == dtype),
        kOp, ": residual must have the shape and dtype of out, contiguous");
  const bool wide = y.scalar_type() == ScalarType::Float;
  check(wide || y.scalar_type() == dtype, kOp, ": y must be float32 or have the dtype of out");
  with_dtype(kOp, dtype, [&]<class T>(T*) {
    const T* rest = residual ? static_cast<const T*>(residual->const_data_ptr()) : nullptr;
    with_activation(kOp, activation, [&](auto kind) {
      if (wide) {
        run<decltype(kind)::value>(p, static_cast<const float*>(y.const_data_ptr()), rest, data_of<T>(out));
      } else {
        run<decltype(kind)::value>(p, static_cast<const T*>(y.const_data_ptr()), rest, data_of<T>(out));
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def("epilogue(Tensor(a!) out, Tensor y, Tensor? add, SymInt activation, Tensor? gate, Tensor? residual) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) { m.impl("epilogue", TORCH_BOX(&epilogue)); }

}  // namespace diffkern

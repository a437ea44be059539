// linear, and a weight in panels, see diffkern/ops/linear.py. The product is linear.h's.
#include "dense.h"
#include "linear.h"

#include <torch/csrc/stable/library.h>

#include <optional>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::linear";

// [rows, columns.total()] in float32, in the order of the sums: zeros where there is none.
std::vector<float> arranged(const Columns& columns, const std::optional<Tensor>& bias) {
  std::vector<float> out(columns.total());
  if (bias) {
    std::vector<float> numbers(bias->numel());
    with_dtype(kOp, bias->scalar_type(), [&]<class T>(T*) {
      widen(static_cast<const T*>(bias->const_data_ptr()), numbers.data(), bias->numel());
    });
    for (int64_t i = 0; i < columns.total(); ++i) {
      out[i] = columns.row(i) < 0 ? 0.0f : numbers[columns.row(i)];
    }
  }
  return out;
}

// A weight [N, K], or [N, taps, channels] for a convolution, in panels. gated: whether its second half of rows gates
// the first.
Tensor panels(const Tensor& weight, bool gated) {
  check(weight.dim() >= 2 && weight.is_contiguous() && weight.numel() > 0, kOp,
        ": weight must be contiguous [N, ..., channels], got ", shape_of(weight));
  const int64_t n = weight.size(0), channels = weight.size(weight.dim() - 1), taps = weight.numel() / n / channels;
  check(!gated || n % 2 == 0, kOp, ": the rows of a gated weight are even in number, got ", n);
  const Columns columns{gated ? n / 2 : n, gated};
  std::optional<Tensor> out;
  with_dtype(kOp, weight.scalar_type(), [&]<class T>(T*) {
    using W = Words<T>;
    const int64_t words = taps * words_of<W>(channels);
    out = empty({words, columns.total() * W::kNumbers}, kKept<T>);
    auto* to = static_cast<typename W::Word*>(out->mutable_data_ptr());
    const int64_t grain = std::max<int64_t>(1, kSerial / (words * kPanel));
    torch::stable::parallel_for(0, columns.panels(), grain, [&](int64_t begin, int64_t end) {
      arrange(columns, taps, channels, static_cast<const T*>(weight.const_data_ptr()), begin, end, to);
    });
  });
  return *out;
}

Tensor linear(const Tensor& x, const Tensor& weight, int64_t results, const std::optional<Tensor>& bias,
              int64_t activation, const std::optional<Tensor>& gate, const std::optional<Tensor>& residual) {
  check(x.dim() >= 2 && x.is_contiguous() && x.numel() > 0 && results >= 1, kOp,
        ": x must be contiguous [B, ..., K], got ", shape_of(x));
  const ScalarType dtype = x.scalar_type();
  const int64_t channels = x.size(x.dim() - 1), rows = x.numel() / channels;
  const Columns columns{results, is_gated(activation)};
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = results;
  const auto fits = [&](const char* name, const std::optional<Tensor>& t, const std::vector<int64_t>& size) {
    check(!t || (t->is_contiguous() && has_shape(*t, size) && t->scalar_type() == dtype), kOp, ": ", name,
          " must be contiguous ", shape_of(size), " of the dtype of x");
  };
  fits("bias", bias, {columns.gated ? 2 * results : results});
  fits("gate", gate, {x.size(0), results});
  fits("residual", residual, shape);
  const std::vector<float> shift = arranged(columns, bias);
  Tensor out = empty(shape, dtype);
  with_dtype(kOp, dtype, [&]<class T>(T*) {
    using W = Words<T>;
    check(weight.is_contiguous() && weight.scalar_type() == kKept<T> &&
              weight.numel() == words_of<W>(channels) * columns.total() * W::kNumbers,
          kOp, ": weight was packed for another shape");
    const auto numbers = [](const std::optional<Tensor>& t) {
      return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
    };
    const Matrix<T> m{rows, channels, rows / x.size(0), columns, static_cast<const T*>(x.const_data_ptr()),
                      static_cast<const typename W::Word*>(weight.const_data_ptr()), shift.data(), numbers(gate),
                      numbers(residual), data_of<T>(out)};
    with_activation(kOp, activation, [&](auto kind) { multiply<decltype(kind)::value>(m); });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def("panels(Tensor weight, bool gated) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor weight, SymInt results, Tensor? bias, SymInt activation, Tensor? gate, "
      "Tensor? residual) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) {
  m.impl("panels", TORCH_BOX(&panels));
  m.impl("linear", TORCH_BOX(&linear));
}

}  // namespace diffkern

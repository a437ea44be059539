// convolution: any kernel and stride, as a product of pixels and the weight, see diffkern/implicit_gemm.py. The work is
// convolution.h's.
#include "convolution.h"
#include "dense.h"
#include "shifts.h"

#include <torch/csrc/stable/library.h>

#include <optional>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::convolution";
constexpr int64_t kNear = 1 << 20;  // words of a weight that comes from a cache that is not far

template <class T>
void run(const Convolution<T>& c) {
  using W = Words<T>;
  const Taps taps(c.picture, W::kNumbers, sizeof(T) * W::kNumbers == sizeof(typename W::Word));
  // The rows of a block stay in a near cache, if its weight is not far.
  const int64_t words = taps.words();
  const int64_t most = words * c.columns.total() <= kNear ? std::clamp(kHeld / words, kFew, kMost) : kMost;
  share_out(taps.pixels(), most, words, c.columns, [&](int64_t rows) { return PixelWorker<T>(c, taps, rows); });
}

Tensor convolution(const Tensor& x, const Tensor& weight, int64_t results, std::vector<int64_t> kernel, int64_t stride,
                   std::vector<int64_t> padding, const std::optional<Tensor>& bias, const std::optional<Tensor>& add,
                   bool silu, const std::optional<Tensor>& residual) {
  check(is_channels_last(x), kOp, ": x must be channels_last [B, C, H, W], got ", shape_of(x));
  check(kernel.size() == 2 && kernel[0] >= 1 && kernel[1] >= 1 && stride >= 1 && results >= 1, kOp,
        ": kernel must be two numbers, they, stride and results 1 and above");
  check(padding.size() == 4 && *std::min_element(padding.begin(), padding.end()) >= 0 &&
            std::max(padding[0], padding[1]) < kernel[1] && std::max(padding[2], padding[3]) < kernel[0],
        kOp, ": padding must be four numbers, 0 and above and less than the kernel");
  Picture p{x.size(0), x.size(2), x.size(3), x.size(1), kernel[0], kernel[1], stride, padding[2], padding[0], 0, 0};
  const int64_t down = p.height + padding[2] + padding[3] - p.lines;
  const int64_t across = p.width + padding[0] + padding[1] - p.columns;
  check(x.numel() > 0 && down >= 0 && across >= 0, kOp, ": nothing to convolve in ", shape_of(x));
  p.out_height = down / stride + 1, p.out_width = across / stride + 1;
  const std::vector<int64_t> shape = {p.batch, results, p.out_height, p.out_width};
  check(!residual || (is_channels_last(*residual) && has_shape(*residual, shape) &&
                      residual->scalar_type() == x.scalar_type()),
        kOp, ": residual must have the shape, layout and dtype of the result");
  const Columns columns{results, false};
  const std::vector<float> shift = shifts(kOp, p.batch, results, columns.total(), bias, add);
  Tensor out = empty(shape, x.scalar_type(), /*channels_last=*/true);
  if (p.lines == 1 && p.columns == 1 && stride == 1) {  // each picture is one line
    p.out_width *= p.out_height, p.width *= p.height;
    p.out_height = p.height = 1;
  }
  with_dtype(kOp, x.scalar_type(), [&]<class T>(T*) {
    using W = Words<T>;
    const int64_t words = p.lines * words_of<W>(p.columns * p.channels);
    check(weight.is_contiguous() && weight.scalar_type() == kKept<T> &&
              weight.numel() == words * columns.total() * W::kNumbers,
          kOp, ": weight was packed for another shape");
    run<T>({p, columns, static_cast<const T*>(x.const_data_ptr()),
            static_cast<const typename W::Word*>(weight.const_data_ptr()), shift.data(), add ? columns.total() : 0,
            residual ? static_cast<const T*>(residual->const_data_ptr()) : nullptr, silu, data_of<T>(out)});
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def(
      "convolution(Tensor x, Tensor weight, SymInt results, int[] kernel, int stride, SymInt[] padding, Tensor? bias, "
      "Tensor? add, bool silu, Tensor? residual) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) {
  m.impl("convolution", TORCH_BOX(&convolution));
}

}  // namespace diffkern

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
constexpr int64_t kFew = 4 * kRows, kMost = 14 * kRows;  // pixels of a block
constexpr int64_t kHeld = 1 << 17, kNear = 1 << 20;      // words
constexpr int64_t kGrain = 1 << 19;                      // multiply-adds that are worth another thread

// What a weight is kept in.
template <class T>
constexpr ScalarType kKept = Words<T>::kNumbers == 2 ? ScalarType::BFloat16 : ScalarType::Float;

template <class T>
void run(const Convolution<T>& c) {
  using W = Words<T>;
  const Taps taps(c.picture, W::kNumbers, sizeof(T) * W::kNumbers == sizeof(typename W::Word));
  const int64_t threads = torch::stable::get_num_threads(), pixels = taps.pixels(), panels = c.columns.panels();
  // The rows of a block stay in a near cache, if its weight comes from one that is not far.
  const int64_t words = taps.words();
  const int64_t most = words * c.columns.total() <= kNear ? std::clamp(kHeld / words, kFew, kMost) : kMost;
  int64_t blocks = (pixels + most - 1) / most;
  // A few blocks more than needed, or some of the panels each, where that gives every thread the same share.
  while (blocks % threads != 0 && blocks < 16 * threads && pixels / (blocks + 1) >= kFew) {
    ++blocks;
  }
  const int64_t groups = blocks % threads == 0 ? 1 : std::min(threads, panels);
  const int64_t work = pixels * words * c.columns.total() / (blocks * groups);
  torch::stable::parallel_for(
      0, blocks * groups, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work)), [&](int64_t begin, int64_t end) {
        PixelWorker<T> worker(c, taps, (pixels + blocks - 1) / blocks);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t block = i / groups, group = i % groups;
          worker.run(pixels * block / blocks, pixels * (block + 1) / blocks, panels * group / groups,
                     panels * (group + 1) / groups);
        }
      });
}

// A weight [N, R, S, C] in panels.
Tensor convolution_weight(const Tensor& weight) {
  check(weight.dim() == 4 && weight.is_contiguous() && weight.numel() > 0, kOp,
        ": weight must be contiguous [N, R, S, C], got ", shape_of(weight));
  const int64_t n = weight.size(0), lines = weight.size(1), channels = weight.size(2) * weight.size(3);
  const Columns columns{n, false};
  std::optional<Tensor> out;
  with_dtype(kOp, weight.scalar_type(), [&]<class T>(T*) {
    using W = Words<T>;
    const int64_t words = lines * words_of<W>(channels);
    out = empty({words, columns.total() * W::kNumbers}, kKept<T>);
    auto* to = reinterpret_cast<typename W::Word*>(const_cast<void*>(out->const_data_ptr()));
    torch::stable::parallel_for(0, columns.panels(), 1, [&](int64_t begin, int64_t end) {
      arrange(columns, lines, channels, static_cast<const T*>(weight.const_data_ptr()), begin, end, to);
    });
  });
  return *out;
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
  m.def("convolution_weight(Tensor weight) -> Tensor");
  m.def(
      "convolution(Tensor x, Tensor weight, SymInt results, int[] kernel, int stride, SymInt[] padding, Tensor? bias, "
      "Tensor? add, bool silu, Tensor? residual) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) {
  m.impl("convolution_weight", TORCH_BOX(&convolution_weight));
  m.impl("convolution", TORCH_BOX(&convolution));
}

}  // namespace diffkern

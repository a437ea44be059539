// winograd: 3 x 3 convolutions of stride 1 by winograd.h, see diffkern/winograd.py. All of a block of tiles is done
// while it is in the cache: winograd_worker.h.
#include "dense.h"
#include "shifts.h"
#include "winograd_worker.h"

#include <torch/csrc/stable/library.h>

#include <optional>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::winograd";
constexpr int64_t kGrain = 1 << 19;  // multiply-adds that are worth another thread

template <class T, class F>
void run(Problem p, const Data<T, F>& data) {
  const int64_t groups = Panels(p.results, p.channels).groups(), threads = torch::stable::get_num_threads();
  constexpr int64_t most = Points<T, F>::kTiles;
  // A few blocks more than needed, where that gives every thread the same share.
  int64_t blocks = (p.tiles() + most - 1) / most;
  while (blocks * groups % threads != 0 && blocks < 16 * threads && p.tiles() / (blocks + 1) >= kRows) {
    ++blocks;
  }
  p.block = (p.tiles() + blocks - 1) / blocks;
  blocks = (p.tiles() + p.block - 1) / p.block;
  const int64_t work = p.block * F::kArea * p.channels * p.results / groups;
  torch::stable::parallel_for(0, blocks * groups, std::max<int64_t>(1, kGrain / work), [&](int64_t begin, int64_t end) {
    Worker<T, F> worker(p, data);
    for (int64_t i = begin; i < end; ++i) {
      worker.run(i / groups, i % groups);
    }
  });
}

Tensor winograd(const Tensor& x, const Tensor& weight, int64_t results, std::vector<int64_t> padding,
                const std::optional<Tensor>& bias, const std::optional<Tensor>& add, bool silu,
                const std::optional<Tensor>& residual, bool upsample, int64_t pixels,
                const std::optional<Tensor>& inverse) {
  check(pixels == 2 || pixels == 4 || pixels == 6, kOp, ": pixels must be 2, 4 or 6, got ", pixels);
  check(is_channels_last(x), kOp, ": x must be channels_last [B, C, H, W], got ", shape_of(x));
  check(padding.size() == 4 && *std::min_element(padding.begin(), padding.end()) >= 0, kOp,
        ": padding must be four numbers, 0 and above");
  check(!upsample || padding == std::vector<int64_t>(4, 1), kOp, ": the padding of a doubled picture must be 1");
  const int64_t scale = upsample ? 2 : 1;
  Problem p{x.size(0), x.size(2), x.size(3), x.size(1), results, 0, 0, padding[2], padding[0], 0, 0, 0, silu};
  p.out_height = p.height * scale + padding[2] + padding[3] - 2;
  p.out_width = p.width * scale + padding[0] + padding[1] - 2;
  p.tile_rows = (p.out_height + pixels - 1) / pixels, p.tile_columns = (p.out_width + pixels - 1) / pixels;
  check(results >= 1 && p.channels >= 1 && p.out_height >= 1 && p.out_width >= 1, kOp, ": nothing to convolve in ",
        shape_of(x));
  const Panels panels(results, p.channels);
  const ScalarType kept = keeps_points(pixels) ? ScalarType::Float : x.scalar_type();
  check(weight.scalar_type() == kept && weight.is_contiguous() && weight.numel() == panels.size(), kOp,
        ": weight was packed for another shape");
  const int64_t area = upsample ? Integers<true>::kArea : Integers<false>::kArea;
  check(!inverse || (pixels == 4 && inverse->scalar_type() == ScalarType::Float && inverse->is_contiguous() &&
                     inverse->numel() == panels.total * area),
        kOp, ": units are of tiles of 4 x 4, and were measured for another shape");
  const std::vector<int64_t> shape = {p.batch, results, p.out_height, p.out_width};
  Tensor out = empty(shape, x.scalar_type(), /*channels_last=*/true);
  check(!residual || (is_channels_last(*residual) && has_shape(*residual, shape) &&
                      residual->scalar_type() == x.scalar_type()),
        kOp, ": residual must have the shape, layout and dtype of the result");
  if (out.numel() == 0) {
    return out;
  }
  const std::vector<float> shift = shifts(kOp, p.batch, results, panels.total, bias, add);
  with_dtype(kOp, x.scalar_type(), [&]<class T>(T*) {
    const T* rest = residual ? static_cast<const T*>(residual->const_data_ptr()) : nullptr;
    with_form(pixels, upsample, inverse.has_value(), [&]<class F>() {
      run<T, F>(p, {static_cast<const T*>(x.const_data_ptr()),
                    static_cast<const Kept<T, F>*>(weight.const_data_ptr()),
                    inverse ? static_cast<const float*>(inverse->const_data_ptr()) : nullptr, shift.data(),
                    add ? panels.total : 0, rest, data_of<T>(out)});
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def(
      "winograd(Tensor x, Tensor weight, SymInt results, SymInt[] padding, Tensor? bias, Tensor? add, bool silu, "
      "Tensor? residual, bool upsample, int pixels, Tensor? inverse) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) { m.impl("winograd", TORCH_BOX(&winograd)); }

}  // namespace diffkern

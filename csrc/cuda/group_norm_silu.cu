// group_norm_silu: see diffkern/ops/group_norm_silu.py. How a call is cut and launched; the cut is decided by the shape
// of a sample alone.
#include "group_norm_silu.cuh"
#include "parameters.h"

#include <cmath>
#include <numeric>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::group_norm_silu";
constexpr int kWidestGroup = kGroupThreads;  // channels; diffkern/ops/group_norm_silu.py knows it too

// The cut for numbers of `size` bytes, V at a time.
GroupCut cut_for(const GroupNorm& p, int V, int size) {
  constexpr int64_t kLeast = 8 << 10, kMost = 256;  // bytes of a run; runs, two for each SM of an H100
  GroupCut cut{};
  const int narrowest = std::lcm(V, p.per_group);
  cut.width = std::min(p.channels, kGroupThreads * V / narrowest * narrowest);
  cut.slabs = (p.channels + cut.width - 1) / cut.width;
  // Each block of `normalise` reads the moments of all runs: a third as many bytes as of its own run, at most.
  const int64_t row = int64_t{cut.width} * size, bytes = p.pixels * row;
  const auto few = static_cast<int64_t>(std::sqrt(static_cast<double>(bytes) / (3 * sizeof(Mean) * cut.groups(p))));
  const int64_t runs = std::clamp<int64_t>(std::min(few, bytes / kLeast), 1, kMost);
  cut.length = (p.pixels + runs - 1) / runs;
  cut.runs = static_cast<int>((p.pixels + cut.length - 1) / cut.length);
  const int columns = cut.width / V;
  cut.threads = (columns * static_cast<int>(std::min<int64_t>(kGroupThreads / columns, cut.length)) + 31) / 32 * 32;
  cut.parts = std::max(1, cut.threads / cut.groups(p));
  cut.per_group = static_cast<uint32_t>(((uint64_t{1} << 32) + p.per_group - 1) / p.per_group);
  return cut;
}

template <class T, int V>
void run(const Launch& launch, const Tensor& x, const GroupNorm& p) {
  const GroupCut cut = cut_for(p, V, sizeof(T));
  const int groups = cut.groups(p);
  const int64_t blocks = x.size(0) * cut.slabs * cut.runs;
  check(blocks <= INT32_MAX, kOp, ": the batch is too large");
  const dim3 grid(static_cast<unsigned>(blocks));
  const Tensor room = empty_on(x, {blocks * groups * 2}, ScalarType::Float);
  Mean* partial = static_cast<Mean*>(room.mutable_data_ptr());
  constexpr int kFloat = sizeof(float);
  const int rows = cut.threads / (cut.width / V);
  launch(group_moments<T, V>, grid, cut.threads, kFloat * moments_room(rows, cut.width), p, cut, partial);
  launch.after(normalise<T, V>, grid, cut.threads, kFloat * pooling_room(cut.parts, groups), p, cut, partial);
}

Tensor group_norm_silu(const Tensor& x, int64_t num_groups, const MaybeTensor& weight, const MaybeTensor& bias,
                       double eps, bool silu, const MaybeTensor& add, const MaybeTensor& scale,
                       const MaybeTensor& shift, const MaybeTensor& skip) {
  check(x.dim() >= 2, kOp, ": x must be [B, C, ...], got ", shape_of(x));
  const int64_t batch = x.size(0), own = x.size(1), more = skip ? skip->size(1) : 0, channels = own + more;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  if (skip) {
    shape[1] = more;
    check(skip->scalar_type() == x.scalar_type() && has_shape(*skip, shape) && is_channels_last(*skip), kOp,
          ": skip must have the dtype, the layout and, but for the channels, the shape of x, ", shape_of(x), ", got ",
          shape_of(*skip));
  }
  check(num_groups >= 1 && channels % num_groups == 0, kOp, ": num_groups is ", num_groups,
        ", allowed are the divisors of the ", channels, " channels");
  check(channels / num_groups <= kWidestGroup, kOp, ": takes at most ", kWidestGroup, " channels a group");
  check((scale.has_value() == shift.has_value()), kOp, ": give scale and shift together or neither");
  check(is_channels_last(x), kOp, ": x must be channels_last");
  shape[1] = channels;
  const Tensor y = empty_on(x, shape, x.scalar_type(), true);
  if (y.numel() == 0) {
    return y;
  }

  const ScalarType dtype = x.scalar_type();
  GroupNorm p{};
  p.x = x.const_data_ptr();
  p.skip = more ? skip->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.add = parameter(kOp, "add", add, {batch, channels}, dtype);
  p.weight = parameter(kOp, "weight", weight, {channels}, dtype);
  p.bias = parameter(kOp, "bias", bias, {channels}, dtype);
  p.scale = parameter(kOp, "scale", scale, {batch, channels}, dtype);
  p.shift = parameter(kOp, "shift", shift, {batch, channels}, dtype);
  p.pixels = y.numel() / (batch * channels);
  p.own = static_cast<int>(own);
  p.channels = static_cast<int>(channels);
  p.per_group = static_cast<int>(channels / num_groups);
  p.eps = static_cast<float>(eps);
  p.silu = silu;
  const Launch launch(kOp, x, weight, bias, add, scale, shift, skip);
  const bool is_aligned = aligned(p.x, p.skip, p.y, p.add.data, p.weight.data, p.bias.data, p.scale.data, p.shift.data);
  with_dtype(kOp, dtype, [&]<class T>(T*) {
    constexpr int V = kWide<T>;
    const bool whole = own % V == 0 && channels % V == 0 && std::lcm(V, p.per_group) <= kWidestGroup;
    (is_aligned && whole ? run<T, V> : run<T, 1>)(launch, x, p);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_CUDA, m) {
  m.def(
      "group_norm_silu(Tensor x, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, bool silu, Tensor? add, "
      "Tensor? scale, Tensor? shift, Tensor? skip) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_CUDA, DIFFKERN_KEY, m) { m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu)); }

}  // namespace diffkern

// group_norm_silu: see diffkern/ops/group_norm_silu.py. How a call is cut and launched; the cut is decided by the shape
// of a sample alone.
#include "group_norm_silu.cuh"
#include "parameters.h"

#include <cmath>
#include <functional>
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
  cut.runs = cut.moments = static_cast<int>((p.pixels + cut.length - 1) / cut.length);
  const int columns = cut.width / V;
  cut.threads = (columns * static_cast<int>(std::min<int64_t>(kGroupThreads / columns, cut.length)) + 31) / 32 * 32;
  cut.parts = std::max(1, cut.threads / cut.groups(p));
  cut.per_group = static_cast<uint32_t>(((uint64_t{1} << 32) + p.per_group - 1) / p.per_group);
  return cut;
}

template <class T, int V>
void run(const Launch& launch, const Tensor& x, const GroupNorm& p, const GivenMoments& given) {
  GroupCut cut = cut_for(p, V, sizeof(T));
  const int groups = cut.groups(p), rows = cut.threads / (cut.width / V);
  const int64_t units = x.size(0) * cut.slabs, blocks = units * cut.runs;
  const int64_t pooling = x.size(0) * (p.channels / p.per_group);
  check(blocks <= INT32_MAX && pooling <= INT32_MAX, kOp, ": the batch is too large");
  const dim3 grid(static_cast<unsigned>(blocks));
  cut.moments = given.x ? 1 : cut.runs;
  const Tensor room = empty_on(x, {units * cut.moments * groups * 2}, ScalarType::Float);
  Mean* partial = static_cast<Mean*>(room.mutable_data_ptr());
  constexpr int kFloat = sizeof(float);
  if (given.x) {
    const dim3 each(static_cast<unsigned>(pooling));
    launch(pool_moments<T>, each, kPoolThreads, kPoolThreads / 32 * sizeof(Mean), p, cut, given, partial);
  } else {
    launch(group_moments<T, V>, grid, cut.threads, kFloat * moments_room(rows, cut.width), p, cut, partial);
  }
  launch.after(normalise<T, V>, grid, cut.threads, kFloat * pooling_room(cut.parts, groups), p, cut, partial);
}

// The moments of x, and of skip if there is one: [B, chunks, 2 channels of each].
GivenMoments given_moments(const Tensor& x, const MaybeTensor& skip, int64_t pixels, const MaybeTensor& moments,
                           const MaybeTensor& skip_moments) {
  if (!moments && !skip_moments) {
    return {};
  }
  check(moments && skip.has_value() == skip_moments.has_value(), kOp,
        ": give the moments of x, and of skip if there is one, or none");
  const int64_t batch = x.size(0), width = 2 * x.size(1), chunks = moments->dim() == 3 ? moments->size(1) : 0;
  check(chunks >= 1 && chunks <= std::max<int64_t>(1, pixels), kOp, ": moments must be [", batch,
        ", chunks of pixels, ", width, "], got ", shape_of(*moments));
  check(chunks <= INT32_MAX / kWidestGroup, kOp, ": moments has too many chunks");
  const auto numbers = [&](const char* name, const Tensor& t, int64_t channels) {
    const std::vector<int64_t> shape{batch, chunks, 2 * channels};
    check(has_shape(t, shape), kOp, ": ", name, " must be ", shape_of(shape), ", got ", shape_of(t));
    check(t.is_contiguous() && t.scalar_type() == ScalarType::Float, kOp, ": ", name, " must be contiguous float32");
    return static_cast<const float*>(t.const_data_ptr());
  };
  const float* of_x = numbers("moments", *moments, x.size(1));
  const float* of_skip = skip ? numbers("skip_moments", *skip_moments, skip->size(1)) : nullptr;
  return {of_x, of_skip, static_cast<int>(chunks), (pixels + chunks - 1) / chunks};
}

Tensor group_norm_silu(const Tensor& x, int64_t num_groups, const MaybeTensor& weight, const MaybeTensor& bias,
                       double eps, bool silu, const MaybeTensor& add, const MaybeTensor& scale,
                       const MaybeTensor& shift, const MaybeTensor& skip, const MaybeTensor& moments,
                       const MaybeTensor& skip_moments) {
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
  const int64_t pixels = std::accumulate(shape.begin() + 2, shape.end(), int64_t{1}, std::multiplies<>());
  const GivenMoments given = given_moments(x, skip, pixels, moments, skip_moments);
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
  p.pixels = pixels;
  p.own = static_cast<int>(own);
  p.channels = static_cast<int>(channels);
  p.per_group = static_cast<int>(channels / num_groups);
  p.eps = static_cast<float>(eps);
  p.silu = silu;
  const Launch launch(kOp, x, weight, bias, add, scale, shift, skip, moments, skip_moments);
  const bool is_aligned = aligned(p.x, p.skip, p.y, p.add.data, p.weight.data, p.bias.data, p.scale.data, p.shift.data);
  with_dtype(kOp, dtype, [&]<class T>(T*) {
    constexpr int V = kWide<T>;
    const bool whole = own % V == 0 && channels % V == 0 && std::lcm(V, p.per_group) <= kWidestGroup;
    (is_aligned && whole ? run<T, V> : run<T, 1>)(launch, x, p, given);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_CUDA, m) {
  m.def(
      "group_norm_silu(Tensor x, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, bool silu, Tensor? add, "
      "Tensor? scale, Tensor? shift, Tensor? skip, Tensor? moments, Tensor? skip_moments) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_CUDA, DIFFKERN_KEY, m) { m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu)); }

}  // namespace diffkern

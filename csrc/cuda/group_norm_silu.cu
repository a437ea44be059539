// group_norm_silu: see diffkern/ops/group_norm_silu.py. How a call is cut and launched; the cut is decided by the shape
// of a sample alone.
#include "group_norm_silu.cuh"
#include "parameters.h"

#include <numeric>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::group_norm_silu";
constexpr int kWidestGroup = 512;  // channels; diffkern/ops/group_norm_silu.py knows it too

struct Plan {
  GroupCut cut;
  int vector;   // numbers that a thread reads at a time
  int vectors;  // a thread of `one_pass`; 0: two passes
};

int64_t divided(int64_t n, int64_t by) { return (n + by - 1) / by; }
int whole_warps(int64_t threads) { return static_cast<int>(divided(threads, 32) * 32); }

// Cuts a slab of `places`, each of `columns` vectors, into a cluster of at most `most_blocks` blocks whose threads have
// up to `most_vectors` vectors in registers. False if it does not fit.
bool fits_one_pass(int64_t places, int columns, int most_blocks, int most_vectors, Plan& plan) {
  constexpr int64_t kEnough = 20 << 10;  // bytes that a block reads about as fast as it could exchange moments
  const int64_t bytes = places * columns * 16;
  int blocks = 1;
  while (blocks < most_blocks && bytes > blocks * kEnough) {
    blocks *= 2;
  }
  const int64_t length = divided(places, blocks);
  for (int vectors = 4; vectors <= most_vectors; vectors *= 2) {
    const int64_t threads = columns * divided(length, vectors);
    if (threads <= one_pass_threads(vectors)) {
      plan.cut.runs = blocks;
      plan.cut.length = length;
      plan.cut.threads = whole_warps(threads);
      plan.vectors = vectors;
      return true;
    }
  }
  return false;
}

// Cuts a slab for two passes: enough blocks to fill a GPU, few enough that each can pool the moments of all.
void cut_for_two_passes(int64_t places, int columns, int size, Plan& plan) {
  constexpr int64_t kBlock = 32 << 10, kMost = 256;
  const int rows = std::max(1, two_pass_threads(plan.vector) / columns);
  const int64_t bytes = places * columns * plan.vector * size;
  const int64_t runs = std::clamp<int64_t>(divided(bytes, kBlock), 1, kMost);
  plan.cut.length = divided(divided(places, runs), rows) * rows;
  plan.cut.runs = static_cast<int>(divided(places, plan.cut.length));
  plan.cut.threads = whole_warps(int64_t{columns} * rows);
  plan.vectors = 0;
}

Plan plan_contiguous(const GroupNorm& p, int size, bool is_aligned, int most_blocks) {
  Plan plan{};
  plan.cut.width = p.per_group;
  plan.cut.slabs = p.channels / p.per_group;
  plan.vector = is_aligned && p.pixels % (16 / size) == 0 ? 16 / size : 1;
  const int64_t places = p.pixels / plan.vector * p.per_group;
  if (plan.vector == 1 || !fits_one_pass(places, 1, most_blocks, 4, plan)) {
    cut_for_two_passes(places, 1, size, plan);
  }
  return plan;
}

Plan plan_channels_last(const GroupNorm& p, int size, bool is_aligned, int most_blocks) {
  Plan plan{};
  const int wide = 16 / size;
  const bool whole = p.own % wide == 0 && p.channels % wide == 0 && std::lcm(wide, p.per_group) <= kWidestGroup;
  plan.vector = is_aligned && whole ? wide : 1;
  const int narrowest = std::lcm(plan.vector, p.per_group);
  // Slabs of at least so many bytes a pixel, which lie together.
  const auto columns = [&](int bytes) {
    plan.cut.width = static_cast<int>(std::min<int64_t>(divided(bytes, narrowest * size) * narrowest, p.channels));
    plan.cut.slabs = static_cast<int>(divided(p.channels, plan.cut.width));
    return plan.cut.width / plan.vector;
  };
  // Half a cache line or more: with short runs, else a quarter with long ones.
  if (plan.vector > 1 && (fits_one_pass(p.pixels, columns(64), most_blocks, 8, plan) ||
                          fits_one_pass(p.pixels, columns(32), most_blocks, 16, plan))) {
    return plan;
  }
  cut_for_two_passes(p.pixels, columns(128), size, plan);
  return plan;
}

template <class Layout, class T, int V>
void run(const Launch& launch, const Tensor& x, const GroupNorm& p, const Plan& plan) {
  const GroupCut& cut = plan.cut;
  const int64_t units = x.size(0) * cut.slabs, blocks = units * cut.runs;
  check(blocks <= INT32_MAX, kOp, ": the batch is too large");
  const dim3 grid(static_cast<unsigned>(blocks));
  const int rest = Layout::rest_size(cut.threads, cut.width), groups = cut.width / p.per_group;
  const int shared = static_cast<int>(sizeof(float)) * Slab::floats(cut.width, p.per_group, rest);
  if constexpr (V > 1) {
    const auto in_one_pass = [&](auto kernel) {
      launch.in_clusters(cut.runs, kernel, grid, cut.threads, shared, p, cut);
    };
    if (plan.vectors == 4) {
      return in_one_pass(one_pass<Layout, T, V, 4>);
    }
    if constexpr (std::is_same_v<Layout, ChannelsLast<T, V>>) {
      if (plan.vectors == 8) {
        return in_one_pass(one_pass<Layout, T, V, 8>);
      }
      if (plan.vectors == 16) {
        return in_one_pass(one_pass<Layout, T, V, 16>);
      }
    }
  }
  const Tensor room = empty_on(x, {blocks * groups * 3}, ScalarType::Float);
  Moments* partial = static_cast<Moments*>(room.mutable_data_ptr());
  launch(group_moments<Layout, T, V>, grid, cut.threads, shared, p, cut, partial);
  launch(normalise<Layout, T, V>, grid, cut.threads, shared, p, cut, partial);
}

Tensor group_norm_silu(const Tensor& x, int64_t num_groups, const MaybeTensor& weight, const MaybeTensor& bias,
                       double eps, bool silu, const MaybeTensor& add, const MaybeTensor& scale,
                       const MaybeTensor& shift, const MaybeTensor& skip) {
  check(x.dim() >= 2, kOp, ": x must be [B, C, ...], got ", shape_of(x));
  const int64_t batch = x.size(0), own = x.size(1), more = skip ? skip->size(1) : 0, channels = own + more;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  if (skip) {
    shape[1] = more;
    check(skip->scalar_type() == x.scalar_type() && has_shape(*skip, shape) &&
              (x.is_contiguous() ? skip->is_contiguous() : is_channels_last(*skip)),
          kOp, ": skip must have the dtype, the layout and, but for the channels, the shape of x, ", shape_of(x),
          ", got ", shape_of(*skip));
  }
  check(num_groups >= 1 && channels % num_groups == 0, kOp, ": num_groups is ", num_groups,
        ", allowed are the divisors of the ", channels, " channels");
  check(channels / num_groups <= kWidestGroup, kOp, ": takes at most ", kWidestGroup, " channels a group");
  check((scale.has_value() == shift.has_value()), kOp, ": give scale and shift together or neither");
  const bool channels_last = dense(kOp, "x", x).channels_last;
  shape[1] = channels;
  const Tensor y = empty_on(x, shape, x.scalar_type(), channels_last);
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
  const bool is_aligned = aligned(p.x, p.skip, p.y);
  with_dtype(kOp, dtype, [&]<class T>(T*) {
    constexpr int V = kWide<T>;
    const int most_blocks = launch.has_clusters() ? 8 : 1;
    if (channels_last || p.pixels == 1) {
      const Plan plan = plan_channels_last(p, sizeof(T), is_aligned, most_blocks);
      (plan.vector == 1 ? run<ChannelsLast<T, 1>, T, 1> : run<ChannelsLast<T, V>, T, V>)(launch, x, p, plan);
    } else {
      check(p.pixels * p.per_group <= INT32_MAX, kOp, ": a group is too large");
      const Plan plan = plan_contiguous(p, sizeof(T), is_aligned, most_blocks);
      (plan.vector == 1 ? run<Contiguous<T, 1>, T, 1> : run<Contiguous<T, V>, T, V>)(launch, x, p, plan);
    }
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

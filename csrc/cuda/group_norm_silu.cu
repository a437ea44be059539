// group_norm_silu: see diffkern/ops/group_norm_silu.py. How a call is cut and launched; the cut is decided by the shape
// of a sample alone.
#include "group_norm_one_pass.cuh"
#include "group_norm_silu.cuh"
#include "parameters.h"

#include <cmath>
#include <functional>
#include <numeric>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::group_norm_silu";
constexpr int64_t kMostKept = 96;            // KB in the registers of a block: 512 threads, 12 vectors each
constexpr int kWidestGroup = kGroupThreads;  // channels; diffkern/ops/group_norm_silu.py knows it too

// Completes the cut into slabs and into runs of `length`, for blocks that take up to `rows` rows of V numbers at a time,
// and for the moments of a group that will be there.
void complete(const GroupNorm& p, int V, int64_t rows, bool given, GroupCut& cut) {
  const int columns = cut.width / V;
  cut.runs = static_cast<int>((p.pixels + cut.length - 1) / cut.length);
  cut.moments = given ? 1 : cut.runs;
  cut.full = static_cast<float>(cut.length * p.per_group);
  cut.last = static_cast<float>((p.pixels - (cut.moments - 1) * cut.length) * p.per_group);
  cut.threads = static_cast<int>(columns * rows + 31) / 32 * 32;
  cut.rows = cut.threads / columns;
  cut.by_columns = Divisor(columns);
  cut.by_group = Divisor(p.per_group);
  cut.by_groups = Divisor(cut.width / p.per_group);
}

// The cut of two kernels for numbers of `size` bytes, V at a time.
GroupCut in_two(const GroupNorm& p, int V, int size, bool given) {
  // Bytes of a run, of which fewer take a block no less time; runs, two for each multiprocessor of an H100.
  constexpr int64_t kLeast = 16 << 10, kMost = 256;
  GroupCut cut{};
  const int narrowest = std::lcm(V, p.per_group);
  cut.width = std::min(p.channels, kGroupThreads * V / narrowest * narrowest);
  cut.slabs = (p.channels + cut.width - 1) / cut.width;
  // Each block of `normalise` reads the moments of all runs: a third as many bytes as of its own run, at most.
  const int64_t row = int64_t{cut.width} * size, bytes = p.pixels * row;
  const auto few = static_cast<int64_t>(std::sqrt(static_cast<double>(bytes) / (3 * sizeof(Mean) * cut.groups())));
  const int64_t runs = std::clamp<int64_t>(std::min(few, bytes / kLeast), 1, kMost);
  cut.length = (p.pixels + runs - 1) / runs;
  complete(p, V, std::min<int64_t>(kGroupThreads / (cut.width / V), cut.length), given, cut);
  cut.parts = std::max(1, cut.threads / cut.groups());
  cut.turns = (cut.moments + cut.parts - 1) / cut.parts;
  return cut;
}

// Vectors that each thread of one pass has, as few as will do, and the cut for it; 0 if no block has room for its run.
int vectors_of(const GroupNorm& p, int V, GroupCut& cut) {
  constexpr int kRoom = 96 << 10;  // bytes that a block can share on every GPU
  for (const int vectors : {4, 8, 12}) {
    const int64_t rows = (cut.length + vectors - 1) / vectors;
    if (rows * (cut.width / V) <= one_pass_threads(vectors)) {
      complete(p, V, rows, false, cut);
      return one_pass_room(cut, cut.groups()) <= kRoom ? vectors : 0;
    }
  }
  return 0;
}

// The cut of one pass by clusters of at most `most` blocks, each with about `block` bytes in its registers, and how many
// vectors a thread has; 0 if that is not possible. The widest slabs that are small enough: those are read in long runs.
std::pair<GroupCut, int> at_once(const GroupNorm& p, int V, int64_t block, int most) {
  constexpr int64_t kVector = 16, kLeast = 64;  // bytes; kLeast: of a pixel, where slabs share it
  const int units = p.channels / std::lcm(V, p.per_group);
  std::pair<GroupCut, int> found{};
  for (int slabs = 1; slabs <= units; ++slabs) {
    const int64_t pixel = kVector * (p.channels / slabs / V);
    if (units % slabs != 0 || (slabs > 1 && pixel < kLeast)) {
      continue;
    }
    GroupCut cut{};
    cut.width = p.channels / slabs, cut.slabs = slabs;
    int64_t runs = std::clamp<int64_t>((p.pixels * pixel + block - 1) / block, 1, most);
    int vectors = 0;
    for (; runs <= most && vectors == 0; ++runs) {  // more than that where threads are too few for their vectors
      cut.length = (p.pixels + runs - 1) / runs;
      vectors = vectors_of(p, V, cut);
    }
    if (vectors > 0) {
      found = {cut, vectors};
      if (cut.length * pixel <= block) {
        break;
      }
    }
  }
  return found;
}

dim3 grid_of(const Tensor& x, const GroupCut& cut) {
  check(x.size(0) <= INT32_MAX && cut.slabs <= 65535, kOp, ": the batch, or the number of channels, is too large");
  return dim3(static_cast<unsigned>(x.size(0)), cut.runs, cut.slabs);
}

template <class T, int V>
void run_at_once(const Launch& launch, const Tensor& x, const GroupNorm& p, const GroupCut& cut, int vectors) {
  const auto with = [&](auto kernel) {
    launch.in_clusters(dim3(1, cut.runs), kernel, grid_of(x, cut), cut.threads, one_pass_room(cut, cut.groups()), p,
                       cut);
  };
  vectors == 4 ? with(one_pass<T, V, 4>) : vectors == 8 ? with(one_pass<T, V, 8>) : with(one_pass<T, V, 12>);
}

template <class T, int V>
void run(const Launch& launch, const Tensor& x, const GroupNorm& p, const GivenMoments& given) {
  const GroupCut cut = in_two(p, V, sizeof(T), given.x != nullptr);
  const int groups = cut.groups();
  const Tensor room = empty_on(x, {x.size(0) * cut.slabs * cut.moments * groups * 2}, ScalarType::Float);
  Mean* partial = static_cast<Mean*>(room.mutable_data_ptr());
  const dim3 grid = grid_of(x, cut);
  constexpr int kFloat = sizeof(float);
  if (given.x) {
    const int64_t pooling = x.size(0) * (p.channels / p.per_group);
    check(pooling <= INT32_MAX, kOp, ": the batch is too large");
    const dim3 each(static_cast<unsigned>(pooling));
    launch(pool_moments<T>, each, kPoolThreads, kPoolThreads / 32 * sizeof(Mean), p, cut, given, partial);
  } else {
    launch(group_moments<T, V>, grid, cut.threads, kFloat * SharedRows::floats(cut), p, cut, partial);
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
                       const MaybeTensor& skip_moments, int64_t block) {
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
  check(block >= 0 && block <= kMostKept, kOp, ": a block keeps 1 to ", kMostKept,
        " KB, or 0 to read its input twice, got ", block);
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
    if (!is_aligned || !whole) {
      return run<T, 1>(launch, x, p, given);
    }
    if (block > 0 && !given.x) {
      const auto [cut, vectors] = at_once(p, V, block << 10, launch.since_hopper() ? kMostOfCluster : 1);
      if (vectors > 0) {
        return run_at_once<T, V>(launch, x, p, cut, vectors);
      }
    }
    run<T, V>(launch, x, p, given);
  });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_CUDA, m) {
  m.def(
      "group_norm_silu(Tensor x, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, bool silu, Tensor? add, "
      "Tensor? scale, Tensor? shift, Tensor? skip, Tensor? moments, Tensor? skip_moments, SymInt block) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_CUDA, DIFFKERN_KEY, m) { m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu)); }

}  // namespace diffkern

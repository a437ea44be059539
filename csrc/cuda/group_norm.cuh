// What the kernels of a group norm share: how a block reads a channels_last sample, and the moments of groups.
//
// A block reads whole rows of a run of pixels. A thread keeps to one vector of V channels and takes every `rows`-th
// pixel. Moments are sums of deviations from one of the values that they are of, so that nothing cancels far from zero,
// and are pooled in a fixed order; never E[x^2] - E[x]^2.
#pragma once

#include "approx.cuh"
#include "numbers.cuh"

namespace diffkern {

constexpr int kGroupThreads = 320;  // of a block at most; a multiple of the vectors in the rows of most UNets and VAEs
constexpr int kInFlight = 4;        // vectors that a thread reads at a time

struct GroupNorm {
  const void *x, *skip;  // skip: null, or the channels after those of x
  void* y;
  Parameter add, weight, bias, scale, shift;  // of a sample: add, scale and shift
  int64_t pixels;
  int own, channels, per_group;  // own: channels of x
  float eps;
  bool silu;
};

// Divides by a number that the host knows, since a product is quicker: what a kernel divides before its first read, it
// waits for. Exact while dividend * divisor < 2^32.
struct Divisor {
  uint32_t inverse = 0;  // 2^32 / the divisor, rounded up; 0 for 1

  Divisor() = default;
  explicit Divisor(int by) : inverse(static_cast<uint32_t>(((uint64_t{1} << 32) + by - 1) / by)) {}
  __host__ __device__ int operator()(int n) const {
    return inverse == 0 ? n : static_cast<int>((static_cast<uint64_t>(n) * inverse) >> 32);
  }
};

// How a sample is cut: slabs of `width` channels, nearly always one, each into `runs` of `length` pixels; decided by
// its shape alone. The grid is [samples, runs, slabs].
struct GroupCut {
  int width, slabs, runs, threads, rows;  // rows: of a block's threads
  int moments;  // of a group that are there to be pooled: one a run, or one of all where they are pooled before
  int parts, turns;  // that `normalise` pools those of runs into, each a thread a group that takes so many
  float full, last;  // numbers that they are of, and that the last is of
  int64_t length;
  Divisor by_columns, by_groups, by_group;  // vectors of a row; groups of a slab; channels of a group

  __host__ __device__ int groups() const { return by_group(width); }
};

struct alignas(8) Mean {
  float mean, squares;  // and the squares about it
};

struct Moments {
  float n;
  Mean of;
};

// Those that are of the part of this number.
__host__ __device__ inline float numbers_of(const GroupCut& cut, int part) {
  return part + 1 < cut.moments ? cut.full : cut.last;
}

// Pools the moments of parts, by deviations from what lies among them. Sums of two with the same `from` are the sum.
struct Pool {
  float from, sum = 0, squares = 0;

  __device__ explicit Pool(float from) : from(from) {}
  __device__ void add(float n, const Mean& part) {
    const float d = part.mean - from, nd = n * d;
    sum += nd;
    squares += part.squares + nd * d;
  }
  __device__ Mean of(float n) const {
    const float d = sum / n, rest = squares - sum * d;
    return {from + d, rest < 0 ? 0.0f : rest};  // NaN stays
  }
};

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, lane);
  }
  return x;
}

// Where a block is in its sample, and a thread in its block.
template <class T, int V>
struct Place {
  int64_t sample, begin, end;  // pixels
  int slab, run;
  int first, width;       // channels of the slab; the last of a sample may be narrower than the others
  int rows, row, column;  // of the block's threads, of this thread; row == rows if it has nothing to do

  __device__ Place(const GroupNorm& p, const GroupCut& cut, int64_t sample, int run, int slab)
      : sample(sample), slab(slab), run(run), rows(cut.rows) {
    const int columns = cut.width / V, thread = threadIdx.x;
    first = slab * cut.width;
    width = cut.width < p.channels - first ? cut.width : p.channels - first;
    begin = run * cut.length;
    end = begin + cut.length < p.pixels ? begin + cut.length : p.pixels;
    row = cut.by_columns(thread);
    column = thread - row * columns;
    row = row < rows && column * V < width ? row : rows;
  }

  // Of all runs of all slabs, as they lie in [samples, slabs, runs].
  __device__ int64_t index(const GroupCut& cut) const { return (sample * cut.slabs + slab) * cut.runs + run; }
  __device__ int channel() const { return first + column * V; }

  // The vectors at pixel `at`, at + rows, ... of this run: how many there are.
  template <int K>
  __device__ __forceinline__ int read(const GroupNorm& p, Numbers<T, V> (&raw)[K], int64_t at) const {
    const bool mine = channel() < p.own;
    const int pixel = mine ? p.own : p.channels - p.own;
    const T* in = static_cast<const T*>(mine ? p.x : p.skip) + (sample * p.pixels + at) * pixel + channel() -
                  (mine ? 0 : p.own);
    const int64_t step = int64_t{rows} * pixel;
    const int left = row < rows ? static_cast<int>(end - at) : 0;
    int count = 0;
#pragma unroll
    for (int i = 0; i < K; ++i) {
      if (i * rows < left) {
        raw[i].read(in + i * step);
        count = i + 1;
      }
    }
    return count;
  }
};

__device__ inline float silu(float x) { return x * approx_reciprocal(1 + approx_exp2(x * -1.44269504f)); }

// What a block shares of its rows of threads.
struct SharedRows {
  float *means, *squares, *ns;  // of a row its moments by channel, and of how many pixels they are
  int stride, rows;

  __device__ SharedRows(float* room, const GroupCut& cut)
      : means(room),
        squares(means + cut.rows * cut.width),
        ns(squares + cut.rows * cut.width),
        stride(cut.width),
        rows(cut.rows) {}

  __host__ __device__ static int floats(const GroupCut& cut) { return 2 * cut.rows * cut.width + cut.rows; }

  // The moments of a thread's channels, of n pixels, before `add`.
  template <class T, int V>
  __device__ void share(const GroupNorm& p, const Place<T, V>& here, float n, float (&mean)[V],
                        const float (&about_it)[V]) const {
    if (here.row == rows) {
      return;
    }
    if (p.add.data) {
      float added[V];
      p.add.read<T>(here.sample * p.channels + here.channel(), added);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        mean[k] += added[k];
      }
    }
    const int mine = here.row * stride + here.column * V;
    share_numbers(mean, means + mine);
    share_numbers(about_it, squares + mine);
    if (here.column == 0) {
      ns[here.row] = n;
    }
  }

  // Those of a group in a run of so many pixels, by all lanes of a warp.
  __device__ Mean pooled(const GroupNorm& p, const GroupCut& cut, int group, int pixels) const {
    const int lane = threadIdx.x % 32, first = group * p.per_group;
    const int entries = p.per_group * (pixels < rows ? pixels : rows);
    const auto entry = [&](int e) {
      const int row = cut.by_group(e), i = row * (stride - p.per_group) + first + e;
      return Moments{ns[row], {means[i], squares[i]}};
    };
    // From the mean of the first 32, not of one, which may be far out.
    Pool pool(warp_sum(lane < entries ? entry(lane).of.mean : 0) / static_cast<float>(entries < 32 ? entries : 32));
#pragma unroll 4
    for (int e = lane; e < entries; e += 32) {
      const Moments m = entry(e);
      pool.add(m.n, m.of);
    }
    pool.sum = warp_sum(pool.sum), pool.squares = warp_sum(pool.squares);
    return pool.of(static_cast<float>(pixels * p.per_group));
  }
};

// silu((x + centre) * gain + offset) of the channels of a thread.
template <class T, int V>
struct Affine {
  float centre[V], gain[V], offset[V];

  // What does not depend on the moments.
  __device__ __forceinline__ Affine(const GroupNorm& p, const Place<T, V>& here) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      centre[k] = 0, gain[k] = 1, offset[k] = 0;
    }
    if (here.row == here.rows) {
      return;
    }
    const int c = here.channel();
    const int64_t of_sample = here.sample * p.channels + c;
    if (p.add.data) {
      p.add.read<T>(of_sample, centre);
    }
    if (p.weight.data) {
      p.weight.read<T>(c, gain);
    }
    if (p.bias.data) {
      p.bias.read<T>(c, offset);
    }
    if (p.scale.data) {
      float more[V];
      p.scale.read<T>(of_sample, more);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        gain[k] *= 1 + more[k];
        offset[k] *= 1 + more[k];
      }
      p.shift.read<T>(of_sample, more);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        offset[k] += more[k];
      }
    }
  }

  // And what does: of the groups of the slab the mean, and one over the standard deviation in place of the squares.
  __device__ __forceinline__ void standardise(const GroupCut& cut, const Place<T, V>& here, const Mean* of_groups) {
    if (here.row < here.rows) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const Mean& of_group = of_groups[cut.by_group(here.column * V + k)];
        centre[k] -= of_group.mean;
        gain[k] *= of_group.squares;
      }
    }
  }

  __device__ __forceinline__ void apply(Numbers<T, V>& x, bool with_silu) const {
#pragma unroll
    for (int k = 0; k < V; k += 2) {
      constexpr int kStep = V < 2 ? 1 : 2;
      float y[kStep];
#pragma unroll
      for (int j = 0; j < kStep; ++j) {
        y[j] = (x[k + j] + centre[k + j]) * gain[k + j] + offset[k + j];
        y[j] = with_silu ? silu(y[j]) : y[j];
      }
      x.set(k, y);
    }
  }
};

}  // namespace diffkern

// What the kernels of a group norm share: the moments of groups, and the parameters of channels.
//
// A block reads a slab, some whole groups of channels, of a run of pixels. A thread takes the mean of its values and
// the squares about that mean while they are in its registers; moments are then pooled in a fixed order (Chan et al.
// 1979), never E[x^2] - E[x]^2.
#pragma once

#include "approx.cuh"
#include "numbers.cuh"

namespace diffkern {

struct GroupNorm {
  const void *x, *skip;  // skip: null, or the channels after those of x
  void* y;
  Parameter add, weight, bias, scale, shift;  // of a sample: add, scale and shift
  int64_t pixels;
  int own, channels, per_group;  // own: channels of x
  float eps;
  bool silu;
};

// How a sample is cut: slabs of `width` channels, each into `runs` of `length` places; decided by its shape alone.
struct GroupCut {
  int width, slabs, runs, threads;
  int64_t length;
};

// n values, their mean and the squares about it.
struct Moments {
  float n, mean, squares;
};

// All entries e = begin, begin + step, ... < end together.
template <class At>
__device__ Moments pooled(int begin, int end, int step, At at) {
  float n = 0, sum = 0;
#pragma unroll 4
  for (int e = begin; e < end; e += step) {
    const Moments m = at(e);
    n += m.n;
    sum += m.n * m.mean;
  }
  const float mean = n > 0 ? sum / n : 0;
  float squares = 0;
#pragma unroll 4
  for (int e = begin; e < end; e += step) {
    const Moments m = at(e);
    squares += m.squares + m.n * (m.mean - mean) * (m.mean - mean);
  }
  return {n, mean, squares};
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, lane);
  }
  return x;
}

// Those of all lanes of a warp together; every lane gets them.
__device__ inline Moments warp_pooled(const Moments& mine) {
  const float n = warp_sum(mine.n), sum = warp_sum(mine.n * mine.mean);
  const float mean = n > 0 ? sum / n : 0;
  return {n, mean, warp_sum(mine.squares + mine.n * (mine.mean - mean) * (mine.mean - mean))};
}

// Entries 0 to end together, by a whole warp.
template <class At>
__device__ Moments warp_pooled(int end, At at) {
  return warp_pooled(pooled(static_cast<int>(threadIdx.x % 32), end, 32, at));
}

// N floats of shared memory, 16 bytes at a time where there are as many.
template <int N>
__device__ __forceinline__ void from_shared(const float* from, float (&out)[N]) {
  if constexpr (N == 1) {
    out[0] = *from;
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(from + i);
      out[i] = v.x, out[i + 1] = v.y, out[i + 2] = v.z, out[i + 3] = v.w;
    }
  }
}

template <int N>
__device__ __forceinline__ void to_shared(const float (&in)[N], float* to) {
  if constexpr (N == 1) {
    *to = in[0];
  } else {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      *reinterpret_cast<float4*>(to + i) = make_float4(in[i], in[i + 1], in[i + 2], in[i + 3]);
    }
  }
}

// The channels of a block, and what its threads share about them: silu((x + add - centre) * gain + offset).
struct Slab {
  const GroupNorm& p;
  int64_t sample;
  int first, width, stride;              // the last slab of a sample may be narrower than the others, `stride`
  float *add, *centre, *gain, *offset;   // [stride] each
  float* rest;                           // what a layout shares
  Moments* group;                        // [groups], behind that

  __device__ Slab(const GroupNorm& p, const GroupCut& cut, int unit, float* room, int rest_size)
      : p(p),
        sample(unit / cut.slabs),
        first(unit % cut.slabs * cut.width),
        width(cut.width < p.channels - first ? cut.width : p.channels - first),
        stride(cut.width),
        add(room),
        centre(add + stride),
        gain(centre + stride),
        offset(gain + stride),
        rest(offset + stride),
        group(reinterpret_cast<Moments*>(rest + rest_size)) {}

  __host__ __device__ static int floats(int stride, int per_group, int rest_size) {
    return 4 * stride + rest_size + 3 * (stride / per_group);
  }

  __device__ int groups() const { return width / p.per_group; }

  // Gain and offset as if the standard deviation were 1.
  template <class T>
  __device__ void load_parameters() const {
    const int64_t of_sample = sample * p.channels;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
      const int c = first + i;
      float a = p.weight.data ? p.weight.at<T>(c) : 1.0f, b = p.bias.data ? p.bias.at<T>(c) : 0.0f;
      if (p.scale.data) {
        const float factor = 1 + p.scale.at<T>(of_sample + c);
        a *= factor;
        b = b * factor + p.shift.at<T>(of_sample + c);
      }
      add[i] = p.add.data ? p.add.at<T>(of_sample + c) : 0.0f;
      gain[i] = a;
      offset[i] = b;
    }
  }

  // A group's moments, known to a whole warp, for its channels.
  __device__ void set_group(int g, const Moments& m) const {
    const float factor = approx_reciprocal_sqrt(m.squares / m.n + p.eps);
    for (int c = g * p.per_group + static_cast<int>(threadIdx.x % 32); c < (g + 1) * p.per_group; c += 32) {
      centre[c] = m.mean;
      gain[c] *= factor;
    }
  }
};

__device__ inline float silu(float x) { return x * approx_reciprocal(1 + approx_exp2(x * -1.44269504f)); }

}  // namespace diffkern

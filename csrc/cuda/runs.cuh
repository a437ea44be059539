// The loop over a batch that also draws its noise: runs of a few numbers that lie together, one a thread at a time.
#pragma once

#include "noise.cuh"

namespace diffkern {

constexpr int kThreads = 256;
constexpr int64_t kGridLimit = 65535;  // of a grid's second and third axis
constexpr int kTile = 2048;       // numbers of a channels_last tile
constexpr int kMaxChannels = 64;  // of one; a multiple of every run

// How a batch lies in memory and is cut: a sample is n numbers; of a channels_last one, `pixels` rows of `channels`. A
// program takes `tiles` tiles of kThreads runs, of a channels_last sample one tile.
struct Cut {
  int64_t batch, n, pixels;
  int32_t channels, tiles;
};

// The sample of this program of a sample_grid (launch.h).
__device__ __forceinline__ int64_t sample_index() { return blockIdx.y + kGridLimit * blockIdx.z; }

// A number of a table, `at` of the row of a sample; NaN where there is no such row, whatever a tensor on the device says.
__device__ __forceinline__ float number_of(const float* table, int64_t rows, int64_t width, int64_t row, int64_t at) {
  return row >= 0 && row < rows ? table[width * row + at] : __builtin_nanf("");
}

// Calls body(offset, count) for the runs of this thread, `offset` from the sample's first number, a multiple of N;
// count < N for the last run of some samples. A turn of the loop is kRuns runs.
template <int N, int kRuns = 1, class Body>
__device__ __forceinline__ void for_each_run(const Cut& cut, Body body) {
  constexpr int64_t kStep = kThreads * N;
  int64_t at = (int64_t{blockIdx.x} * cut.tiles * kThreads + threadIdx.x) * N;
  if (at >= cut.n) {
    return;
  }
  const int64_t left = static_cast<int64_t>(static_cast<uint64_t>(cut.n - at + kStep - 1) / kStep);
#pragma unroll kRuns
  for (int i = static_cast<int>(left < cut.tiles ? left : cut.tiles); i > 0; --i, at += kStep) {
    body(at, static_cast<int>(at + N <= cut.n ? N : cut.n - at));
  }
}

// The counter of the element at this offset, a multiple of 4.
__device__ __forceinline__ uint32_t block_at(int64_t offset) { return static_cast<uint32_t>(offset >> 2); }

// How a channels_last sample is cut into tiles of about kTile numbers: strips of channels, if it has many, and of each
// so many pixels.
DIFFKERN_HD int tile_width(int channels) { return channels < kMaxChannels ? channels : kMaxChannels; }
DIFFKERN_HD int tile_height(int channels) { return kTile / tile_width(channels) / 8 * 8; }  // whole runs and counters
DIFFKERN_HD int strips(int channels) { return (channels + kMaxChannels - 1) / kMaxChannels; }

// The tile of this program.
struct Tile {
  int64_t pixel;
  int channel, width, height;
};

__device__ __forceinline__ Tile tile_of(const Cut& cut) {
  const int width = tile_width(cut.channels), height = tile_height(cut.channels), across = strips(cut.channels);
  const int64_t pixel = int64_t{height} * (blockIdx.x / across), pixels = cut.pixels - pixel;
  const int channel = kMaxChannels * static_cast<int>(blockIdx.x % across), channels = cut.channels - channel;
  return {pixel, channel, channels < width ? channels : width, static_cast<int>(pixels < height ? pixels : height)};
}

// The same for a channels_last sample: body(offset, count, noise). A counter names four neighbours in logical (NCHW)
// order, so that the tile's noise is drawn in that order, into shared memory, and read in the order of memory.
template <int N, class Body>
__device__ __forceinline__ void for_each_run_channels_last(const Cut& cut, const Stream& stream, Body body) {
  __shared__ float noise[kTile + kMaxChannels + 8];
  const Tile tile = tile_of(cut);
  const int stride = tile.height + 1;      // odd, against bank conflicts
  const int blocks = tile.height / 4 + 2;  // that the pixels of one channel may lie in
  for (int i = threadIdx.x; i < tile.width * blocks; i += kThreads) {
    const int channel = i / blocks;
    const int64_t first = (tile.channel + channel) * cut.pixels + tile.pixel;  // element of the tile's first pixel
    const int64_t element = (first & ~int64_t{3}) + 4 * (i - channel * blocks);
    const int from = static_cast<int>(element - first);  // -3 to height + 4
    if (from < tile.height) {
      float z[4];
      normals(stream, block_at(element), z);
      for (int j = 0; j < 4; ++j) {
        if (from + j >= 0 && from + j < tile.height) {
          noise[channel * stride + from + j] = z[j];
        }
      }
    }
  }
  __syncthreads();
  // All channels of neighbouring pixels lie together; of a strip of channels, those of one pixel.
  const bool strip = tile.width != cut.channels;
  const int row = strip ? tile.width : tile.width * tile.height, rows = strip ? tile.height : 1;
  const int runs = (row + N - 1) / N;
  for (int i = threadIdx.x; i < rows * runs; i += kThreads) {
    const int line = i / runs, begin = (i - line * runs) * N;
    const int count = row - begin < N ? row - begin : N;
    int pixel = line + begin / tile.width, channel = begin % tile.width;
    float z[N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      z[j] = j < count ? noise[channel * stride + pixel] : 0.0f;
      if (++channel == tile.width) {
        channel = 0;
        ++pixel;
      }
    }
    body((tile.pixel + line) * cut.channels + tile.channel + begin, count, z);
  }
}

// body(offset, count, noise, read(offset, count)) for the runs of this thread in a sample of either layout. What is
// read is asked for before the noise is made.
template <bool kChannelsLast, int N, class Read, class Body>
__device__ __forceinline__ void for_each_noisy_run(const Cut& cut, const Stream& stream, Read read, Body body) {
  if constexpr (kChannelsLast) {
    for_each_run_channels_last<N>(
        cut, stream, [&](int64_t at, int count, const float (&z)[N]) { body(at, count, z, read(at, count)); });
  } else {
    for_each_run<N>(cut, [&](int64_t at, int count) {
      const auto held = read(at, count);
      float z[N];
      normals(stream, block_at(at), z);
      body(at, count, z, held);
    });
  }
}

}  // namespace diffkern

// The loop over a batch that also draws its noise: runs of a few numbers that lie together, one a thread at a time.
#pragma once

#include "noise.cuh"

namespace diffkern {

constexpr int kThreads = 256;
constexpr int kTile = 2048;         // numbers of a channels_last tile
constexpr int kMaxChannels = 64;    // of a channels_last tile; a multiple of every run

// How a batch lies in memory and is cut: a sample is n numbers; of a channels_last one, `pixels` rows of `channels`. A
// program takes `tiles` tiles of kThreads runs, of a channels_last sample one tile.
struct Cut {
  int64_t batch, n, pixels;
  int32_t channels, tiles;
};

__device__ __forceinline__ int64_t sample_index() { return blockIdx.y + int64_t{65535} * blockIdx.z; }

// Calls body(offset, count) for the runs of this thread, `offset` from the sample's first number, a multiple of N;
// count < N for the last run of some samples.
template <int N, class Body>
__device__ __forceinline__ void for_each_run(const Cut& cut, Body body) {
  constexpr int64_t kStep = kThreads * N;
  int64_t at = (int64_t{blockIdx.x} * cut.tiles * kThreads + threadIdx.x) * N;
  for (int i = 0; i < cut.tiles && at < cut.n; ++i, at += kStep) {
    body(at, static_cast<int>(at + N <= cut.n ? N : cut.n - at));
  }
}

// The tile of pixels and channels of this program in a channels_last sample.
struct Tile {
  int64_t pixel;
  int channel, width, height, stride;  // `stride` of shared memory: odd, against bank conflicts
};

__device__ __forceinline__ Tile tile_of(const Cut& cut) {
  const int width = cut.channels < kMaxChannels ? cut.channels : kMaxChannels;
  const int across = (cut.channels + kMaxChannels - 1) / kMaxChannels;
  const int height = kTile / width / 8 * 8;
  const int64_t pixel = int64_t{blockIdx.x} / across * height;
  const int channel = static_cast<int>(blockIdx.x % across) * kMaxChannels;
  const int64_t left = cut.pixels - pixel;
  return {pixel, channel, cut.channels - channel < width ? cut.channels - channel : width,
          static_cast<int>(left < height ? left : height), height + 1};
}

// The same for a channels_last sample: body(offset, count, noise). A counter names four neighbours in logical (NCHW)
// order, so that the tile's noise is drawn in that order, into shared memory, and read in the order of memory.
template <int N, class Body>
__device__ __forceinline__ void for_each_run_channels_last(const Cut& cut, const Stream& stream, Body body) {
  __shared__ float noise[kTile + kMaxChannels + 8];
  const Tile tile = tile_of(cut);
  const int blocks = tile.height / 4 + 2;  // that four neighbours of a channel's pixels in the tile may lie in
  for (int i = threadIdx.x; i < tile.width * blocks; i += kThreads) {
    const int channel = i / blocks;
    const int64_t first = (tile.channel + channel) * cut.pixels + tile.pixel;  // element of the tile's first pixel
    const int64_t element = (first & ~int64_t{3}) + 4 * (i - channel * blocks);
    const int from = static_cast<int>(element - first);  // -3 to height + 4
    if (from < tile.height) {
      float z[4];
      normals(stream, element, z);
      for (int j = 0; j < 4; ++j) {
        if (from + j >= 0 && from + j < tile.height) {
          noise[channel * tile.stride + from + j] = z[j];
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
      z[j] = j < count ? noise[channel * tile.stride + pixel] : 0.0f;
      if (++channel == tile.width) {
        channel = 0;
        ++pixel;
      }
    }
    body((tile.pixel + line) * cut.channels + tile.channel + begin, count, z);
  }
}

// How many programs a channels_last sample is cut into.
inline int64_t channels_last_tiles(int64_t channels, int64_t pixels) {
  const int64_t width = channels < kMaxChannels ? channels : kMaxChannels;
  const int64_t height = kTile / width / 8 * 8;
  return (channels + kMaxChannels - 1) / kMaxChannels * ((pixels + height - 1) / height);
}

}  // namespace diffkern

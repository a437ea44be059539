// Launchers of the kernels that go over samples a run at a time (runs.cuh): how the batch is cut.
#pragma once

#include "launch.h"
#include "runs.cuh"

namespace diffkern {

// A program for each chunk of each sample. Chunks of one sample are neighbours, and no program divides to learn its
// sample (sample_index); the samples of the last few programs may not exist.
inline dim3 sample_grid(int64_t batch, int64_t chunks) {
  return dim3(static_cast<unsigned>(chunks), static_cast<unsigned>(std::min(batch, kGridLimit)),
              static_cast<unsigned>((batch + kGridLimit - 1) / kGridLimit));
}

// The cut and grid of a batch, for runs of `run` numbers.
class Runs {
 public:
  // Of samples of n numbers that lie together.
  Runs(int64_t batch, int64_t n, int run, int64_t most_tiles = 16) : run_(run) {
    // Enough programs to fill the largest GPU about twice; beyond them, each one does more, since to begin takes a
    // program of noise half as many instructions as a tile.
    constexpr int64_t kEnough = 2048;
    const int64_t tile = int64_t{kThreads} * run, all = (n + tile - 1) / tile;
    const int64_t tiles = std::clamp<int64_t>(batch * all / kEnough, 1, most_tiles);
    cut = {batch, n, n, 1, static_cast<int32_t>(tiles)};
    grid = sample_grid(batch, (all + tiles - 1) / tiles);
  }

  // Of samples laid out as `d`. Only noise cares about the layout: without it a sample is a run of memory.
  Runs(const Dense& d, int run, bool noisy, int64_t most_tiles = 16) : Runs(d.batch, d.sample(), run, most_tiles) {
    if (d.channels_last && noisy) {
      channels_last_ = true;
      const auto channels = static_cast<int32_t>(d.channels);
      const int64_t height = tile_height(channels);
      cut = {d.batch, d.sample(), d.pixels, channels, 1};
      grid = sample_grid(d.batch, strips(channels) * ((d.pixels + height - 1) / height));
    }
  }

  // The form of a kernel that fits: its names with <..., kAligned, kChannelsLast>. All runs are whole and at a multiple
  // of 16 bytes, if the tensors are.
  template <class Kernel>
  Kernel pick(bool aligned, Kernel wide, Kernel narrow, Kernel wide_channels_last, Kernel narrow_channels_last) const {
    const int64_t row = channels_last_ && cut.channels > kMaxChannels ? cut.channels : cut.n;
    const bool whole = aligned && row % run_ == 0;
    return channels_last_ ? (whole ? wide_channels_last : narrow_channels_last) : (whole ? wide : narrow);
  }

  Cut cut;
  dim3 grid;

 private:
  int run_;
  bool channels_last_ = false;
};

}  // namespace diffkern

// Launchers of the kernels that go over samples a run at a time (runs.cuh): how the batch is cut.
#pragma once

#include "launch.h"
#include "runs.cuh"

namespace diffkern {

// The cut and grid of a batch whose samples are n numbers that lie together, in runs of `run`.
struct Runs {
  Cut cut;
  dim3 grid;

  Runs(int64_t batch, int64_t n, int run) {
    // Enough programs for the largest GPU to be full all the time; beyond them, each one does more.
    constexpr int64_t kEnough = 4096, kMost = 16;
    const int64_t tile = int64_t{kThreads} * run, all = (n + tile - 1) / tile;
    const int64_t tiles = std::clamp<int64_t>(batch * all / kEnough, 1, kMost);
    cut = {batch, n, n, 1, static_cast<int32_t>(tiles)};
    grid = sample_grid(batch, (all + tiles - 1) / tiles);
  }

  // The same for samples laid out as `d`, whose noise is drawn by `counter`: without that all layouts are alike.
  Runs(const Dense& d, int run, bool counter) : Runs(d.batch, d.sample(), run) {
    channels_last = d.channels_last && counter;
    if (channels_last) {
      cut = {d.batch, d.sample(), d.pixels, static_cast<int32_t>(d.channels), 1};
      grid = sample_grid(d.batch, channels_last_tiles(d.channels, d.pixels));
    }
  }

  bool channels_last = false;
};

}  // namespace diffkern

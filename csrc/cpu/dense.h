// The loop over the dense tensors of a batch, contiguous or channels_last, that also draws their noise.
#pragma once

#include "../common/dtype.h"
#include "empty.h"
#include "noise.h"

#include <algorithm>

namespace diffkern {

// Below this many elements another thread costs more than it saves (measured: waking one takes about 10 us).
constexpr int64_t kSerial = 1 << 14;
constexpr int64_t kRun = 1024;

// An uninitialised tensor with the shape and layout of `like`, but for dtype and batch.
inline Tensor empty_as(const Tensor& like, ScalarType dtype, int64_t batch) {
  return empty(shape_with_batch(like, batch), dtype, !like.is_contiguous());
}

inline Tensor no_elements(ScalarType dtype) { return empty({0}, dtype); }

// The noise of elements [begin, begin + n) of a stream, in order; points into `room`, which begins up to 3 before.
inline const float* noise_at(const Stream& s, int64_t begin, int64_t n, float* room) {
  normals(s, begin / 4, (begin + n + 3) / 4 - begin / 4, room);
  return room + begin % 4;
}

// Calls body(sample, offset, n, noise) for runs of at most kRun elements that lie together in memory, `offset` from the
// sample's first; all of them together are the batch. `stream(sample)` gives the noise, or is nullptr for none. What a
// run is depends on the sample's shape alone, so that neither threads nor the batch change a bit of the result.
template <class StreamOf, class Body>
void for_each_run(const Dense& d, StreamOf stream, Body body) {
  constexpr bool kNoisy = !std::is_same_v<StreamOf, std::nullptr_t>;
  constexpr int64_t kMaxChannels = 16;  // noise is drawn a channel at a time: few channels give it long rows
  if (d.sample() == 0) {
    return;
  }
  const int64_t width = std::min(d.channels, kMaxChannels), across = (d.channels + width - 1) / width;
  const int64_t height = kRun / width / 4 * 4, down = (d.pixels + height - 1) / height;
  const int64_t tiles = across * down;
  torch::stable::parallel_for(0, d.batch * tiles, kSerial / kRun, [&](int64_t begin, int64_t end) {
    alignas(64) float room[normals_room(kRun / 4 + 1)], tile[kRun];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / tiles, pixel = i % tiles / across * height, channel = i % across * width;
      const int64_t pixels = std::min(height, d.pixels - pixel), channels = std::min(width, d.channels - channel);
      const float* noise = nullptr;
      if constexpr (kNoisy) {
        const Stream s = stream(sample);
        if (channels == 1 && d.channels == 1) {
          noise = noise_at(s, pixel, pixels, room);
        } else {
          for (int64_t c = 0; c < channels; ++c) {
            const float* plane = noise_at(s, (channel + c) * d.pixels + pixel, pixels, room);
            for (int64_t p = 0; p < pixels; ++p) {
              tile[p * channels + c] = plane[p];
            }
          }
          noise = tile;
        }
      }
      if (channels == d.channels) {
        body(sample, pixel * d.channels, pixels * channels, noise);
      } else {
        for (int64_t p = 0; p < pixels; ++p) {
          body(sample, (pixel + p) * d.channels + channel, channels, noise ? noise + p * channels : nullptr);
        }
      }
    }
  });
}

}  // namespace diffkern

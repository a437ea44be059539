// The moments that group_norm_silu and its gradient normalise by, and the loops over their input.
//
// Those of a contiguous group are taken a chunk at a time, twice over a chunk that is in the cache: its mean, then the
// squares about that mean. Chunks are merged in order (Chan et al. 1979). What a chunk is depends on the sample's shape
// alone, so that neither threads nor the batch change a bit of the result.
#pragma once

#include "group_norm_columns.h"

namespace diffkern {

constexpr int64_t kChunk = 4096;  // elements of a contiguous chunk: 16 KB of float32

// f(slab) for every slab: one a thread if there are enough of them, which keeps a slab in its core's cache between the
// passes; else one after the other, each by all threads.
template <class F>
void for_each_slab(int64_t slabs, int64_t elements_each, F f) {
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      f(i);
    }
  };
  if (slabs >= torch::stable::get_num_threads()) {
    in_parallel(slabs, elements_each, some);
  } else {
    some(0, slabs);
  }
}

// The moments of all chunks so far.
struct Total {
  double n = 0, mean = 0, squares = 0;

  void add(const Moments& chunk, int64_t size) {
    const double count = n + size, delta = chunk.mean - mean;
    mean += delta * size / count;
    squares += chunk.squares + delta * delta * n * size / count;
    n = count;
  }

  float scale(double eps) const { return static_cast<float>(1 / std::sqrt(squares / n + eps)); }
};

struct Normaliser {
  float mean, scale;
};

inline int64_t chunks_of(int64_t size, int64_t chunk) { return (size + chunk - 1) / chunk; }

// The moments of a contiguous group.
template <class T>
Normaliser group_moments(const GroupNorm& p, const Source<T>& source, int64_t slab) {
  const int64_t size = p.group_size() * p.pixels, chunks = chunks_of(size, kChunk);
  std::vector<Moments> parts(chunks);
  in_parallel(chunks, kChunk, [&](int64_t begin, int64_t end) {
    float room[kChunk];
    for (int64_t k = begin; k < end; ++k) {
      const int64_t n = std::min(kChunk, size - k * kChunk);
      parts[k] = moments(source.planes(p, slab, k * kChunk, n, room), n);
    }
  });
  Total total;
  for (int64_t k = 0; k < chunks; ++k) {
    total.add(parts[k], std::min(kChunk, size - k * kChunk));
  }
  return {static_cast<float>(total.mean), total.scale(p.eps)};
}

// The sums of every column over all pixels, then those of squares; f adds those of n columns of some rows of a part.
template <class T, class F>
std::vector<double> column_sums(const GroupNorm& p, const Layout<T>& layout, F f) {
  const int64_t width = 2 * layout.width();
  std::vector<float> sums(layout.chunks * width);
  in_parallel(layout.chunks, layout.chunk * p.channels, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t pixel = k * layout.chunk, pixels = std::min(layout.chunk, p.pixels - pixel);
      for (const Part<T>& part : layout.parts) {
        const int64_t rows = pixels / part.together, rest = pixels % part.together;
        const T* in = part.in + pixel * part.channels;
        float *sum = &sums[k * width], *squares = sum + layout.width();
        f(part, in, rows, part.columns(), sum, squares);
        f(part, in + rows * part.columns(), 1, rest * part.channels, sum, squares);
      }
    }
  });
  std::vector<double> total(width);
  for (int64_t k = 0; k < layout.chunks; ++k) {
    for (int64_t j = 0; j < width; ++j) {
      total[j] += sums[k * width + j];
    }
  }
  return total;
}

struct GroupSums {
  double sum = 0, squares = 0;
  double size = 0;  // of the squares that were added up: what the digits of their sum belong to
};

// The sums of every group from those of its columns, `count` numbers of a channel. lack(column, channel, group) is what
// was still to be added to each of a column's numbers.
template <class T, class F>
std::vector<GroupSums> group_sums(const GroupNorm& p, const Layout<T>& layout, const std::vector<double>& total,
                                  double count, F lack) {
  std::vector<GroupSums> out(p.groups);
  const double *sums = total.data(), *squares = sums + layout.width();
  for (const Part<T>& part : layout.parts) {
    const double share = count / static_cast<double>(part.together);  // of a column
    for_each_group(p, part, [&](int64_t g, int64_t c, int64_t n, int64_t column) {
      GroupSums of_group = out[g];  // in registers
      for (int64_t i = 0; i < n; ++i) {
        const int64_t at = place<T>(column + i);
        const double more = lack(at, c + i, g), all = share * more;
        of_group.sum += sums[at] + all;
        of_group.squares += squares[at] + more * (2 * sums[at] + all);
        of_group.size += squares[at] + more * all;
      }
      out[g] = of_group;
    });
  }
  return out;
}

// The moments of all groups of a channels_last sample, in one pass over it: of its numbers less a guess of their mean,
// or of bfloat16 as they are. Where that leaves too few digits of the squares about the mean, in one more pass, of the
// numbers less the mean that was found. A sample's own numbers decide, so that it comes out the same in every batch.
template <class T>
class SampleMoments {
 public:
  SampleMoments(const GroupNorm& p, const Layout<T>& layout, const float* add)
      : groups(p.groups), p_(p), layout_(layout), add_(add) {
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<T, BFloat16>) {
      if (p.group_size() % 2 == 0 && layout.parts[0].channels % 2 == 0) {  // no pair is in two groups
        constexpr float kLeast = 0x1p-6f;  // of 24 bits that leaves twice what the result has
        const auto add_some = [](const Part<T>& part, const T* in, int64_t rows, int64_t n, float* sum, float* square) {
          add_pairs(part, in, rows, n, sum + part.at, square + part.at);
        };
        if (!moments(column_sums(p, layout, add_some), lack(), kLeast, kSmall)) {
          shifted();
        }
        return;
      }
    }
#endif
    guess();
    if (!shifted()) {
      shifted();
    }
  }

  std::vector<Normaliser> groups;

 private:
  double added(int64_t channel) const { return add_ == nullptr ? 0 : add_[channel]; }

  auto lack() const {
    return [this](int64_t, int64_t c, int64_t) { return added(c); };
  }

  // Of one row in sixteen or so.
  void guess() {
    const int64_t width = layout_.width();
    std::vector<float> sums(2 * width);
    pivot_.assign(width, 0.0f);
    double count = 0;
    for (const Part<T>& part : layout_.parts) {
      const int64_t rows = p_.pixels / part.together, some = std::clamp<int64_t>(rows / 16, 1, 16);
      add_rows(part, part.in, some, rows / some * part.columns(), part.columns(), &pivot_[part.at], &sums[part.at],
               &sums[width + part.at]);
      count = static_cast<double>(some * part.together);
    }
    const auto all = group_sums(p_, layout_, std::vector<double>(sums.begin(), sums.end()), count, lack());
    for (int64_t g = 0; g < p_.groups; ++g) {
      groups[g].mean = static_cast<float>(all[g].sum / (count * p_.group_size()));
    }
  }

  // Of the numbers less the means so far. Whether these were near enough to the mean.
  bool shifted() {
    pivot_.resize(layout_.width());
    for (const Part<T>& part : layout_.parts) {
      for_each_group(p_, part, [&](int64_t g, int64_t c, int64_t n, int64_t column) {
        for (int64_t i = 0; i < n; ++i) {
          pivot_[place<T>(column + i)] = static_cast<float>(groups[g].mean - added(c + i));
        }
      });
    }
    const auto add_some = [&](const Part<T>& part, const T* in, int64_t rows, int64_t n, float* sums, float* squares) {
      add_rows(part, in, rows, part.columns(), n, &pivot_[part.at], sums + part.at, squares + part.at);
    };
    const auto rounded_off = [&](int64_t column, int64_t c, int64_t g) {
      return pivot_[column] + added(c) - groups[g].mean;
    };
    return moments(column_sums(p_, layout_, add_some), rounded_off, 0.25, 0);
  }

  // From the sums of the columns. Whether the squares about the mean are at least that share of those that were summed.
  template <class F>
  bool moments(const std::vector<double>& sums, F lack, double share, double least) {
    const double pixels = static_cast<double>(p_.pixels), count = pixels * p_.group_size();
    const std::vector<GroupSums> all = group_sums(p_, layout_, sums, pixels, lack);
    bool good = true;
    for (int64_t g = 0; g < p_.groups; ++g) {
      const double mean = all[g].sum / count, squares = all[g].squares - mean * all[g].sum;
      const double scale = 1 / std::sqrt(std::max(squares, 0.0) / count + p_.eps);
      groups[g] = {static_cast<float>(groups[g].mean + mean), static_cast<float>(scale)};
      good = good && squares >= share * all[g].size && all[g].size >= least;  // false for NaN
    }
    return good;
  }

  const GroupNorm& p_;
  const Layout<T>& layout_;
  const float* add_;
  std::vector<float> pivot_;  // of every column
};

}  // namespace diffkern

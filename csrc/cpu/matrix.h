// What the matrix products of linear.h and convolution.h are made of: the weight [N, taps, channels] in panels, sums of
// some rows in a panel, and what follows them. A token is one piece of `channels` numbers, a pixel of a convolution one
// for each tap.
//
// Results lie in the lanes of vectors. A result is a chain of sums over kChain words, and the sum of those chains in
// order: neither the number of rows nor threads change a bit of it.
#pragma once

#include "activation.h"
#include "lanes.h"
#include "product.h"
#include "words.h"

#include <algorithm>
#include <array>

namespace diffkern {

constexpr int64_t kPanel = 2 * kLanes;     // sums of a row in a panel
constexpr int64_t kChain = 256;            // words that are summed in registers: one longer chain would lose digits
constexpr int kRows = kRegisters * 3 / 8;  // that are multiplied at once: of more, addresses would not be in registers

// Rows of a block, and words of it that a near cache holds.
constexpr int64_t kFew = 4 * kRows, kMost = 14 * kRows, kHeld = 1 << 17;

// What a weight is kept in.
template <class T>
constexpr ScalarType kKept = Words<T>::kNumbers == 2 ? ScalarType::BFloat16 : ScalarType::Float;

// Panels of the weight. Each has the words of all taps, and in a row of them kPanel results, the last as few vectors as
// hold what is left, filled up with zeros; or a vector of values and one of their gates.
struct Columns {
  int64_t results;  // of the product: half of the weight's rows, if they are gated
  bool gated;

  int64_t step() const { return gated ? kLanes : kPanel; }  // results of a panel
  int64_t panels() const { return (results + step() - 1) / step(); }
  int64_t width(int64_t panel) const {
    return gated || results - panel * kPanel > kLanes ? kPanel : kLanes;
  }
  int64_t total() const { return (panels() - 1) * kPanel + width(panels() - 1); }  // sums of a row, with those zeros

  // The row of the weight that the i-th of these sums is of, or -1.
  int64_t row(int64_t i) const {
    const int64_t at = gated ? i / kPanel * kLanes + i % kLanes : i;
    return at >= results ? -1 : gated && i % kPanel >= kLanes ? results + at : at;
  }
};

// The panels of a weight [N, taps, channels], contiguous. Those from `begin` to `end`.
template <class T>
void arrange(const Columns& columns, int64_t taps, int64_t channels, const T* weight, int64_t begin, int64_t end,
             typename Words<T>::Word* out) {
  using W = Words<T>;
  const int64_t words = words_of<W>(channels);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t width = columns.width(panel);
    auto* to = reinterpret_cast<float*>(out) + panel * kPanel * taps * words;
    for (int64_t v = 0; v < width; v += kLanes) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t w = 0; w < words; w += kLanes) {
          const int64_t first = w * W::kNumbers;
          const auto row = [&](int64_t i) {
            const int64_t r = columns.row(panel * kPanel + v + i);
            return r < 0 ? Vector{} : W::row(weight + (r * taps + tap) * channels + first, channels - first);
          };
          transpose(row, [&](int64_t i, Vector x) {
            if (w + i < words) {
              vector(to + (tap * words + w + i) * width + v) = x;
            }
          });
        }
      }
    }
  }
}

// R rows of a chain, added to what was summed before, if anything was.
template <class Word, int V, int R>
void chain(const Word* left, int64_t row, const Vector* panel, int64_t n, const Vector* before, Vector* out) {
  const auto added = [=](Vector& to, Vector sum, int) { to = before == nullptr ? sum : before[&to - out] + sum; };
  rows<V, R>(left, row, 1, panel, n, added, out);
}

template <class Word, int V, int... R>
constexpr auto chains(std::integer_sequence<int, R...>) {
  return std::array{chain<Word, V, R + 1>...};
}

// What follows the sums of a row in a panel, of which n results count: activation(y + shift) * gate + residual. Inlined,
// for n to be a constant where it can be.
template <Activation kActivation, int V, class T>
[[gnu::always_inline]] inline void finish(Vector* y, const float* shift, const T* gate, const T* residual, T* out,
                                          int64_t n) {
  constexpr int kWhole = is_gated(kActivation) ? V / 2 : V;
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    y[v] += *reinterpret_cast<const LooseVector*>(shift + v * kLanes);
  }
  if constexpr (kActivation != kNone) {
    auto* sums = reinterpret_cast<float*>(y);
    for (int64_t i = 0; i < kWhole * kLanes; ++i) {
      sums[i] = activate<kActivation>(sums[i], sums[i + (is_gated(kActivation) ? kLanes : 0)]);
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < kWhole; ++v) {
    const int64_t at = v * kLanes, left = n - at;
    Vector result = y[v];
    if (gate != nullptr) {
      result *= load_lanes(gate + at, left);
    }
    if (residual != nullptr) {
      result += load_lanes(residual + at, left);
    }
    store_lanes(result, out + at, left);
  }
}

// Shares rows and panels out among as many threads as pay. Each has make(most), a worker for blocks of up to so many rows,
// run(first, last, begin, end): the results of some panels in some rows. words: of a row.
template <class Make>
void share_out(int64_t rows, int64_t most, int64_t words, const Columns& columns, Make make) {
  constexpr int64_t kGrain = 1 << 19;  // multiply-adds that are worth another thread
  const int64_t threads = torch::stable::get_num_threads(), panels = columns.panels();
  int64_t blocks = (rows + most - 1) / most;
  // A few blocks more than needed, or some of the panels each, where that gives every thread the same share.
  while (blocks % threads != 0 && blocks < 16 * threads && rows / (blocks + 1) >= kFew) {
    ++blocks;
  }
  const int64_t groups = blocks % threads == 0 ? 1 : std::min(threads, panels);
  const int64_t work = rows * words * columns.total() / (blocks * groups);
  torch::stable::parallel_for(
      0, blocks * groups, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work)), [&](int64_t begin, int64_t end) {
        auto worker = make((rows + blocks - 1) / blocks);
        for (int64_t i = begin; i < end; ++i) {
          const int64_t block = i / groups, group = i % groups;
          worker.run(rows * block / blocks, rows * (block + 1) / blocks, panels * group / groups,
                     panels * (group + 1) / groups);
        }
      });
}

}  // namespace diffkern

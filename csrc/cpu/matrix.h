// A matrix product on a CPU with what follows it, for linear and for convolutions: rows of the left side lie anywhere,
// in pieces of `channels` numbers (a token is one piece, a pixel of a convolution one for each tap), and the weight
// [N, taps, channels] lies in panels.
//
// Results lie in the lanes of vectors. A result is a chain of sums over kChain words, and the sum of those chains in
// order: neither the number of rows nor threads change a bit of it.
#pragma once

#include "activation.h"
#include "product.h"
#include "words.h"

#include <array>

namespace diffkern {

constexpr int64_t kPanel = 2 * kLanes;  // sums of a row in a panel
constexpr int64_t kChain = 256;         // words that are summed in registers: one longer chain would lose digits
constexpr int kAtOnce = kRegisters == 32 ? 14 : 6;  // rows whose sums the registers hold, of two vectors each

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

// activation(rows weight + shift) * gate + residual.
template <class T>
struct Matrix {
  int64_t rows, taps, channels, rows_a_sample;
  Columns columns;
  const typename Words<T>::Word* weight;  // as `arrange` makes it
  const float* shift;                     // [1 or B, columns.total()], in the order of the sums; zeros if there is none
  int64_t shift_step;                     // from sample to sample, 0 for one row
  const float* gate;                      // [B, results] or nullptr
  const T* residual;                      // [rows, results] or nullptr
  T* out;                                 // [rows, results]

  int64_t words() const { return taps * words_of<Words<T>>(channels); }
};

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

// Does blocks of rows, in one thread. At(row, tap) gives the address of a piece of a row, or nullptr for zeros.
template <class T, Activation kActivation, class At>
class MatrixWorker {
  using W = Words<T>;
  using Word = typename W::Word;

 public:
  // most: rows of a block.
  MatrixWorker(const Matrix<T>& m, const At& at, int64_t most)
      : m_(m), at_(at), step_(((m.words() + 15) / 16 | 1) * 16),
        room_(most * (step_ + kPanel)), left_(room_.take<Word>(most * step_)), sums_(room_.take(most * kPanel)) {}

  // The results of some panels in the rows from `first` on.
  void run(int64_t first, int64_t rows, int64_t begin, int64_t end) {
    if (first_ != first) {
      first_ = first;
      for (int64_t i = 0; i < rows; ++i) {
        gather(first + i, left_ + i * step_);
      }
    }
    for (int64_t panel = begin; panel < end; ++panel) {
      m_.columns.width(panel) == kPanel ? multiply<2>(rows, panel) : multiply<1>(rows, panel);
    }
  }

 private:
  void gather(int64_t row, Word* out) const {
    const int64_t words = words_of<W>(m_.channels);
    for (int64_t tap = 0; tap < m_.taps; ++tap, out += words) {
      if (const T* in = at_(row, tap)) {
        W::row(in, out, m_.channels);
      } else {
        std::fill_n(reinterpret_cast<float*>(out), words, 0.0f);
      }
    }
  }

  template <int V>
  void multiply(int64_t rows, int64_t panel) {
    static constexpr auto kOf = chains<Word, V>(std::make_integer_sequence<int, kAtOnce>());
    const int64_t words = m_.words(), parts = (rows + kAtOnce - 1) / kAtOnce;
    const auto* weight = reinterpret_cast<const Vector*>(m_.weight + panel * kPanel * words);
    alignas(64) Vector tile[kAtOnce * V];
    const int64_t links = (words + kChain - 1) / kChain;
    for (int64_t link = 0; link < links; ++link) {
      const int64_t w = words * link / links, n = words * (link + 1) / links - w;
      const Vector *now = weight + w * V, *later = now + n * V;
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t begin = rows * i / parts, count = rows * (i + 1) / parts - begin;
        // The machine's own prefetching does not fetch from behind the second cache in time.
        for (int64_t v = n * V * i / parts; v < n * V * (i + 1) / parts; ++v) {
          __builtin_prefetch(later + v, 0, 2);
        }
        auto* sums = reinterpret_cast<Vector*>(sums_ + begin * kPanel);
        const Vector* before = w == 0 ? nullptr : sums;
        const Word* left = left_ + begin * step_ + w;
        if (w + n < words) {
          kOf[count - 1](left, step_, now, n, before, sums);
        } else {
          fetch(panel, first_ + begin, count);
          kOf[count - 1](left, step_, now, n, before, tile);
          finish<V * kLanes>(panel, first_ + begin, count, reinterpret_cast<float*>(tile));
        }
      }
    }
  }

  // Has the results' cache lines come, and what is added to them, while their sums are made.
  void fetch(int64_t panel, int64_t row, int64_t rows) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t results = m_.columns.results, step = m_.columns.step();
    for (int64_t i = 0, place = row * results + panel * step; i < rows; ++i, place += results) {
      for (int64_t at = 0; at < step; at += kLine) {
        __builtin_prefetch(m_.out + place + at, 1);
        if (m_.residual != nullptr) {
          __builtin_prefetch(m_.residual + place + at);
        }
      }
    }
  }

  // What follows the sums of some rows of a panel.
  template <int64_t kSums>
  void finish(int64_t panel, int64_t row, int64_t rows, float* sums) {
    constexpr int64_t kWhole = is_gated(kActivation) ? kSums / 2 : kSums;
    const int64_t results = m_.columns.results, at = panel * m_.columns.step(), n = std::min(kWhole, results - at);
    const float* shift = m_.shift + panel * kPanel;
    const float* gate = m_.gate;
    int64_t left = rows;  // of the sample
    if (gate != nullptr || m_.shift_step != 0) {
      const int64_t sample = row / m_.rows_a_sample;
      left = m_.rows_a_sample - row % m_.rows_a_sample;
      shift += sample * m_.shift_step;
      gate += gate == nullptr ? 0 : sample * results + at;
    }
    for (int64_t i = 0, place = row * results + at; i < rows; ++i, place += results, sums += kSums, --left) {
      if (left == 0) {
        left = m_.rows_a_sample, shift += m_.shift_step, gate += gate == nullptr ? 0 : results;
      }
      const T* residual = m_.residual == nullptr ? nullptr : m_.residual + place;
      n == kWhole ? finish_row<kSums>(sums, shift, gate, residual, m_.out + place, kWhole)
                  : finish_row<kSums>(sums, shift, gate, residual, m_.out + place, n);
    }
  }

  // Inlined, for n to be a constant where it can be.
  template <int64_t kSums>
  [[gnu::always_inline]] static void finish_row(float* y, const float* shift, const float* gate, const T* residual,
                                                T* out, int64_t n) {
    for (int64_t i = 0; i < kSums; ++i) {
      y[i] += shift[i];
    }
    if constexpr (kActivation != kNone) {
      const float* half = y + (is_gated(kActivation) ? kLanes : 0);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        y[i] = activate<kActivation>(y[i], half[i]);
      }
    }
    if (gate != nullptr) {
      for (int64_t i = 0; i < n; ++i) {
        y[i] *= gate[i];
      }
    }
    if (residual != nullptr) {
      float room[kPanel];
      const float* rest = as_float(residual, room, n);
      for (int64_t i = 0; i < n; ++i) {
        y[i] += rest[i];
      }
    }
    if (n == kPanel) {
      return narrow(y, out, kPanel);
    }
    for (int64_t v = 0; v < n; v += kLanes) {
      store_lanes(vector(y + v), out + v, n - v);
    }
  }

  const Matrix<T>& m_;
  const At& at_;
  int64_t step_;  // words from row to row: an odd number of cache lines, for a column to spread over all cache sets
  int64_t first_ = -1;  // the first of the rows that are held
  Room room_;
  Word* left_;
  float* sums_;
};

// All rows, by as many threads as pay.
template <Activation kActivation, class T, class At>
void multiply(const Matrix<T>& m, const At& at) {
  constexpr int64_t kHeld = 1 << 17;   // words of a block of rows, in a near cache
  constexpr int64_t kGrain = 1 << 19;  // multiply-adds that are worth another thread
  constexpr int64_t kFew = 2 * kAtOnce, kMost = 12 * kAtOnce;
  const int64_t threads = torch::stable::get_num_threads(), panels = m.columns.panels();
  const int64_t most = std::clamp(kHeld / m.words() / kAtOnce * kAtOnce, kFew, kMost);
  int64_t blocks = (m.rows + most - 1) / most;
  // A few blocks more than needed, or some of the panels each, where that gives every thread the same share.
  while (blocks % threads != 0 && blocks < 16 * threads && m.rows / (blocks + 1) >= kFew) {
    ++blocks;
  }
  const int64_t groups = blocks % threads == 0 ? 1 : std::min(threads, panels);
  const int64_t work = m.rows * m.words() * m.columns.total() / (blocks * groups);
  torch::stable::parallel_for(0, blocks * groups, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work)),
                              [&](int64_t begin, int64_t end) {
    MatrixWorker<T, kActivation, At> worker(m, at, (m.rows + blocks - 1) / blocks);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / groups, group = i % groups, first = m.rows * block / blocks;
      worker.run(first, m.rows * (block + 1) / blocks - first, panels * group / groups, panels * (group + 1) / groups);
    }
  });
}

}  // namespace diffkern

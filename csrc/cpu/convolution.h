// Does blocks of the pixels of a convolution, in one thread: as rows of words in the cache, then for a panel of the
// weight at a time their sums and what follows them. The weight is matrix.h's.
//
// Pixels that see the same taps are multiplied together, and what lies outside the picture is not multiplied at all.
// What is summed in which order depends on the place in the picture alone: neither threads nor the batch change a bit.
#pragma once

#include "../common/dtype.h"
#include "../common/layout.h"
#include "../common/math.h"
#include "lanes.h"
#include "matrix.h"
#include "pixels.h"

#include <algorithm>
#include <array>
#include <vector>

namespace diffkern {

template <class T>
struct Convolution {
  Picture picture;
  Columns columns;
  const T* x;
  const typename Words<T>::Word* weight;  // in panels
  const float* shift;                     // bias and add, [B, columns.total()], or of one row if there is no add
  int64_t shift_step;
  const T* residual;  // or nullptr
  bool silu;
  T* out;
};

template <class T>
class PixelWorker {
  using W = Words<T>;
  using Word = typename W::Word;

 public:
  // most: pixels of a block.
  PixelWorker(const Convolution<T>& c, const Taps& taps, int64_t most)
      : c_(c), taps_(taps), words_(taps.words()), chains_((words_ + kChain - 1) / kChain),
        chain_((words_ + chains_ - 1) / chains_), step_(((chain_ + 15) / 16 | 1) * 16), slice_(most * step_),
        most_(most),
        room_(chains_ * slice_ + kTogether * most * kPanel + kLanes), left_(room_.take<Word>(chains_ * slice_)),
        sums_(room_.take(kTogether * most * kPanel)), pixels_(most), line_(taps.line()) {}

  // The results of some panels for the pixels from `first` to before `last`.
  void run(int64_t first, int64_t last, int64_t begin, int64_t end) {
    if (first_ != first) {
      first_ = first;
      read(first, last);
    }
    // About where the next block reads: it is fetched while this one is multiplied.
    const int64_t numbers = taps_.numbers(), pixels = taps_.pixels();
    next_ = c_.x + numbers * last / pixels;
    const T* behind = c_.x + numbers * std::min(pixels, 2 * last - first) / pixels;
    fetch_ = (behind - next_) * static_cast<int64_t>(sizeof(T)) / 64 / ((end - begin) * std::ssize(parts_)) + 1;
    for (int64_t some = begin; some < end; some += kTogether) {
      const int64_t last_panel = std::min(some + kTogether, end);
      for (int64_t k = 0; k < chains_; ++k) {
        for (int64_t panel = some; panel < last_panel; ++panel) {
          const Word* later = panel + 1 < last_panel ? weight(panel + 1, k) : weight(some, k + 1);
          float* sums = sums_ + (panel - some) * most_ * kPanel;
          c_.columns.width(panel) == kPanel ? multiply<2>(panel, k, later, sums) : multiply<1>(panel, k, later, sums);
        }
      }
    }
  }

 private:
  static constexpr int64_t kTogether = 4;  // panels that a chain of the rows is multiplied with in turn

  // Where a chain of a panel begins.
  const Word* weight(int64_t panel, int64_t k) const {
    return c_.weight + panel * kPanel * words_ + k * chain_ * c_.columns.width(panel);
  }

  // Rows that are multiplied at once. `slice` words further are those of the next chain.
  struct Part {
    int64_t begin, end;
    const std::vector<Span>* spans;
    const Word* left;
    int64_t step, slice;
  };

  void read(int64_t first, int64_t last) {
    parts_.clear();
    int64_t begin = 0;
    taps_.each(first, last, pixels_.data(), [&](int64_t end, const View& view) {
      const bool in_place = taps_.in_place(c_.x);
      const int64_t n = end - begin, parts = (n + kRows - 1) / kRows;
      const auto* x = reinterpret_cast<const Word*>(c_.x + pixels_[begin].from);
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t at = n * i / parts, next = n * (i + 1) / parts;
        const Word* left = in_place ? x + at * words_ : left_ + (begin + at) * step_;
        parts_.push_back({begin + at, begin + next, &view.spans, left, in_place ? words_ : step_,
                          in_place ? chain_ : slice_});
      }
      for (; begin < end; ++begin) {
        if (!in_place) {
          read(view, c_.x + pixels_[begin].from, left_ + begin * step_);
        }
      }
    });
  }

  // The words of a pixel, whose first tap is at `in`.
  void read(const View& view, const T* in, Word* out) {
    const int64_t line = taps_.line(), words = taps_.words_of_line();
    for (int64_t i = 0; i < taps_.lines(); ++i, in += taps_.next_line()) {
      const bool inside = i >= view.top && i < view.bottom;
      if (inside && (view.end - view.begin == line || !taps_.few())) {
        put(in + view.begin, out, i * words + view.begin / W::kNumbers, view.end - view.begin);
      } else if (taps_.few()) {  // zeros for what is outside
        std::fill(line_.begin(), line_.end(), T{});
        if (inside) {
          std::copy(in + view.begin, in + view.end, line_.begin() + view.begin);
        }
        put(line_.data(), out, i * words, line);
      }
    }
  }

  // n numbers to the words of a row from the `at`-th on.
  void put(const T* in, Word* out, int64_t at, int64_t n) const {
    for (; at >= chain_; at -= chain_) {
      out += slice_;
    }
    for (; n > 0; out += slice_, at = 0) {
      const int64_t some = std::min(n, (chain_ - at) * W::kNumbers);
      auto* to = reinterpret_cast<float*>(out + at);
      for (int64_t i = 0; i < some; i += kLanes * W::kNumbers, to += kLanes) {
        const int64_t left = some - i;
        left >= kLanes * W::kNumbers ? store_lanes(W::row(in + i, kLanes * W::kNumbers), to, kLanes)
                                     : store_lanes(W::row(in + i, left), to, words_of<W>(left));
      }
      in += some, n -= some;
    }
  }

  // A chain of all rows. later: the weight that is read next.
  template <int V>
  void multiply(int64_t panel, int64_t k, const Word* later, float* sums) {
    static constexpr auto kOf = chains<Word, V>(std::make_integer_sequence<int, kRows>());
    const auto* now = reinterpret_cast<const Vector*>(weight(panel, k));
    const int64_t parts = std::ssize(parts_), results = c_.columns.results, at = panel * kPanel;
    const int64_t begin = k * chain_, end = std::min(begin + chain_, words_), lines = (end - begin) * V;
    alignas(64) Vector tile[kRows * V];
    for (int64_t i = 0; i < parts; ++i) {
      const Part& part = parts_[i];
      // The machine's own prefetching does not fetch from behind the second cache in time. With half as long vectors,
      // of which the products take twice as long, it does, and to ask for it took 2 to 4 % longer.
      for (int64_t line = lines * i / parts; kLanes == 16 && line < lines * (i + 1) / parts; ++line) {
        __builtin_prefetch(later + line * kLanes, 0, 2);
      }
      if (end == words_) {
        for (int64_t r = part.begin; r < part.end; ++r) {
          __builtin_prefetch(c_.out + pixels_[r].place * results + at, 1);
          if (c_.residual != nullptr) {
            __builtin_prefetch(c_.residual + pixels_[r].place * results + at);
          }
        }
        for (int64_t line = 0; line < fetch_; ++line, next_ += 64 / sizeof(T)) {
          __builtin_prefetch(next_, 0, 2);
        }
      }
      Vector* kept = chains_ == 1 ? tile : reinterpret_cast<Vector*>(sums + part.begin * kPanel);
      for (const Span& span : *part.spans) {
        const int64_t from = std::max(begin, span.begin), to = std::min(end, span.end);
        if (from < to) {
          const bool first = from == part.spans->front().begin;
          kOf[part.end - part.begin - 1](part.left + k * part.slice + from - begin, part.step, now + (from - begin) * V,
                                         to - from, first ? nullptr : kept, kept);
        }
      }
      if (end == words_) {
        finish_part<V>(panel, part, kept);
      }
    }
  }

  // What follows the sums of some pixels.
  template <int V>
  void finish_part(int64_t panel, const Part& part, Vector* sums) const {
    constexpr const T* none = nullptr;
    const int64_t results = c_.columns.results, at = panel * kPanel, n = std::min(V * kLanes, results - at);
    for (int64_t i = part.begin; i < part.end; ++i, sums += V) {
      const Pixel& pixel = pixels_[i];
      const int64_t place = pixel.place * results + at;
      const float* shift = c_.shift + pixel.sample * c_.shift_step + at;
      const T* residual = c_.residual == nullptr ? nullptr : c_.residual + place;
      T* out = c_.out + place;
      if (n == V * kLanes) {
        c_.silu ? finish<kSilu, V>(sums, shift, none, residual, out, V * kLanes)
                : finish<kNone, V>(sums, shift, none, residual, out, V * kLanes);
      } else {
        c_.silu ? finish<kSilu, V>(sums, shift, none, residual, out, n)
                : finish<kNone, V>(sums, shift, none, residual, out, n);
      }
    }
  }

  const Convolution<T>& c_;
  const Taps& taps_;
  int64_t words_, chains_, chain_;  // of a row; of a chain, the last may have fewer
  int64_t step_;                    // words from row to row: an odd number of lines, to spread over all cache sets
  int64_t slice_;                   // from chain to chain: those of all rows lie together
  int64_t first_ = -1;              // of the block that is held
  const T* next_ = nullptr;         // what is fetched for the next block,
  int64_t fetch_ = 0;               // and how many lines of it with each part
  int64_t most_;
  Room room_;
  Word* left_;
  float* sums_;
  std::vector<Pixel> pixels_;
  std::vector<Part> parts_;
  std::vector<T> line_;
};

}  // namespace diffkern

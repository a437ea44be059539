// The rows of linear, multiplied by a weight in panels in one thread or in several. Panels and sums are matrix.h's.
#pragma once

#include "matrix.h"

namespace diffkern {

// activation(rows weight + shift) * gate + residual.
template <class T>
struct Matrix {
  int64_t rows, features, rows_a_sample;
  Columns columns;
  const T* x;                             // [rows, features]
  const typename Words<T>::Word* weight;  // as `arrange` makes it
  const float* shift;                     // [columns.total()], in the order of the sums; zeros if there is none
  const T* gate;                          // [B, results] or nullptr
  const T* residual;                      // [rows, results] or nullptr
  T* out;                                 // [rows, results]

  int64_t words() const { return words_of<Words<T>>(features); }

  // Whether rows are multiplied where they are: whole words, that do not begin in few cache sets.
  bool in_place() const {
    using Word = typename Words<T>::Word;
    constexpr int64_t kWay = 4096;
    return sizeof(T) * Words<T>::kNumbers == sizeof(Word) && features % Words<T>::kNumbers == 0 &&
           reinterpret_cast<uintptr_t>(x) % sizeof(Word) == 0 && features * static_cast<int64_t>(sizeof(T)) % kWay != 0;
  }
};

// Does blocks of rows, in one thread.
template <class T, Activation kActivation>
class MatrixWorker {
  using W = Words<T>;
  using Word = typename W::Word;

 public:
  // most: rows of a block.
  MatrixWorker(const Matrix<T>& m, int64_t most)
      : m_(m), in_place_(m.in_place()), words_(m.words()),
        step_(in_place_ ? words_ : ((words_ + 15) / 16 | 1) * 16),
        room_((in_place_ ? 0 : most * step_) + most * kPanel), own_(room_.take<Word>(in_place_ ? 0 : most * step_)),
        sums_(room_.take(most * kPanel)) {}

  // The results of some panels in the rows from `first` to before `last`.
  void run(int64_t first, int64_t last, int64_t begin, int64_t end) {
    const int64_t rows = last - first;
    if (first_ != first) {
      first_ = first;
      left_ = in_place_ ? reinterpret_cast<const Word*>(m_.x) + first * words_ : own_;
      for (int64_t i = 0; i < rows && !in_place_; ++i) {
        W::row(m_.x + (first + i) * m_.features, own_ + i * step_, m_.features);
      }
    }
    for (int64_t panel = begin; panel < end; ++panel) {
      m_.columns.width(panel) == kPanel ? multiply<2>(rows, panel) : multiply<1>(rows, panel);
    }
  }

 private:
  template <int V>
  void multiply(int64_t rows, int64_t panel) {
    static constexpr auto kOf = chains<Word, V>(std::make_integer_sequence<int, kRows>());
    const int64_t parts = (rows + kRows - 1) / kRows, links = (words_ + kChain - 1) / kChain;
    const auto* weight = reinterpret_cast<const Vector*>(m_.weight + panel * kPanel * words_);
    alignas(64) Vector tile[kRows * V];
    for (int64_t link = 0; link < links; ++link) {
      const int64_t w = words_ * link / links, n = words_ * (link + 1) / links - w;
      const Vector* now = weight + w * V;
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t begin = rows * i / parts, count = rows * (i + 1) / parts - begin;
        auto* sums = reinterpret_cast<Vector*>(sums_ + begin * kPanel);
        const Vector* before = w == 0 ? nullptr : sums;
        const Word* left = left_ + begin * step_ + w;
        if (w + n < words_) {
          kOf[count - 1](left, step_, now, n, before, sums);
        } else {
          fetch<V>(panel, first_ + begin, count);
          kOf[count - 1](left, step_, now, n, before, tile);
          finish_rows<V>(panel, first_ + begin, count, tile);
        }
      }
    }
  }

  // Has the lines that `finish_rows` will read and write come nearer.
  template <int V>
  void fetch(int64_t panel, int64_t row, int64_t rows) const {
    constexpr int64_t kLine = 64 / sizeof(T), kResults = V * kLanes / (is_gated(kActivation) ? 2 : 1);
    for (int64_t place = row * m_.columns.results + panel * m_.columns.step(); rows > 0; --rows) {
      for (int64_t i = 0; i < kResults; i += kLine) {
        __builtin_prefetch(m_.out + place + i, 1);
        if (m_.residual != nullptr) {
          __builtin_prefetch(m_.residual + place + i);
        }
      }
      place += m_.columns.results;
    }
  }

  // What follows the sums of some rows in a panel.
  template <int V>
  void finish_rows(int64_t panel, int64_t row, int64_t rows, Vector* sums) const {
    constexpr int64_t kWhole = V * kLanes / (is_gated(kActivation) ? 2 : 1);
    const int64_t results = m_.columns.results, at = panel * m_.columns.step(), n = std::min(kWhole, results - at);
    const float* shift = m_.shift + panel * kPanel;
    for (int64_t end = row + rows; row < end; ++row, sums += V) {
      const int64_t place = row * results + at;
      const T* gate = m_.gate == nullptr ? nullptr : m_.gate + row / m_.rows_a_sample * results + at;
      const T* residual = m_.residual == nullptr ? nullptr : m_.residual + place;
      n == kWhole ? finish<kActivation, V>(sums, shift, gate, residual, m_.out + place, kWhole)
                  : finish<kActivation, V>(sums, shift, gate, residual, m_.out + place, n);
    }
  }

  const Matrix<T>& m_;
  bool in_place_;
  int64_t words_, step_;  // of a row; from row to row: where copied, an odd number of cache lines, to spread over all sets
  int64_t first_ = -1;  // the first of the rows that are at hand
  Room room_;
  Word* own_;
  float* sums_;
  const Word* left_ = nullptr;
};

template <Activation kActivation, class T>
void multiply(const Matrix<T>& m) {
  const int64_t words = m.words();
  share_out(m.rows, std::clamp(kHeld / words, kFew, kMost), words, m.columns,
            [&](int64_t most) { return MatrixWorker<T, kActivation>(m, most); });
}

}  // namespace diffkern

// What the pixels of a convolution see of its pictures, for convolution.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace diffkern {

// Sizes; stride, padding at the top and left; the kernel's lines and columns.
struct Picture {
  int64_t batch, height, width, channels, lines, columns, stride, top, left, out_height, out_width;
};

// Words of a row that are multiplied.
struct Span {
  int64_t begin, end;
};

// What pixels of the result see alike: lines of the kernel, and in each of them a run of numbers.
struct View {
  int64_t top, bottom, begin, end;
  std::vector<Span> spans;
};

struct Pixel {
  int64_t place, sample;
  int64_t from;  // where its first tap is, in numbers from the first of all; it may lie outside the picture
};

// The left side of the product: a row is a pixel of the result, and has the words of all lines of the kernel.
class Taps {
 public:
  // numbers: in a word. of_size: whether a word's bytes are those of its numbers.
  Taps(const Picture& p, int64_t numbers, bool of_size)
      : p_(p), numbers_(numbers), few_(p.channels % numbers != 0 || p.channels < 16),
        in_place_(of_size && p.lines * p.columns * p.stride == 1 && p.channels % numbers == 0),
        down_(ranges(p.out_height, p.stride, p.top, p.height, p.lines)),
        across_(ranges(p.out_width, p.stride, p.left, p.width, p.columns)) {
    for (const Range& y : down_) {
      for (const Range& x : across_) {
        views_.push_back({y.first, y.last, x.first * p.channels, x.last * p.channels, {}});
        views_.back().spans = spans(views_.back());
      }
    }
  }

  int64_t lines() const { return p_.lines; }
  int64_t line() const { return p_.columns * p_.channels; }            // numbers of a line of the kernel
  int64_t next_line() const { return p_.width * p_.channels; }         // numbers from one to the next in a picture
  int64_t words_of_line() const { return (line() + numbers_ - 1) / numbers_; }
  int64_t words() const { return p_.lines * words_of_line(); }
  int64_t numbers() const { return p_.batch * p_.height * p_.width * p_.channels; }  // of all pictures
  int64_t pixels() const { return p_.batch * p_.out_height * p_.out_width; }

  // Whether zeros are multiplied, too: taps that are few numbers, or begin within a word.
  bool few() const { return few_; }

  // Whether pixels are read where they are. Rows that begin in few cache sets are not.
  template <class T>
  bool in_place(const T* x) const {
    return in_place_ && p_.channels * sizeof(T) % 4096 != 0 && reinterpret_cast<uintptr_t>(x) % 4 == 0;
  }

  // The pixels of the result from `first` to before `last`, those that see the same side by side; calls f(end, view)
  // with the number of pixels up to the last of those.
  template <class F>
  void each(int64_t first, int64_t last, Pixel* out, F f) const {
    const int64_t width = p_.out_width;
    int64_t n = 0;
    auto view = views_.begin();
    for (const Range& y : down_) {
      for (const Range& x : across_) {
        const int64_t before = n;
        for (int64_t i = first / width; i * width < last; ++i) {
          const int64_t line = i % p_.out_height, sample = i / p_.out_height;
          if (line < y.begin || line >= y.end) {
            continue;
          }
          const int64_t end = std::min(x.end, last - i * width);
          const int64_t from = (sample * p_.height + line * p_.stride - p_.top) * p_.width - p_.left;
          for (int64_t column = std::max(x.begin, first - i * width); column < end; ++column) {
            out[n++] = {i * width + column, sample, (from + column * p_.stride) * p_.channels};
          }
        }
        if (n > before) {
          f(n, *view);
        }
        ++view;
      }
    }
  }

 private:
  // Neighbours on an axis of the result that see the same taps, from `first` to before `last`.
  struct Range {
    int64_t begin, end, first, last;
  };

  static std::vector<Range> ranges(int64_t results, int64_t stride, int64_t before, int64_t size, int64_t taps) {
    std::vector<Range> made;
    for (int64_t i = 0; i < results; ++i) {
      const int64_t at = i * stride - before, first = std::max<int64_t>(0, -at), last = std::min(taps, size - at);
      if (made.empty() || made.back().first != first || made.back().last != last) {
        made.push_back({i, i, first, last});
      }
      if (first == 0 && last == taps) {  // as have all of the inside
        i = std::min(results, (size - taps + before) / stride + 1) - 1;
      }
      made.back().end = i + 1;
    }
    return made;
  }

  std::vector<Span> spans(const View& view) const {
    const int64_t line = words_of_line();
    if (few_) {
      return {{0, words()}};
    }
    if (view.end - view.begin == this->line()) {
      return {{view.top * line, view.bottom * line}};
    }
    std::vector<Span> made;
    for (int64_t i = view.top; i < view.bottom; ++i) {
      made.push_back({i * line + view.begin / numbers_, i * line + view.end / numbers_});
    }
    return made;
  }

  Picture p_;
  int64_t numbers_;
  bool few_, in_place_;
  std::vector<Range> down_, across_;
  std::vector<View> views_;  // of each range down and each range across
};

}  // namespace diffkern

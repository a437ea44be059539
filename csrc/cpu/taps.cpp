// taps: 3 x 3 convolutions of stride 1 with up to four results, see diffkern/taps.py.
//
// So few results would leave a vector nearly empty, nine times a channel. Here the lanes hold the nine numbers of the
// kernel for all results, so that a pixel is multiplied once; a result then adds what nine pixels have for it.
// What is computed in which order depends on the sample's shape alone: neither threads nor the batch change a bit.
#include "../common/math.h"
#include "dense.h"
#include "product.h"
#include "words.h"

#include <torch/csrc/stable/library.h>

#include <optional>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::taps";
constexpr int kMost = 4;             // results
constexpr int64_t kDepth = 64;       // words that are summed at once: one longer chain would lose digits
constexpr int64_t kGrain = 1 << 19;  // multiply-adds that are worth another thread

typedef float Four __attribute__((vector_size(16), may_alias, aligned(4)));

struct Problem {
  int64_t batch, height, width, channels, top, left, out_height, out_width;
  bool silu;

  int64_t padded() const { return out_width + 2; }
};

template <class T>
struct Data {
  const T *x, *bias, *add, *residual;  // the last three may be nullptr
  T* out;
};

// Vectors that nine taps of N results take.
template <int N>
constexpr int kVectorsOf = (9 * N + kLanes - 1) / kLanes;

// The weight [N, C, 3, 3] as a panel: rows of words of the channels, in each 9 N numbers and zeros behind them.
template <class T, int N>
void arrange(const Tensor& weight, typename Words<T>::Word* out) {
  using W = Words<T>;
  constexpr int64_t kWidth = kVectorsOf<N> * kLanes;
  const T* from = static_cast<const T*>(weight.const_data_ptr());
  const int64_t channels = weight.size(1), step = weight.stride(1);
  int64_t place[9 * N];
  for (int64_t k = 0; k < 9 * N; ++k) {
    place[k] = k % N * weight.stride(0) + k / N / 3 * weight.stride(2) + k / N % 3 * weight.stride(3);
  }
  T row[2][kWidth] = {};
  for (int64_t c = 0; c < channels; c += W::kNumbers, out += kWidth) {
    for (int64_t i = 0; i < std::min(W::kNumbers, channels - c); ++i) {
      for (int64_t k = 0; k < 9 * N; ++k) {
        row[i][k] = from[place[k] + (c + i) * step];
      }
    }
    W::zip(row[0], c + 1 < channels ? row[1] : nullptr, out, kWidth);
  }
}

// Makes lines of the result in order, in one thread. It keeps the products of the three lines of the picture that the
// last one was made from.
template <class T, int N>
class Worker {
  using W = Words<T>;
  using Word = typename W::Word;
  static constexpr int V = kVectorsOf<N>;
  static constexpr int64_t kWidth = V * kLanes;

 public:
  Worker(const Problem& p, const Data<T>& data, const Word* panel)
      : p_(p), data_(data), panel_(reinterpret_cast<const Vector*>(panel)), words_(words_of<W>(p.channels)),
        room_(3 * p.padded() * kWidth + kWidth + p.width * words_ + 2 * (p.out_width + 2) * kMost + 64),
        lines_(room_.take(3 * p.padded() * kWidth)), zeros_(room_.take(kWidth)),
        left_(room_.take<Word>(p.width * words_)), sums_(room_.take((p.out_width + 2) * kMost)),
        residual_(room_.take((p.out_width + 2) * kMost)) {
    std::fill_n(lines_, 3 * p.padded() * kWidth, 0.0f);  // pixels of the padding stay so
    std::fill_n(zeros_, kWidth, 0.0f);
  }

  // The line-th line of the batch.
  void run(int64_t line) {
    const int64_t sample = line / p_.out_height, y = line % p_.out_height - p_.top;
    const float* from[3];
    int64_t step[3];  // from pixel to pixel; of a line outside the picture all pixels are one
    for (int i = 0; i < 3; ++i) {
      const bool inside = y + i >= 0 && y + i < p_.height;
      from[i] = inside ? multiplied(sample * p_.height + y + i) : zeros_;
      step[i] = inside ? kWidth : 0;
    }
    const Four shift = shift_of(sample);
    for (int64_t x = 0; x < p_.out_width; ++x) {
      Four sum = shift;
#pragma GCC unroll 9
      for (int k = 0; k < 9; ++k) {
        sum += *reinterpret_cast<const Four*>(from[k / 3] + (x + k % 3) * step[k / 3] + k * N);
      }
      *reinterpret_cast<Four*>(sums_ + x * N) = sum;  // the lanes behind N are the next pixel's, which is yet to come
    }
    finish(line * p_.out_width * N, p_.out_width * N);
  }

 private:
  // A line of the batch's pictures with its padding, each pixel times all taps.
  const float* multiplied(int64_t line) {
    const int64_t slot = line % 3;
    float* out = lines_ + slot * p_.padded() * kWidth;
    if (held_[slot] == line) {
      return out;
    }
    held_[slot] = line;
    const T* x = data_.x + line * p_.width * p_.channels;
    if (p_.channels % W::kNumbers == 0) {
      W::row(x, left_, p_.width * p_.channels);
    } else {
      for (int64_t i = 0; i < p_.width; ++i) {
        W::row(x + i * p_.channels, left_ + i * words_, p_.channels);
      }
    }
    Vector* to = reinterpret_cast<Vector*>(out + p_.left * kWidth);
    for (int64_t i = 0; i < words_; i += kDepth) {
      const auto added = [&](Vector& all, Vector sum, int) { all = i == 0 ? sum : all + sum; };
      product<V>(p_.width, left_ + i, words_, 1, panel_ + i * V, std::min(kDepth, words_ - i), added, to);
    }
    return out;
  }

  Four shift_of(int64_t sample) const {
    Four out = {};
    for (int i = 0; i < N; ++i) {
      out[i] = (data_.bias == nullptr ? 0.0f : to_float(data_.bias[i])) +
               (data_.add == nullptr ? 0.0f : to_float(data_.add[sample * N + i]));
    }
    return out;
  }

  void finish(int64_t at, int64_t n) {
    if (p_.silu) {
      for (int64_t i = 0; i < n; ++i) {
        sums_[i] = fast_silu(sums_[i]);
      }
    }
    if (data_.residual != nullptr) {
      const float* rest = as_float(data_.residual + at, residual_, n);
      for (int64_t i = 0; i < n; ++i) {
        sums_[i] += rest[i];
      }
    }
    narrow(sums_, data_.out + at, n);
  }

  const Problem& p_;
  const Data<T>& data_;
  const Vector* panel_;
  int64_t words_;
  int64_t held_[3] = {-1, -1, -1};
  Room room_;
  float *lines_, *zeros_;
  Word* left_;
  float *sums_, *residual_;
};

template <class T, int N>
void run(const Problem& p, const Data<T>& data, const Tensor& weight) {
  using Word = typename Words<T>::Word;
  const int64_t words = words_of<Words<T>>(p.channels) * kVectorsOf<N> * kLanes;
  Room room(words);
  Word* panel = room.take<Word>(words);
  arrange<T, N>(weight, panel);
  const int64_t work = p.width * p.channels * 9 * N;
  torch::stable::parallel_for(0, p.batch * p.out_height, std::max<int64_t>(1, kGrain / work),
                              [&](int64_t begin, int64_t end) {
                                Worker<T, N> worker(p, data, panel);
                                for (int64_t line = begin; line < end; ++line) {
                                  worker.run(line);
                                }
                              });
}

// f.operator()<N>() with the number of results.
template <class F>
void with_results(int64_t n, F f) {
  switch (n) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    default:
      return f.template operator()<4>();
  }
}

Tensor taps(const Tensor& x, const Tensor& weight, std::vector<int64_t> padding, const std::optional<Tensor>& bias,
            const std::optional<Tensor>& add, bool silu, const std::optional<Tensor>& residual) {
  check(is_channels_last(x), kOp, ": x must be channels_last [B, C, H, W], got ", shape_of(x));
  check(weight.dim() == 4 && weight.size(0) >= 1 && weight.size(0) <= kMost && weight.size(1) == x.size(1) &&
            weight.size(2) == 3 && weight.size(3) == 3,
        kOp, ": weight must be [1 to ", kMost, ", ", x.size(1), ", 3, 3], got ", shape_of(weight));
  check(padding.size() == 4 && *std::min_element(padding.begin(), padding.end()) >= 0, kOp,
        ": padding must be four numbers, 0 and above");
  const int64_t results = weight.size(0);
  const Problem p{x.size(0), x.size(2), x.size(3), x.size(1), padding[2], padding[0],
                  x.size(2) + padding[2] + padding[3] - 2, x.size(3) + padding[0] + padding[1] - 2, silu};
  check(x.numel() > 0 && p.out_height >= 1 && p.out_width >= 1, kOp, ": nothing to convolve in ", shape_of(x));
  const std::vector<int64_t> shape = {p.batch, results, p.out_height, p.out_width};
  check(weight.scalar_type() == x.scalar_type(), kOp, ": weight must have the dtype of x");
  const auto fits = [&](const char* name, const Tensor& t, const std::vector<int64_t>& size, bool dense) {
    check(dense && has_shape(t, size) && t.scalar_type() == x.scalar_type(), kOp, ": ", name, " must be a dense ",
          shape_of(size), " of the dtype of x, got ", shape_of(t));
  };
  if (bias) {
    fits("bias", *bias, {results}, bias->is_contiguous());
  }
  if (add) {
    fits("add", *add, {p.batch, results}, add->is_contiguous());
  }
  if (residual) {
    fits("residual", *residual, shape, is_channels_last(*residual));
  }
  Tensor out = empty(shape, x.scalar_type(), /*channels_last=*/true);
  with_dtype(kOp, x.scalar_type(), [&]<class T>(T*) {
    const auto data = [](const auto& t) { return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr; };
    const T* from = static_cast<const T*>(x.const_data_ptr());
    const Data<T> all{from, data(bias), data(add), data(residual), data_of<T>(out)};
    with_results(results, [&]<int N>() { run<T, N>(p, all, weight); });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def(
      "taps(Tensor x, Tensor weight, SymInt[] padding, Tensor? bias, Tensor? add, bool silu, Tensor? residual) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) { m.impl("taps", TORCH_BOX(&taps)); }

}  // namespace diffkern

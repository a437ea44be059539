// attention, see diffkern/ops/attention.py. Flash attention (Dao et al. 2022): the scores of a block of queries live in
// the cache, a block of keys at a time, under a running maximum and sum (Milakov & Gimelshein 2018).
//
// Queries lie in the lanes of vectors, from their load to the result. So both products are one: rows of words (keys, or
// channels of the values), each broadcast, times a panel of vectors; and the softmax is never a sum across lanes.
// What is computed in which order depends on the sample's shape alone: neither threads nor the batch change a bit.
#include "../common/math.h"
#include "dense.h"
#include "mask.h"
#include "words.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <functional>
#include <optional>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::attention";
constexpr int64_t kQueries = 64;    // in a block
constexpr int64_t kDepth = 128;     // words of a score that are summed at once: one longer chain would lose digits
constexpr int64_t kHeld = 1 << 18;  // words: the keys of a head, or its values, that stay in a cache
constexpr int64_t kGrain = 1 << 19;  // multiply-adds that are worth another thread
static_assert(kKeys % 2 == 0);  // so that only the last key of all can be without a second one in its word

struct Problem {
  int64_t batch, queries, keys, heads, dim;
  float scale;

  int64_t row() const { return apart(dim); }

  // Rows of words lie an odd number of cache lines apart, for a column of them to spread over all cache sets.
  static int64_t apart(int64_t words) { return ((words + 15) / 16 | 1) * 16; }
};

// [B, S, H, D] with any strides but that of D, which is 1.
template <class T>
struct View {
  const T* data;
  int64_t sample, token, head;

  explicit View(const Tensor& t)
      : data(static_cast<const T*>(t.const_data_ptr())), sample(t.stride(0)), token(t.stride(1)), head(t.stride(2)) {}

  const T* at(int64_t b, int64_t s, int64_t h) const { return data + b * sample + s * token + h * head; }
};

// Up to V vectors of queries of one head, and their softmax so far.
struct Panel {
  float *query, *out;              // rows of V kLanes: words of the query, and the D channels of the result
  float *highest, *total, *decay;  // [V kLanes]
};

// Scores [keys, V kLanes] to words of weights, under the highest score so far; `decay` is what that does to earlier
// weights. Returns the number of rows of words.
template <class W, int V>
int64_t soften(const Panel& p, int64_t keys, float* scores) {
  constexpr int64_t kWidth = V * kLanes;
  for (; keys % W::kNumbers != 0; ++keys) {  // a key that is none weighs nothing
    std::fill_n(scores + keys * kWidth, kWidth, kNone);
  }
  float highest[kWidth], shift[kWidth];
  std::copy_n(p.highest, kWidth, highest);
  for (int64_t k = 0; k < keys; ++k) {
    for (int64_t j = 0; j < kWidth; ++j) {
      const float score = scores[k * kWidth + j];
      highest[j] = score > highest[j] ? score : highest[j];
    }
  }
  for (int64_t j = 0; j < kWidth; ++j) {
    shift[j] = highest[j] == kNone ? 0.0f : highest[j];  // all scores are -inf so far: their weights are zero, not NaN
    p.decay[j] = fast_exp(p.highest[j] - shift[j]);
    p.total[j] *= p.decay[j];
    p.highest[j] = highest[j];
  }
  Vector total[V] = {};
  alignas(sizeof(Vector)) float weights[W::kNumbers * kWidth];
  for (int64_t k = 0; k < keys; k += W::kNumbers) {
    for (int64_t i = 0; i < W::kNumbers; ++i) {
      for (int64_t j = 0; j < kWidth; ++j) {
        weights[i * kWidth + j] = fast_exp(scores[(k + i) * kWidth + j] - shift[j]);
      }
    }
    for (int64_t v = 0; v < V; ++v) {
      vector(scores + k / W::kNumbers * kWidth + v * kLanes) = W::join(weights + v * kLanes, kWidth, total[v]);
    }
  }
  for (int64_t v = 0; v < V; ++v) {
    vector(p.total + v * kLanes) += total[v];
  }
  return keys / W::kNumbers;
}

template <class W, int V, class Masked>
void attend(const Problem& p, const Panel& panel, int64_t keys, const typename W::Word* k, const typename W::Word* v,
            float* scores, Masked mask) {
  const auto vectors = [](float* x) { return reinterpret_cast<Vector*>(x); };
  const int64_t words = words_of<W>(p.dim);
  for (int64_t i = 0; i < words; i += kDepth) {
    const auto scaled = [&](Vector& to, Vector sum, int) { to = i == 0 ? sum * p.scale : to + sum * p.scale; };
    product<V>(keys, k + i, p.apart(words), 1, vectors(panel.query) + i * V, std::min(kDepth, words - i), scaled,
               vectors(scores));
  }
  mask();
  const int64_t rows = soften<W, V>(panel, keys, scores);
  const Vector* decay = vectors(panel.decay);
  const auto added = [&](Vector& to, Vector sum, int v) { to = to * decay[v] + sum; };
  product<V>(p.dim, v, 1, p.row(), vectors(scores), rows, added, vectors(panel.out));
}

// The width of the next panel when so many queries are left.
inline int64_t panel_width(int64_t left) {
  int64_t width = kVectors * kLanes;
  while (width > kLanes && left <= width / 2) {
    width /= 2;
  }
  return width;
}

// Does blocks of queries, in one thread.
template <class T>
class Worker {
  using W = Words<T>;
  using Word = typename W::Word;

 public:
  Worker(const Problem& p, const View<T>& q, const View<T>& k, const View<T>& v, const Mask& mask, T* out)
      : p_(p), q_(q), k_(k), v_(v), mask_(mask), out_(out), key_row_(p.apart(words_of<W>(p.dim))),
        whole_(p.keys * key_row_ <= kHeld), held_(whole_ ? p.keys : kKeys), room_(room()),
        query_(room_.take(kQueries * p.row())), result_(room_.take(kQueries * p.row())),
        key_(room_.take<Word>(held_ * key_row_)), value_(room_.take<Word>(words_of<W>(held_) * p.row())),
        scores_(room_.take(kKeys * kVectors * kLanes)), highest_(room_.take(kQueries)),
        total_(room_.take(kQueries)), decay_(room_.take(kQueries)),
        lines_(room_.take(kVectors * kLanes * p.row())), entries_(room_.take(kLanes * kKeys)) {}

  // The queries of one head from `first` on.
  void run(int64_t b, int64_t h, int64_t first) {
    if (whole_ && head_ != b * p_.heads + h) {
      head_ = b * p_.heads + h;
      gather(b, h, 0, p_.keys);
    }
    const int64_t queries = std::min(kQueries, p_.queries - first);
    for_each_panel(queries, [&](int64_t at, int64_t width, const Panel& panel) {
      load(b, h, first + at, std::min(width, queries - at), width, panel);
    });
    for (int64_t key = 0; key < p_.keys; key += kKeys) {
      const int64_t keys = std::min(kKeys, p_.keys - key), at = whole_ ? key : 0;
      if (!whole_) {
        gather(b, h, key, keys);
      }
      for_each_panel(queries, [&](int64_t query, int64_t width, const Panel& panel) {
        const auto mask = [&] {
          if (mask_.data) {
            const auto apply = mask_.keeps ? &Mask::apply<bool> : &Mask::apply<T>;
            (mask_.*apply)(b, h, first + query, queries - query, key, keys, width, scores_, entries_);
          }
        };
        const Word *k = key_ + at * key_row_, *v = value_ + at / W::kNumbers * p_.row();
        with_vectors(width, [&]<int V>() { attend<W, V>(p_, panel, keys, k, v, scores_, mask); });
      });
    }
    for_each_panel(queries, [&](int64_t at, int64_t width, const Panel& panel) {
      store(b, h, first + at, std::min(width, queries - at), width, panel);
    });
  }

 private:
  int64_t room() const {
    return (2 * kQueries + kVectors * kLanes + words_of<W>(held_)) * p_.row() + held_ * key_row_ +
           kKeys * (kVectors + 1) * kLanes + 3 * kQueries;
  }

  // Keys and values lie a row here and a row there, often on a page each: they are brought together once for a block of
  // queries, or once for all queries of a head if they then stay in the cache.
  void gather(int64_t b, int64_t h, int64_t first, int64_t keys) {
    for (int64_t j = 0; j < keys; ++j) {
      W::row(k_.at(b, first + j, h), key_ + j * key_row_, p_.dim);
    }
    for (int64_t j = 0; j < keys; j += W::kNumbers) {
      const T* second = j + 1 < keys ? v_.at(b, first + j + 1, h) : nullptr;
      W::zip(v_.at(b, first + j, h), second, value_ + j / W::kNumbers * p_.row(), p_.dim);
    }
  }

  template <class F>
  void for_each_panel(int64_t queries, F f) {
    for (int64_t at = 0, width; at < queries; at += width) {
      width = panel_width(queries - at);
      f(at, width, Panel{query_ + at * p_.row(), result_ + at * p_.row(), highest_ + at, total_ + at, decay_ + at});
    }
  }

  void load(int64_t b, int64_t h, int64_t first, int64_t queries, int64_t width, const Panel& panel) {
    std::fill_n(panel.highest, width, kNone);
    std::fill_n(panel.total, width, 0.0f);
    std::fill_n(panel.out, width * p_.dim, 0.0f);
    for (int64_t j = 0; j < width; ++j) {
      // Lanes that are no query repeat the last one: what they make is not stored.
      W::row(q_.at(b, first + std::min(j, queries - 1), h), reinterpret_cast<Word*>(lines_ + j * p_.row()), p_.dim);
    }
    for (int64_t j = 0; j < width; j += kLanes) {
      for (int64_t i = 0; i < words_of<W>(p_.dim); i += kLanes) {
        transpose(lines_ + j * p_.row() + i, p_.row(), panel.query + i * width + j, width, std::identity());
      }
    }
  }

  void store(int64_t b, int64_t h, int64_t first, int64_t queries, int64_t width, const Panel& panel) {
    for (int64_t j = 0; j < queries; j += kLanes) {
      const Vector& total = vector(panel.total + j);
      const Vector share = 1.0f / (total == 0.0f ? Vector{} + 1.0f : total);  // no key: the result is zero already
      for (int64_t d = 0; d < p_.dim; d += kLanes) {
        transpose(panel.out + d * width + j, width, lines_ + d, p_.row(), [=](Vector x) { return x * share; });
      }
      for (int64_t i = 0; i < std::min(kLanes, queries - j); ++i) {
        narrow(lines_ + i * p_.row(), out_ + ((b * p_.queries + first + j + i) * p_.heads + h) * p_.dim, p_.dim);
      }
    }
  }

  const Problem& p_;
  const View<T>&q_, &k_, &v_;
  const Mask& mask_;
  T* out_;
  int64_t key_row_;  // words
  bool whole_;       // all keys and values of a head are held, those of `head_`
  int64_t head_ = -1, held_;
  Room room_;
  float *query_, *result_;
  Word *key_, *value_;
  float *scores_, *highest_, *total_, *decay_, *lines_, *entries_;
};

template <class T>
void run(const Problem& p, const View<T>& q, const View<T>& k, const View<T>& v, const Mask& mask, T* out) {
  const int64_t blocks = (p.queries + kQueries - 1) / kQueries, all = p.batch * p.heads * blocks;
  const int64_t work = 2 * std::min(kQueries, p.queries) * p.keys * p.dim;
  const auto some = [&](int64_t begin, int64_t end) {
    Worker<T> worker(p, q, k, v, mask, out);
    for (int64_t i = begin; i < end; ++i) {
      worker.run(i / blocks / p.heads, i / blocks % p.heads, i % blocks * kQueries);
    }
  };
  torch::stable::parallel_for(0, all, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work)), some);
}

void check_like(const char* name, const Tensor& t, const Tensor& q, int64_t tokens) {
  check(t.dim() == 4 && t.size(0) == q.size(0) && t.size(1) == tokens && t.size(2) == q.size(2) &&
            t.size(3) == q.size(3),
        kOp, ": ", name, " must be [", q.size(0), ", ", tokens, ", ", q.size(2), ", ", q.size(3), "], got ",
        shape_of(t));
  check(t.scalar_type() == q.scalar_type(), kOp, ": ", name, " must have the dtype of q");
  check(t.stride(3) == 1 || t.size(3) == 1, kOp, ": ", name, " must have stride 1 in its last axis");
}

Mask mask_of(const std::optional<Tensor>& t, const Problem& p, ScalarType dtype) {
  if (!t) {
    return {};
  }
  const std::vector<int64_t> shape = {p.batch, p.heads, p.queries, p.keys};
  check(has_shape(*t, shape), kOp, ": mask must be ", shape_of(shape), ", got ", shape_of(*t));
  const bool keeps = t->scalar_type() == ScalarType::Bool;
  check(keeps || t->scalar_type() == dtype, kOp, ": mask must be bool or have the dtype of q");
  return {t->const_data_ptr(), keeps, t->stride(0), t->stride(1), t->stride(2), t->stride(3)};
}

Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale, const std::optional<Tensor>& mask) {
  check(q.dim() == 4 && q.size(3) >= 1, kOp, ": q must be [B, S, H, D], got ", shape_of(q));
  check(k.dim() == 4, kOp, ": k must be [B, T, H, D], got ", shape_of(k));
  check_like("q", q, q, q.size(1));
  check_like("k", k, q, k.size(1));
  check_like("v", v, q, k.size(1));
  const Problem p{q.size(0), q.size(1), k.size(1), q.size(2), q.size(3), static_cast<float>(scale)};
  const Mask what = mask_of(mask, p, q.scalar_type());
  Tensor out = empty({p.batch, p.queries, p.heads * p.dim}, q.scalar_type());
  with_dtype(kOp, q.scalar_type(), [&]<class T>(T*) {
    run(p, View<T>(q), View<T>(k), View<T>(v), what, data_of<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? mask) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) { m.impl("attention", TORCH_BOX(&attention)); }

}  // namespace diffkern

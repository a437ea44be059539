// attention, see diffkern/ops/attention.py. Flash attention (Dao et al. 2022): the scores of a block of queries live in
// the cache, a block of keys at a time, under a running maximum and sum (Milakov & Gimelshein 2018).
//
// Queries lie in the lanes of vectors, from their load to the result. So both products are one: rows of words (keys, or
// channels of the values), each broadcast, times a panel of vectors; and the softmax is never a sum across lanes.
// What is computed in which order depends on the sample's shape alone: neither threads nor the batch change a bit.
#include "dense.h"
#include "softmax.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <vector>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::attention";
constexpr int64_t kQueries = 64;    // in a block
constexpr int64_t kRows = 64;       // of words of weights in a block, summed at once like the next
constexpr int64_t kDepth = 128;     // words of a score that are summed at once: one longer chain would lose digits
constexpr int64_t kHeld = 1 << 18;  // words: the keys of a head, or its values, that stay in a cache
constexpr int64_t kNear = 1 << 17;  // words: keys and values of all heads that stay in a nearer one
constexpr int64_t kGrain = 1 << 19;  // multiply-adds that are worth another thread

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

// A block of keys for a panel of queries. `mask`, if there is one, scales and masks the scores.
template <class W, int V, class Masked>
void attend(const Problem& p, const Panel& panel, bool first, int64_t keys, const typename W::Word* k,
            const typename W::Word* v, float factor, float* scores, const Masked* mask) {
  const auto vectors = [](float* x) { return reinterpret_cast<Vector*>(x); };
  const int64_t words = words_of<W>(p.dim);
  Vector highest[V];
  for (int64_t i = 0; i < words; i += kDepth) {
    std::fill_n(highest, V, Vector{} + kNone);
    const auto summed = [&](Vector& to, Vector sum, int v) {
      to = i == 0 ? sum : to + sum;
      highest[v] = higher(to, highest[v]);
    };
    product<V>(keys, k + i, p.apart(words), 1, vectors(panel.query) + i * V, std::min(kDepth, words - i), summed,
               vectors(scores));
  }
  if (mask) {
    (*mask)();
    std::fill_n(highest, V, Vector{} + kNone);
    for (int64_t i = 0; i < keys * V; ++i) {
      highest[i % V] = higher(vectors(scores)[i], highest[i % V]);
    }
  }
  const int64_t rows = soften<W, V>(panel, keys, highest, factor, scores);
  const Vector* decay = vectors(panel.decay);
  const auto added = [&](Vector& to, Vector sum, int v) { to = first ? sum : to * decay[v] + sum; };
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
  static constexpr int64_t kBlock = kRows * W::kNumbers;  // keys: only the last of all can be alone in its word
  static_assert(kBlock <= kKeys);

 public:
  Worker(const Problem& p, const View<T>& q, const View<T>& k, const View<T>& v, const Mask& mask, T* out)
      : p_(p), q_(q), k_(k), v_(v), mask_(mask), out_(out), key_row_(p.apart(words_of<W>(p.dim))),
        whole_(p.keys * key_row_ <= kHeld), held_(whole_ ? p.keys : kBlock),
        key_size_(held_ * key_row_), value_size_(words_of<W>(held_) * p.row()),
        places_(whole_ && p.heads * (key_size_ + value_size_) <= kNear ? p.heads : 1), head_(places_, -1),
        room_(room()), query_(room_.take(kQueries * p.row())), result_(room_.take(kQueries * p.row())),
        key_(room_.take(places_ * key_size_)), value_(room_.take(places_ * value_size_)),
        scores_(room_.take(kBlock * kVectors * kLanes)), highest_(room_.take(kQueries)),
        total_(room_.take(kQueries)), decay_(room_.take(kQueries)), entries_(room_.take(kLanes * kKeys)),
        negative_(!mask.data && p.scale < 0.0f),
        factor_(static_cast<float>(mask.data ? kLog2e : std::abs(p.scale) * kLog2e)) {}

  // The i-th block of queries of one head. If keys and values of all heads are held, it is the heads' turn before it is
  // the next queries': those of all heads share cache lines.
  void run(int64_t i) {
    const int64_t blocks = (p_.queries + kQueries - 1) / kQueries, b = i / blocks / p_.heads;
    places_ > 1 ? run(b, i % p_.heads, i / p_.heads % blocks * kQueries)
                : run(b, i / blocks % p_.heads, i % blocks * kQueries);
  }

 private:
  // The queries of one head from `first` on.
  void run(int64_t b, int64_t h, int64_t first) {
    const int64_t place = h % places_;
    float *key_words = key_ + place * key_size_, *value_words = value_ + place * value_size_;
    if (whole_ && head_[place] != b * p_.heads + h) {
      head_[place] = b * p_.heads + h;
      gather(b, h, 0, p_.keys, key_words, value_words);
    }
    const int64_t queries = std::min(kQueries, p_.queries - first);
    for_each_panel(queries, [&](int64_t at, int64_t width, const Panel& panel) {
      load(b, h, first + at, std::min(width, queries - at), width, panel);
    });
    for (int64_t key = 0; key < p_.keys; key += kBlock) {
      const int64_t keys = std::min(kBlock, p_.keys - key), at = whole_ ? key : 0;
      if (!whole_) {
        gather(b, h, key, keys, key_words, value_words);
      }
      for_each_panel(queries, [&](int64_t query, int64_t width, const Panel& panel) {
        const auto mask = [&] {
          const auto apply = mask_.keeps ? &Mask::apply<bool> : &Mask::apply<T>;
          (mask_.*apply)(b, h, first + query, queries - query, key, keys, width, p_.scale, scores_, entries_);
        };
        const auto* k = reinterpret_cast<const Word*>(key_words + at * key_row_);
        const auto* v = reinterpret_cast<const Word*>(value_words + at / W::kNumbers * p_.row());
        with_vectors(width, [&]<int V>() {
          attend<W, V>(p_, panel, key == 0, keys, k, v, factor_, scores_, mask_.data ? &mask : nullptr);
        });
      });
    }
    for_each_panel(queries, [&](int64_t at, int64_t width, const Panel& panel) {
      store(b, h, first + at, std::min(width, queries - at), width, panel);
    });
  }

  int64_t room() const {
    return 2 * kQueries * p_.row() + places_ * (key_size_ + value_size_) + kBlock * kVectors * kLanes +
           kKeys * kLanes + 3 * kQueries;
  }

  // Keys and values lie a row here and a row there, often on a page each: they are brought together once for a block of
  // queries, or once for all queries of a head if they then stay in the cache.
  void gather(int64_t b, int64_t h, int64_t first, int64_t keys, float* key_words, float* value_words) const {
    const int64_t dim = p_.dim;
    for (int64_t j = 0; j < keys; ++j) {
      const T* row = k_.at(b, first + j, h);
      for (int64_t d = 0, word = 0; d < dim; d += kLanes * W::kNumbers, word += kLanes) {
        vector(key_words + j * key_row_ + word) = W::row(row + d, dim - d);
      }
    }
    for (int64_t j = 0; j < keys; j += W::kNumbers) {
      const T *one = v_.at(b, first + j, h), *other = j + 1 < keys ? v_.at(b, first + j + 1, h) : nullptr;
      for (int64_t d = 0; d < dim; d += kLanes) {
        vector(value_words + j / W::kNumbers * p_.row() + d) = W::zip(one + d, other ? other + d : nullptr, dim - d);
      }
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
    if (p_.keys == 0) {
      std::fill_n(panel.out, width * p_.dim, 0.0f);
    }
    for (int64_t j = 0; j < width; j += kLanes) {
      for (int64_t d = 0, word = 0; d < p_.dim; d += kLanes * W::kNumbers, word += kLanes) {
        // Lanes that are no query repeat the last one: what they make is not stored.
        const auto row = [&](int64_t i) {
          const T* query = q_.at(b, first + std::min(j + i, queries - 1), h);
          const Vector words = W::row(query + d, p_.dim - d);
          return negative_ ? W::negative(words) : words;
        };
        transpose(row, [&](int64_t i, Vector x) { vector(panel.query + (word + i) * width + j) = x; });
      }
    }
  }

  void store(int64_t b, int64_t h, int64_t first, int64_t queries, int64_t width, const Panel& panel) {
    for (int64_t j = 0; j < queries; j += kLanes) {
      const Vector& total = vector(panel.total + j);
      const Vector share = 1.0f / (total == 0.0f ? Vector{} + 1.0f : total);  // no key: the result is zero already
      T* out = out_ + ((b * p_.queries + first + j) * p_.heads + h) * p_.dim;
      for (int64_t d = 0; d < p_.dim; d += kLanes) {
        const auto channel = [&](int64_t i) { return vector(panel.out + (d + i) * width + j) * share; };
        const auto row = [&](int64_t i, Vector x) {
          if (i < queries - j) {
            store_lanes(x, out + i * p_.heads * p_.dim + d, p_.dim - d);
          }
        };
        transpose(channel, row);
      }
    }
  }

  const Problem& p_;
  const View<T>&q_, &k_, &v_;
  const Mask& mask_;
  T* out_;
  int64_t key_row_;  // words
  bool whole_;       // all keys and values of a head are held
  int64_t held_, key_size_, value_size_, places_;
  std::vector<int64_t> head_;  // whose they are, of all samples, in each place
  Room room_;
  float *query_, *result_, *key_, *value_;
  float *scores_, *highest_, *total_, *decay_, *entries_;
  bool negative_;  // queries change their sign, so that a factor of their scores is positive
  float factor_;   // from scores to exponents of two
};

template <class T>
void run(const Problem& p, const View<T>& q, const View<T>& k, const View<T>& v, const Mask& mask, T* out) {
  const int64_t blocks = (p.queries + kQueries - 1) / kQueries, all = p.batch * p.heads * blocks;
  const int64_t work = 2 * std::min(kQueries, p.queries) * p.keys * p.dim;
  const auto some = [&](int64_t begin, int64_t end) {
    Worker<T> worker(p, q, k, v, mask, out);
    for (int64_t i = begin; i < end; ++i) {
      worker.run(i);
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

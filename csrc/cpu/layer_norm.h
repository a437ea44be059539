// LayerNorm of rows [B, T, C] and what follows it: weight and bias of a channel, scale and shift of a sample's.
#pragma once

#include "blocks.h"

namespace diffkern {

// A vector a sample, [batch, channels], in float32.
inline std::vector<float> per_sample(const char* op, const char* name, const Tensor& t, int64_t batch,
                                     int64_t channels) {
  check(t.dim() == 2 && t.size(0) == batch && t.size(1) == channels && t.is_contiguous(), op, ": ", name, " must be [",
        batch, ", ", channels, "], got ", shape_of(t));
  return widened(op, t);
}

struct Normal {
  float mean, scale;  // normal = (x - mean) * scale

  template <class X>
  X operator()(X x) const {
    return (x - mean) * scale;
  }
};

inline Normal normal_of(const Moments& m, int64_t n, double eps) {
  return {m.mean, static_cast<float>(1 / std::sqrt(double{m.squares} / static_cast<double>(n) + eps))};
}

// The rows and all that is done to them. The two affine maps stay apart: folded into one, an infinity in one of them
// would meet one from the other and make a NaN that the formula does not.
struct LayerNorm {
  int64_t batch, tokens, channels;
  double eps;
  bool affine, modulated;
  std::vector<float> weight, bias, one_plus_scale, shift;

  LayerNorm(const char* op, const Tensor& x, const std::optional<Tensor>& shift_, const std::optional<Tensor>& scale,
            const std::optional<Tensor>& weight_, const std::optional<Tensor>& bias_, double eps_)
      : eps(eps_), affine(weight_ || bias_), modulated(scale.has_value()) {
    check(x.dim() == 3 && x.is_contiguous(), op, ": x must be contiguous [B, T, C], got ", shape_of(x));
    check(scale.has_value() == shift_.has_value(), op, ": give shift and scale together or neither");
    batch = x.size(0), tokens = x.size(1), channels = x.size(2);
    if (affine) {
      weight = parameter(op, "weight", weight_, channels, 1.0f);
      bias = parameter(op, "bias", bias_, channels, 0.0f);
    }
    if (modulated) {
      shift = per_sample(op, "shift", *shift_, batch, channels);
      one_plus_scale = per_sample(op, "scale", *scale, batch, channels);
      for (float& s : one_plus_scale) {
        s += 1.0f;
      }
    }
  }
};

// Its parameters as blocks of T's, and its rows.
template <class T>
class LayerNormRows {
 public:
  explicit LayerNormRows(const LayerNorm& p)
      : p_(p), weight_(p.weight, p.channels), bias_(p.bias, p.channels), scale_(p.one_plus_scale, p.channels),
        shift_(p.shift, p.channels) {}

  // A row of sample b.
  template <class Source>
  void emit(Source x, Normal normal, int64_t b, T* out) const {
    const int64_t n = p_.channels;
    const auto w = weight_.row(0), o = bias_.row(0), s = scale_.row(b), t = shift_.row(b);
    if (p_.affine && p_.modulated) {
      emit_blocks(x, out, n, [=](Block v, int64_t at, int64_t) {
        return (normal(v) * w.whole(at) + o.whole(at)) * s.whole(at) + t.whole(at);
      });
    } else if (p_.affine || p_.modulated) {
      const auto a = p_.affine ? w : s, c = p_.affine ? o : t;
      emit_blocks(x, out, n, [=](Block v, int64_t at, int64_t) { return normal(v) * a.whole(at) + c.whole(at); });
    } else {
      emit_blocks(x, out, n, [=](Block v, int64_t, int64_t) { return normal(v); });
    }
  }

 private:
  const LayerNorm& p_;
  Arranged<T> weight_, bias_, scale_, shift_;
};

}  // namespace diffkern

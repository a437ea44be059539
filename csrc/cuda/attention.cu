// attention: see diffkern/ops/attention.py.
#include "attention.cuh"
#include "launch.h"

#include <cmath>
#include <utility>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::attention";
// Numbers of a head, and of one whose sums for 128 queries stay in registers. kernels/attention_cuts.py knows both too.
constexpr int kWidestHead = 160, kWidestOf128 = 80;
// The numbers that a head is padded to, with zeros that are in shared memory only.
using Widths = std::integer_sequence<int, 32, 48, 64, 80, 96, 128, kWidestHead>;

Heads heads_of(const char* name, const Tensor& t, const std::vector<int64_t>& shape, ScalarType dtype) {
  check(t.dim() == 4 && has_shape(t, shape), kOp, ": ", name, " must be ", shape_of(shape), ", got ", shape_of(t));
  check(t.scalar_type() == dtype, kOp, ": ", name, " has the wrong dtype");
  bool fits = t.stride(3) == 1 && aligned(t.const_data_ptr());
  for (int i = 0; i < 3; ++i) {
    fits = fits && (t.size(i) == 1 || t.stride(i) % 8 == 0);
  }
  check(fits || t.numel() == 0, kOp, ": the numbers of a head of ", name, " must be neighbours, and begin on 16 bytes");
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

template <class T, int D, int kTiles>
void run(const Launch& launch, int64_t batch, const Attention& p) {
  using Room = AttentionRoom<D, kTiles>;
  const int64_t blocks = (int64_t{p.queries} + Room::kQueries - 1) / Room::kQueries * p.heads * batch;
  check(blocks <= INT32_MAX, kOp, ": the batch is too large");
  launch(attention<T, D, kTiles>, dim3(static_cast<unsigned>(blocks)), kAttentionThreads, Room::kBytes, p);
}

Tensor attention_of(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t block) {
  check(q.dim() == 4, kOp, ": q must be [B, S, H, D], got ", shape_of(q));
  check(k.dim() == 4, kOp, ": k must be [B, T, H, D], got ", shape_of(k));
  const int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2), dim = q.size(3), keys = k.size(1);
  const ScalarType dtype = q.scalar_type();
  check(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, kOp, ": takes float16 and bfloat16");
  check(dim % 8 == 0 && dim <= kWidestHead, kOp, ": takes heads of a multiple of 8 numbers up to ", kWidestHead,
        ", got ", dim);
  check(block == 64 || (block == 128 && dim <= kWidestOf128), kOp, ": a block is 64 queries, or 128 of heads of up to ",
        kWidestOf128, " numbers, got ", block, " of ", dim);
  check(std::max({queries, keys, heads}) <= INT32_MAX - 128, kOp, ": too many queries, keys or heads");
  Attention p{};
  p.q = heads_of("q", q, {batch, queries, heads, dim}, dtype);
  p.k = heads_of("k", k, {batch, keys, heads, dim}, dtype);
  p.v = heads_of("v", v, {batch, keys, heads, dim}, dtype);
  const Tensor out = empty_on(q, {batch, queries, heads * dim}, dtype);
  if (out.numel() == 0) {
    return out;
  }
  p.out = out.mutable_data_ptr();
  p.heads = static_cast<int>(heads);
  p.queries = static_cast<int>(queries);
  p.keys = static_cast<int>(keys);
  p.dim = static_cast<int>(dim);
  // Not zero, which would make NaN of the -inf of a key that is none.
  p.factor = std::max(static_cast<float>(std::abs(scale) * 1.4426950408889634), 1e-30f);
  p.signs = scale < 0 ? 0x80008000u : 0;
  const Launch launch(kOp, q, k, v);
  const auto in_width = [&]<class T, int D>(T*, std::integral_constant<int, D>) {
    if constexpr (D <= kWidestOf128) {
      (block == 64 ? run<T, D, 1> : run<T, D, 2>)(launch, batch, p);
    } else {
      run<T, D, 1>(launch, batch, p);
    }
    return true;
  };
  with_dtype(kOp, dtype, [&]<class T>(T* type) {
    if constexpr (sizeof(T) == 2) {
      [&]<int... D>(std::integer_sequence<int, D...>) {
        // The first that is wide enough.
        (void)((dim <= D && in_width(type, std::integral_constant<int, D>{})) || ...);
      }(Widths{});
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_CUDA, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, float scale, SymInt block) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_CUDA, DIFFKERN_KEY, m) { m.impl("attention", TORCH_BOX(&attention_of)); }

}  // namespace diffkern

// reparameterize: z = mean + exp(logvar / 2) epsilon in one pass, see diffkern/ops/reparameterize.py.
#include "dense.h"

#include <torch/csrc/stable/library.h>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::reparameterize";

template <class T>
void run(const Dense& d, const T* mean, const T* logvar, const int64_t* keys, int64_t draw, T* z) {
  const auto stream = [&](int64_t sample) { return Stream(keys + 2 * sample, draw); };
  for_each_run(d, stream, [&](int64_t sample, int64_t offset, int64_t n, const float* noise) {
    const int64_t at = sample * d.sample() + offset;
    float mean_room[kRun], logvar_room[kRun], out_room[kRun];
    const float* m = as_float(mean + at, mean_room, n);
    const float* v = as_float(logvar + at, logvar_room, n);
    float* y = place(z + at, out_room);
    for (int64_t i = 0; i < n; ++i) {
      y[i] = m[i] + fast_exp(0.5f * v[i]) * noise[i];
    }
    put(y, z + at, n);
  });
}

Tensor reparameterize(const Tensor& mean, const Tensor& logvar, const Tensor& keys, int64_t draw) {
  const Dense d = dense(kOp, "mean", mean);
  const int64_t* key = int64_data(kOp, "keys", keys, {d.batch, 2});
  const ScalarType dtype = mean.scalar_type();
  Tensor z = empty_as(mean, dtype, d.batch);
  with_dtype(kOp, dtype, [&]<class T>(T*) {
    const T* variance = data_like<T>(kOp, "logvar", logvar, dtype, mean, d.batch);
    run(d, static_cast<const T*>(mean.const_data_ptr()), variance, key, draw, data_of<T>(z));
  });
  return z;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def("reparameterize(Tensor mean, Tensor logvar, Tensor keys, SymInt draw) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) { m.impl("reparameterize", TORCH_BOX(&reparameterize)); }

}  // namespace diffkern

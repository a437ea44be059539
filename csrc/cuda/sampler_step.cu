// sampler_step: see diffkern/ops/sampler_step.py.
#include "sampler_step.cuh"

#include "samples.h"

#include <optional>
#include <tuple>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::sampler_step";

// The results, as flags: those of diffkern/ops/sampler_step.py.
enum Result : int64_t { kMakesNext = 1, kMakesInput = 2, kMakesBase = 4, kMakesHistory = 8 };

using Maybe = std::optional<Tensor>;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Everything of a call but what depends on the dtypes.
struct Call {
  const Tensor &x, &model_output, &table;
  const int64_t *row, *keys;
  const float* guidance;
  const Maybe *h0, *h1, *h2, *base;
  Dense d;
  int64_t results;
};

template <class S, class T>
Results typed(const Call& call, const Launch& launch) {
  const Dense& d = call.d;
  const ScalarType state = call.x.scalar_type(), dtype = call.model_output.scalar_type();
  const int64_t model_batch = (call.guidance == nullptr ? 1 : 2) * d.batch;
  const auto past = [&](const char* name, const Maybe* t) {
    return *t ? data_like<S>(kOp, name, **t, state, call.x, d.batch) : nullptr;
  };
  const auto result = [&](Result flag, ScalarType of, int64_t batch) {
    return call.results & flag ? empty_as(call.x, of, batch) : empty_on(call.x, {0}, of);
  };
  const Tensor x_next = result(kMakesNext, state, d.batch), model_input = result(kMakesInput, dtype, model_batch),
               base_next = result(kMakesBase, state, d.batch), h_next = result(kMakesHistory, state, d.batch);
  const T* output = data_like<T>(kOp, "model_output", call.model_output, dtype, call.x, model_batch);
  const Runs runs(d, kWide<S>, call.keys != nullptr, 1);
  const Step<S, T> step = {
      static_cast<const S*>(call.x.const_data_ptr()),
      output,
      static_cast<const float*>(call.table.const_data_ptr()),
      call.row,
      call.keys,
      call.guidance,
      {past("h0", call.h0), past("h1", call.h1), past("h2", call.h2), past("base", call.base)},
      {call.results & kMakesNext ? data_of<S>(x_next) : nullptr,
       call.results & kMakesBase ? data_of<S>(base_next) : nullptr,
       call.results & kMakesHistory ? data_of<S>(h_next) : nullptr},
      call.results & kMakesInput ? data_of<T>(model_input) : nullptr,
      runs.cut,
      call.table.size(0)};
  if (call.x.numel() != 0) {
    const bool all_aligned =
        aligned(step.x, step.output, step.past[0], step.past[1], step.past[2], step.past[3], step.made[0],
                step.made[1], step.made[2], step.model_input);
    launch(runs.pick(all_aligned, sampler_step<S, T, true, false>, sampler_step<S, T, false, false>,
                     sampler_step<S, T, true, true>, sampler_step<S, T, false, true>),
           runs.grid, kThreads, 0, step);
  }
  return {x_next, model_input, base_next, h_next};
}

Results launch_sampler_step(const Tensor& x, const Tensor& model_output, const Tensor& table, const Tensor& row,
                            const Maybe& keys, const Maybe& guidance, const Maybe& base, const Maybe& h0,
                            const Maybe& h1, const Maybe& h2, std::optional<int64_t> results) {
  const Dense d = dense(kOp, "x", x);
  const ScalarType state = x.scalar_type(), dtype = model_output.scalar_type();
  check(state == ScalarType::Float || state == dtype, kOp, ": x must be float32, or have the dtype of model_output");
  check(table.dim() == 2 && table.size(1) == kWidth && table.size(0) >= 2, kOp, ": table must be [R + 1, ", kWidth,
        "] with a row and the one after it, got ", shape_of(table));
  float_data(kOp, "table", table);
  if (guidance) {
    check(guidance->dim() == 1 && guidance->size(0) == d.batch, kOp, ": guidance must be [", d.batch, "], got ",
          shape_of(*guidance));
  }
  const Call call = {x,
                     model_output,
                     table,
                     int64_data(kOp, "row", row, {d.batch}),
                     keys ? int64_data(kOp, "keys", *keys, {d.batch, 2}) : nullptr,
                     guidance ? float_data(kOp, "guidance", *guidance) : nullptr,
                     &h0,
                     &h1,
                     &h2,
                     &base,
                     d,
                     results.value_or(kMakesNext | kMakesInput | (base ? kMakesBase : 0) | (h0 ? kMakesHistory : 0))};
  const Launch launch(kOp, x, model_output, table, row, keys, guidance, base, h0, h1, h2);
  std::optional<Results> out;
  with_dtype(kOp, dtype, [&]<class T>(T*) {
    out = state == ScalarType::Float ? typed<float, T>(call, launch) : typed<T, T>(call, launch);
  });
  return *out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_CUDA, m) {
  m.def(
      "sampler_step(Tensor x, Tensor model_output, Tensor table, Tensor row, Tensor? keys, Tensor? guidance, "
      "Tensor? base, Tensor? h0, Tensor? h1, Tensor? h2, int? results) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_CUDA, DIFFKERN_KEY, m) { m.impl("sampler_step", TORCH_BOX(&launch_sampler_step)); }

}  // namespace diffkern

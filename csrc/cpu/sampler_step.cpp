// sampler_step: one row of a sampler's table applied in one pass over memory, see diffkern/ops/sampler_step.py.
#include "dense.h"

#include <torch/csrc/stable/library.h>

#include <array>
#include <optional>
#include <tuple>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::sampler_step";

// The columns of a row, as in diffkern/ops/sampler_step.py.
enum Column { kCIn = 1, kA = 2, kB = 3, kClip = 4, kNoise = 5, kDraw = 6, kNext = 8, kNextBase = 16, kNextH = 24 };
constexpr int64_t kWidth = 32;
// The order of the weights in a block: x, m, x0, h0, h1, h2, base.
constexpr int kTerms = 7;

// The results, as flags: those of diffkern/ops/sampler_step.py.
enum Result : int64_t { kMakesNext = 1, kMakesInput = 2, kMakesBase = 4, kMakesHistory = 8 };

// Everything of a call but the model's output and input. S is what the state is kept in; a null pointer is a term or
// result that is not there.
template <class S>
struct Call {
  Dense d;
  const float* table;
  const int64_t* row;
  const int64_t* keys;
  const float* guidance;
  const S* x;
  std::array<const S*, 4> past;  // h0, h1, h2, base: the terms after x0
  S *x_next, *base_next, *h_next;
};

using Terms = std::array<const float*, kTerms>;

// out = sum of weight[j] * term[j]; a term with weight zero counts too, so that its NaN shows.
void combine(const float* weight, const Terms& term, float* out, int64_t n) {
  const float w0 = weight[0], w1 = weight[1], w2 = weight[2];
  const float *x = term[0], *m = term[1], *x0 = term[2];
  for (int64_t i = 0; i < n; ++i) {
    out[i] = w0 * x[i] + w1 * m[i] + w2 * x0[i];
  }
  for (int j = 3; j < kTerms; ++j) {
    if (term[j] != nullptr) {
      const float w = weight[j];
      const float* t = term[j];
      for (int64_t i = 0; i < n; ++i) {
        out[i] += w * t[i];
      }
    }
  }
}

// The guided model output in float32: in the model's own memory where that is possible, else in `room`.
template <class S, class T>
const float* guided(const Call<S>& c, const T* output, int64_t sample, int64_t at, int64_t n, float* room) {
  if (c.guidance == nullptr) {
    return as_float(output + at, room, n);
  }
  float u_room[kRun], c_room[kRun];
  const float* m_u = as_float(output + at, u_room, n);
  const float* m_c = as_float(output + c.d.batch * c.d.sample() + at, c_room, n);
  const float g = c.guidance[sample];
  for (int64_t i = 0; i < n; ++i) {
    room[i] = m_u[i] + g * (m_c[i] - m_u[i]);
  }
  return room;
}

template <class S, class T>
void run(const Call<S>& c, const T* output, T* model_input) {
  const auto step = [&](int64_t sample, int64_t offset, int64_t n, const float* noise) {
    const float* r = c.table + kWidth * c.row[sample];
    const int64_t at = sample * c.d.sample() + offset;
    float x_room[kRun], m_room[kRun], x0[kRun], past_room[4][kRun], room[kRun];
    const float* x = as_float(c.x + at, x_room, n);
    const float* m = guided(c, output, sample, at, n, m_room);
    const float a = r[kA], b = r[kB], clip = r[kClip];
    for (int64_t i = 0; i < n; ++i) {
      float v = a * x[i] + b * m[i];
      v = v > clip ? clip : v;  // written so that a NaN stays one
      x0[i] = v < -clip ? -clip : v;
    }
    Terms terms = {x, m, x0};
    for (size_t j = 0; j < c.past.size(); ++j) {
      terms[3 + j] = c.past[j] == nullptr ? nullptr : as_float(c.past[j] + at, past_room[j], n);
    }
    const auto make = [&](Column block, S* result) {
      if (result != nullptr) {
        float* out = place(result + at, room);
        combine(r + block, terms, out, n);
        put(out, result + at, n);
      }
    };
    make(kNextBase, c.base_next);
    make(kNextH, c.h_next);
    float* next = c.x_next == nullptr ? room : place(c.x_next + at, room);
    combine(r + kNext, terms, next, n);
    if (noise != nullptr) {
      const float scale = r[kNoise];
      for (int64_t i = 0; i < n; ++i) {
        next[i] += scale * noise[i];
      }
    }
    if (c.x_next != nullptr) {
      put(next, c.x_next + at, n);
    }
    if (model_input != nullptr) {
      const float c_in = r[kWidth + kCIn];
      float* input = place(model_input + at, m_room);  // m is used up
      for (int64_t i = 0; i < n; ++i) {
        input[i] = c_in * next[i];
      }
      put(input, model_input + at, n);
      if (c.guidance != nullptr) {
        std::memcpy(model_input + c.d.batch * c.d.sample() + at, model_input + at, n * sizeof(T));
      }
    }
  };
  if (c.keys == nullptr) {
    return for_each_run(c.d, nullptr, step);
  }
  const auto stream = [&](int64_t sample) {
    return Stream(c.keys + 2 * sample, static_cast<int64_t>(c.table[kWidth * c.row[sample] + kDraw]));
  };
  for_each_run(c.d, stream, step);
}

using Maybe = std::optional<Tensor>;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class S, class T>
Results typed(const Tensor& x, const Tensor& model_output, const Tensor& table, const Tensor& row, const Maybe& keys,
              const Maybe& guidance, const Maybe& base, const Maybe& h0, const Maybe& h1, const Maybe& h2,
              int64_t results) {
  Call<S> c{};
  c.d = dense(kOp, "x", x);
  c.x = static_cast<const S*>(x.const_data_ptr());
  check(table.dim() == 2 && table.size(1) == kWidth && table.size(0) >= 2, kOp, ": table must be [R + 1, ", kWidth,
        "] with a row and the one after it, got ", shape_of(table));
  c.table = float_data(kOp, "table", table);
  c.row = int64_data(kOp, "row", row, {c.d.batch});
  check_rows(kOp, "row", c.row, c.d.batch, table.size(0) - 1);
  c.keys = keys ? int64_data(kOp, "keys", *keys, {c.d.batch, 2}) : nullptr;
  if (guidance) {
    check(guidance->dim() == 1 && guidance->size(0) == c.d.batch, kOp, ": guidance must be [", c.d.batch, "], got ",
          shape_of(*guidance));
    c.guidance = float_data(kOp, "guidance", *guidance);
  }
  const ScalarType state = x.scalar_type(), dtype = model_output.scalar_type();
  const auto past = [&](const char* name, const Maybe& t) {
    return t ? data_like<S>(kOp, name, *t, state, x, c.d.batch) : nullptr;
  };
  c.past = {past("h0", h0), past("h1", h1), past("h2", h2), past("base", base)};

  const int64_t model_batch = (guidance ? 2 : 1) * c.d.batch;
  const auto empty = [&](Result result, ScalarType of, int64_t batch) {
    return results & result ? empty_as(x, of, batch) : no_elements(of);
  };
  const Tensor x_next = empty(kMakesNext, state, c.d.batch), model_input = empty(kMakesInput, dtype, model_batch),
               base_next = empty(kMakesBase, state, c.d.batch), h_next = empty(kMakesHistory, state, c.d.batch);
  c.x_next = results & kMakesNext ? data_of<S>(x_next) : nullptr;
  c.base_next = results & kMakesBase ? data_of<S>(base_next) : nullptr;
  c.h_next = results & kMakesHistory ? data_of<S>(h_next) : nullptr;
  run(c, data_like<T>(kOp, "model_output", model_output, dtype, x, model_batch),
      results & kMakesInput ? data_of<T>(model_input) : nullptr);
  return {x_next, model_input, base_next, h_next};
}

Results sampler_step(const Tensor& x, const Tensor& model_output, const Tensor& table, const Tensor& row,
                     const Maybe& keys, const Maybe& guidance, const Maybe& base, const Maybe& h0, const Maybe& h1,
                     const Maybe& h2, std::optional<int64_t> results) {
  const ScalarType state = x.scalar_type(), dtype = model_output.scalar_type();
  check(state == ScalarType::Float || state == dtype, kOp, ": x must be float32, or have the dtype of model_output");
  const int64_t made =
      results.value_or(kMakesNext | kMakesInput | (base ? kMakesBase : 0) | (h0 ? kMakesHistory : 0));
  std::optional<Results> out;
  with_dtype(kOp, dtype, [&]<class T>(T*) {
    out = state == ScalarType::Float
              ? typed<float, T>(x, model_output, table, row, keys, guidance, base, h0, h1, h2, made)
              : typed<T, T>(x, model_output, table, row, keys, guidance, base, h0, h1, h2, made);
  });
  return *out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def(
      "sampler_step(Tensor x, Tensor model_output, Tensor table, Tensor row, Tensor? keys, Tensor? guidance, "
      "Tensor? base, Tensor? h0, Tensor? h1, Tensor? h2, int? results) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) { m.impl("sampler_step", TORCH_BOX(&sampler_step)); }

}  // namespace diffkern

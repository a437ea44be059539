// vlb_term: a term of the variational bound of each sample in one pass over memory, see diffkern/ops/vlb_term.py.
#include "rows.h"

#include <torch/csrc/stable/library.h>

#include <vector>

namespace diffkern {
namespace {

constexpr const char* kOp = "diffkern::vlb_term";

// The columns of a row, as in diffkern/ops/vlb_term.py.
enum Column { kA, kB, kClip, kC1, kK0, kVar, kLogvarMin, kLogvarMax, kBin, kWidth = 16 };

// What a sample's row makes of its logvar = low + (v + 1) / 2 range; what all elements share is computed in float64.
struct Row {
  float a, b, clip, weight, width, range;
  double shared, precision;  // K0 + low + VAR precision, and exp(-low), for the Gaussian
  float ratio;               // VAR precision
  float root, log_bin;       // exp(-low / 2) and log(2 BIN) - low / 2, for the bin

  Row(const float* r, bool learned)
      : a(r[kA]), b(r[kB]), clip(r[kClip]), weight(r[kC1]), width(r[kBin]), range(r[kLogvarMax] - r[kLogvarMin]) {
    const double low = r[learned ? kLogvarMin : kLogvarMax];
    precision = std::exp(-low);
    shared = r[kK0] + low + r[kVar] * precision;
    ratio = static_cast<float>(r[kVar] * precision);
    root = static_cast<float>(std::exp(-0.5 * low));
    log_bin = static_cast<float>(std::log(2.0 * width) - 0.5 * low);
  }
};

// -log of the mass that a normal with standard deviation 1 / precision has within `width` of a point at `gap` from its
// mean; the cases are those of the reference. log_bin = log(2 width precision). Neither
// branches nor calls, which GCC would leave in twice, so that loops over it vectorise.
[[gnu::always_inline]] inline float bin_nll(float x0, float gap, float width, float precision, float log_bin) {
  const bool lowest = x0 <= width - 1.0f, highest = x0 >= 1.0f - width, edge = lowest || highest;
  const float distance = gap < 0.0f ? -gap : gap;
  const float nearest = lowest ? -gap : (highest ? gap : distance);
  const float a = (nearest - width) * precision, b = (distance + width) * precision, h = width * precision;
  const float y = nearest * precision, yh = y * h;
  const bool tail = a > 0.0f, narrow = !edge && h < 0.25f && yh < 0.25f;
  const float half_square = 0.5f * a * a;

  const float near = fast_scaled_tail(a < 0.0f ? -a : a) * fast_exp(tail ? 0.0f : -half_square);
  const float beyond = fast_scaled_tail(b) * fast_exp(tail ? -2.0f * yh : -0.5f * b * b);
  const float far = edge ? 0.0f : beyond;

  const float yy = yh * yh, hh = h * h;  // h^2k He_2k(y) / (2k + 1)!
  float series = yy * (yy * (yy - 15.0f * hh) + 45.0f * hh * hh) - 15.0f * hh * hh * hh;
  series = series * (1.0f / 5040) + (yy * (yy - 6.0f * hh) + 3.0f * hh * hh) * (1.0f / 120) + (yy - hh) * (1.0f / 6);

  const float one_plus = narrow ? series : -(near + far);
  const bool plain = tail && !narrow;
  const float u = plain ? near - far : 1.0f + one_plus;
  const float rounded = plain ? 0.0f : (one_plus - (u - 1.0f)) / u;  // what 1 + lost
  const float base = narrow ? log_bin - (0.5f * y * y + 0.918938533f) : (tail ? -half_square : 0.0f);
  return -(base + (fast_log(u) + rounded));
}

// The elements [at, at + n) of a sample's prediction and, if it is learned, of its v, in float32.
template <class T>
struct Output {
  const T* data;
  Dense d;  // of x_0
  bool learned;

  struct Run {
    const float *m, *v;
  };

  Run read(int64_t sample, int64_t at, int64_t n, float* m_room, float* v_room) const {
    const int64_t size = d.sample();
    const T* own = data + sample * size * (learned ? 2 : 1);
    if (!learned) {
      return {as_float(own + at, m_room, n), nullptr};
    }
    if (!d.channels_last) {
      return {as_float(own + at, m_room, n), as_float(own + size + at, v_room, n)};
    }
    for (int64_t i = 0, pixel = at / d.channels, c = at % d.channels; i < n; ++i) {  // a pixel's m, then its v
      const T* here = own + (2 * pixel * d.channels + c);
      m_room[i] = to_float(here[0]);
      v_room[i] = to_float(here[d.channels]);
      if (++c == d.channels) {
        c = 0;
        ++pixel;
      }
    }
    return {m_room, v_room};
  }
};

// The term of n elements. The row is a copy: no write to an array can change it.
double term_of(const Row row, const float* x0, const float* x_t, const float* m, const float* v, int64_t n) {
  alignas(64) float gap[kRun], term[kRun];
  for (int64_t i = 0; i < n; ++i) {
    float x0_hat = row.a * x_t[i] + row.b * m[i];
    x0_hat = x0_hat > row.clip ? row.clip : x0_hat;  // written so that a NaN stays one
    gap[i] = x0[i] - (x0_hat < -row.clip ? -row.clip : x0_hat);
  }
  const auto more = [&](int64_t i) { return (v[i] + 1.0f) * 0.5f * row.range; };  // logvar - low
  const auto sum = [&] { return double{sum_of(n, [&](int64_t i) { return term[i]; })}; };
  if (row.width > 0.0f && v == nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      term[i] = bin_nll(x0[i], gap[i], row.width, row.root, row.log_bin);
    }
    return sum();
  }
  if (row.width > 0.0f) {
    for (int64_t i = 0; i < n; ++i) {
      const float half = 0.5f * more(i), precision = row.root + row.root * fast_exp_minus_one(-half).minus_one;
      term[i] = bin_nll(x0[i], gap[i], row.width, precision, row.log_bin - half);
    }
    return sum();
  }
  if (v == nullptr) {
    const double squares = sum_of(n, [&](int64_t i) { return gap[i] * gap[i]; });
    return 0.5 * (n * row.shared + double{row.weight} * row.weight * row.precision * squares);
  }
  // `shared` is apart: it is far larger than what the elements add when the variances are nearly equal.
  const float precision = static_cast<float>(row.precision);
  for (int64_t i = 0; i < n; ++i) {
    const float d = row.weight * gap[i], u = more(i);
    const Exp e = fast_exp_minus_one(-u);
    term[i] = (u + row.ratio * e.minus_one) + d * d * (precision * e.value);
  }
  return 0.5 * (n * row.shared + sum());
}

template <class S, class T>
void run(const Dense& d, const S* x0, const S* x_t, const Output<T>& output, const std::vector<Row>& rows, float* out) {
  const int64_t size = d.sample(), chunks = (size + kRun - 1) / kRun;
  std::vector<double> parts(d.batch * chunks);
  in_parallel(d.batch * chunks, kRun, [&](int64_t begin, int64_t end) {
    float x0_room[kRun], x_t_room[kRun], m_room[kRun], v_room[kRun];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / chunks, at = i % chunks * kRun, n = std::min(kRun, size - at);
      const auto [m, v] = output.read(sample, at, n, m_room, v_room);
      parts[i] = term_of(rows[sample], as_float(x0 + sample * size + at, x0_room, n),
                         as_float(x_t + sample * size + at, x_t_room, n), m, v, n);
    }
  });
  for (int64_t sample = 0; sample < d.batch; ++sample) {
    double total = 0;
    for (int64_t k = 0; k < chunks; ++k) {
      total += parts[sample * chunks + k];
    }
    out[sample] = static_cast<float>(total);
  }
}

// Whether model_output, [B, C, ...] or [B, 2C, ...] in the layout of x0, has a learned variance.
bool is_learned(const Tensor& model_output, const Tensor& x0) {
  bool same = model_output.dim() == x0.dim();
  for (int64_t i = 0; same && i < x0.dim(); ++i) {
    same = i == 1 || model_output.size(i) == x0.size(i);
  }
  const int64_t channels = x0.size(1), given = same ? model_output.size(1) : -1;
  check(given == channels || given == 2 * channels, kOp, ": model_output must have ", channels, " or ", 2 * channels,
        " channels and otherwise the shape ", shape_of(x0), ", got ", shape_of(model_output));
  check(x0.is_contiguous() ? model_output.is_contiguous() : is_channels_last(model_output), kOp,
        ": model_output must have the layout of the first tensor");
  return given != channels;
}

Tensor vlb_term(const Tensor& x0, const Tensor& x_t, const Tensor& model_output, const Tensor& table,
                const Tensor& timestep) {
  check(x0.dim() >= 2, kOp, ": x0 must be [B, C, ...], got ", shape_of(x0));
  const Dense d = dense(kOp, "x0", x0);
  const bool learned = is_learned(model_output, x0);
  check(table.dim() == 2 && table.size(1) == kWidth, kOp, ": table must be [T, ", int64_t{kWidth}, "], got ",
        shape_of(table));
  const float* first = float_data(kOp, "table", table);
  const int64_t* t = int64_data(kOp, "timestep", timestep, {d.batch});
  check_rows(kOp, "timestep", t, d.batch, table.size(0));
  std::vector<Row> rows;
  rows.reserve(d.batch);
  for (int64_t i = 0; i < d.batch; ++i) {
    rows.emplace_back(first + kWidth * t[i], learned);
  }
  const Tensor out = empty({d.batch}, ScalarType::Float);
  const ScalarType state = x0.scalar_type(), dtype = model_output.scalar_type();
  check(state == ScalarType::Float || state == dtype, kOp, ": x0 must be float32, or have the dtype of model_output");
  const auto typed = [&]<class S, class T>(S*, T*) {
    const Output<T> output{static_cast<const T*>(model_output.const_data_ptr()), d, learned};
    run(d, data_like<S>(kOp, "x0", x0, state, x0, d.batch), data_like<S>(kOp, "x_t", x_t, state, x0, d.batch), output,
        rows, data_of<float>(out));
  };
  with_dtype(kOp, dtype, [&]<class T>(T* output) {
    if (state == ScalarType::Float) {
      typed(static_cast<float*>(nullptr), output);
    } else {
      typed(output, output);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(diffkern_C, m) {
  m.def("vlb_term(Tensor x0, Tensor x_t, Tensor model_output, Tensor table, Tensor timestep) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(diffkern_C, CPU, m) { m.impl("vlb_term", TORCH_BOX(&vlb_term)); }

}  // namespace diffkern

// Argument checks: one sentence each, naming the op, what was given and what is allowed.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace diffkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Not STD_TORCH_CHECK: that puts a source path in front of the sentence that the user reads.
template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) [[likely]] {
    return;
  }
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

// A shape as it is written in a sentence: only once there is one, since that takes longer than a small op.
struct Shape {
  const int64_t *begin, *end;
};

inline std::ostream& operator<<(std::ostream& out, Shape shape) {
  out << '[';
  for (const int64_t* size = shape.begin; size != shape.end; ++size) {
    out << (size == shape.begin ? "" : ", ") << *size;
  }
  return out << ']';
}

inline Shape shape_of(const std::vector<int64_t>& sizes) { return {sizes.data(), sizes.data() + sizes.size()}; }

inline Shape shape_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

inline bool has_shape(const Tensor& t, const std::vector<int64_t>& sizes) {
  return std::vector<int64_t>(t.sizes().begin(), t.sizes().end()) == sizes;
}

// A dense int64 vector or matrix of the given sizes, such as keys [B, 2].
inline const int64_t* int64_data(const char* op, const char* name, const Tensor& t, std::vector<int64_t> sizes) {
  check(t.scalar_type() == ScalarType::Long && t.is_contiguous() && has_shape(t, sizes), op, ": ", name,
        " must be contiguous int64 ", shape_of(sizes), ", got ", shape_of(t));
  return static_cast<const int64_t*>(t.const_data_ptr());
}

inline const float* float_data(const char* op, const char* name, const Tensor& t) {
  check(t.scalar_type() == ScalarType::Float && t.is_contiguous(), op, ": ", name, " must be contiguous float32");
  return static_cast<const float*>(t.const_data_ptr());
}

// Every entry of a vector of row numbers is in [0, rows).
inline void check_rows(const char* op, const char* name, const int64_t* row, int64_t n, int64_t rows) {
  for (int64_t i = 0; i < n; ++i) {
    check(row[i] >= 0 && row[i] < rows, op, ": ", name, "[", i, "] is ", row[i], ", allowed are 0 to ", rows - 1);
  }
}

}  // namespace diffkern

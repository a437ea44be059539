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

inline std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  const auto sizes = t.sizes();
  for (size_t i = 0; i < sizes.size(); ++i) {
    out << (i == 0 ? "[" : ", ") << sizes[i];
  }
  out << (sizes.size() == 0 ? "[]" : "]");
  return out.str();
}

// A dense int64 vector or matrix of the given sizes, such as keys [B, 2].
inline const int64_t* int64_data(const char* op, const char* name, const Tensor& t, std::vector<int64_t> sizes) {
  bool same = t.scalar_type() == ScalarType::Long && t.dim() == static_cast<int64_t>(sizes.size()) && t.is_contiguous();
  std::ostringstream want;
  for (size_t i = 0; i < sizes.size(); ++i) {
    want << (i == 0 ? "[" : ", ") << sizes[i];
    same = same && t.size(i) == sizes[i];
  }
  check(same, op, ": ", name, " must be contiguous int64 ", want.str(), "], got ", shape_of(t));
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

// The widest registers of the machine as vectors of float32, and the memory that a thread computes in.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>

namespace diffkern {

#ifdef __AVX512F__
constexpr int64_t kLanes = 16, kRegisters = 32;
#else
constexpr int64_t kLanes = 8, kRegisters = 16;
#endif

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), may_alias));
typedef float LooseVector __attribute__((vector_size(kLanes * sizeof(float)), may_alias, aligned(4)));

inline Vector& vector(float* aligned) { return *reinterpret_cast<Vector*>(aligned); }
inline const Vector& vector(const float* aligned) { return *reinterpret_cast<const Vector*>(aligned); }

// Memory of one thread, handed out in whole cache lines, with nothing written in it: to clear it takes time too.
class Room {
 public:
  explicit Room(int64_t floats) : memory_(std::make_unique_for_overwrite<float[]>(floats + 16)) {
    next_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t{63});
  }

  template <class Word = float>
  Word* take(int64_t words) {
    constexpr int64_t line = 64 / sizeof(Word);
    return reinterpret_cast<Word*>(std::exchange(next_, next_ + (words + line - 1) / line * 16));
  }

 private:
  std::unique_ptr<float[]> memory_;
  float* next_;
};

}  // namespace diffkern

// csrc/cuda/matrix.cuh on the CPU: which lane gives and gets which number, as PTX ISA draws it ("Matrix Fragments for
// mma.m16n8k16", "ldmatrix", "cp.async"). Lanes meet as they do for shuffles. A copy arrives when it is waited for; until
// then its place holds NaN, so that one which is read too soon, or begun while its place is still read, shows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace cuda_on_cpu {

using Shared = char*;

inline Shared shared_of(const void* pointer) { return const_cast<char*>(static_cast<const char*>(pointer)); }

inline void check_wide(const void* shared) {
  const char* at = static_cast<const char*>(shared);
  if (at < block.shared() || at + 16 > block.shared() + kMaxShared || (at - block.shared()) % 16 != 0) {
    fail("16 bytes of shared memory that do not lie in it, or not on 16 bytes");
  }
}

template <class T>
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b, T) {
  struct Words {
    uint32_t a[4], b[2];
  };
  const unsigned turn = show(Words{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const unsigned lane = threadIdx.x % warpSize;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (unsigned k = 0; k < 16; k += 2) {
      const Words of_row = shown_by<Words>(row % 8 * 4 + k % 8 / 2, turn);
      const Words of_column = shown_by<Words>(column * 4 + k % 8 / 2, turn);
      float a0, a1, b0, b1;
      unpack(of_row.a[row / 8 + k / 8 * 2], a0, a1, T{});
      unpack(of_column.b[k / 8], b0, b1, T{});
      sum += a0 * b0;
      sum += a1 * b1;
    }
    c[i] += sum;
  }
}

inline void load_matrices(uint32_t (&to)[4], Shared row) {
  check_wide(row);
  const unsigned turn = show(row), lane = threadIdx.x % warpSize;
  for (unsigned m = 0; m < 4; ++m) {
    std::memcpy(&to[m], shown_by<Shared>(8 * m + lane / 4, turn) + lane % 4 * 4, 4);
  }
}

inline void load_transposed(uint32_t (&to)[4], Shared row) {
  check_wide(row);
  const unsigned turn = show(row), lane = threadIdx.x % warpSize;
  for (unsigned m = 0; m < 4; ++m) {
    uint16_t numbers[2];
    for (unsigned i = 0; i < 2; ++i) {
      std::memcpy(&numbers[i], shown_by<Shared>(8 * m + lane % 4 * 2 + i, turn) + lane / 4 * 2, 2);
    }
    std::memcpy(&to[m], numbers, 4);
  }
}

inline void copy_wide(Shared to, const void* from, bool there) {
  check_wide(to);
  if (reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    fail("a copy of 16 bytes that do not begin on 16 bytes");
  }
  std::memset(to, 0xff, 16);
  Fiber& self = block.fibers[block.current];
  self.copies.push_back({to, there ? global(from) : nullptr, self.groups});
}

inline void commit_copies() { ++block.fibers[block.current].groups; }

template <int kLeft>
void wait_for_copies() {
  Fiber& self = block.fibers[block.current];
  std::erase_if(self.copies, [&](const Copy& copy) {
    if (copy.group + kLeft >= self.groups) {
      return false;
    }
    copy.from == nullptr ? std::memset(copy.to, 0, 16) : std::memcpy(copy.to, copy.from, 16);
    return true;
  });
}

}  // namespace cuda_on_cpu

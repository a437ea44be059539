// A channels_last sample as columns of blocks (blocks.h), and the sums over its pixels, from which the moments of its
// groups come. A pixel's numbers lie side by side, in one tensor or in two. Each is read as rows of whole blocks,
// several pixels a row where one is none, a column after the other: sums and parameters stay in registers.
#pragma once

#include "blocks.h"
#include "group_norm.h"

namespace diffkern {

constexpr int64_t kPixelChunk = 16384;  // numbers of the pixels that are taken together, about

// What one tensor has of the channels of a sample.
template <class T>
struct Part {
  const T* in;
  int64_t first, channels;  // of the norm's channels
  int64_t together;         // pixels in a row
  int64_t at;               // where its columns begin among those of all parts: whole blocks
  int64_t ahead;            // numbers from one chunk of pixels to the next

  int64_t columns() const { return channels * together; }
  int64_t end() const { return at + in_blocks(columns()); }
};

// A sample's parts, and the pixels that one thread takes at a time. They depend on the sample's shape alone, so that
// neither threads nor the batch change a bit of the result.
template <class T>
struct Layout {
  std::vector<Part<T>> parts;
  int64_t chunk, chunks;

  Layout(const GroupNorm& p, const Source<T>& source, int64_t sample) {
    const int64_t rest = p.channels - source.own, pixel = sample * p.pixels;
    int64_t together = 1;
    if (rest == 0) {  // as few pixels as fill blocks, two for additions to overlap
      while (2 * together <= p.pixels && (p.channels * together % kBlock != 0 || p.channels * together < 2 * kBlock)) {
        together *= 2;
      }
    }
    chunk = std::max<int64_t>(1, kPixelChunk / p.channels / together) * together;
    chunks = (p.pixels + chunk - 1) / chunk;
    parts.push_back({source.x + pixel * source.own, 0, source.own, together, 0, chunk * source.own});
    if (rest != 0) {
      parts.push_back({source.skip + pixel * rest, source.own, rest, together, parts[0].end(), chunk * rest});
    }
  }

  int64_t width() const { return parts.back().end(); }
};

// Asks for the block at the same place of the next chunk: down a column of blocks the hardware does not foresee one.
template <int kToWrite, class T>
void fetch(const T* block, int64_t ahead) {
  constexpr int64_t kLine = std::min<int64_t>(kBlock, 64 / sizeof(T));
  for (int64_t i = 0; i < kBlock; i += kLine) {
    __builtin_prefetch(block + ahead + i, kToWrite, 2);
  }
}

// f(first column, how many columns) for blocks of columns, two at a time where there are two: f is given that number as
// a type. The last block may be short.
template <class F>
void for_each_panel(int64_t columns, F f) {
  int64_t at = 0;
  for (; at + 2 * kBlock <= columns; at += 2 * kBlock) {
    f(std::integral_constant<int, 2>(), at, kBlock);
  }
  for (; at < columns; at += kBlock) {
    f(std::integral_constant<int, 1>(), at, std::min(kBlock, columns - at));
  }
}

// f(first row, end) for some rows at a time: rounding grows with the length of a chain of additions.
template <class F>
void for_each_chain(int64_t rows, F f) {
  constexpr int64_t kRows = 32;
  for (int64_t row = 0; row < rows; row += kRows) {
    f(row, std::min(rows, row + kRows));
  }
}

inline void add(Block x, float* sums) { write(read(sums) + x, sums); }

// Adds rows of a part, `step` numbers from one to the next, to the sums of their columns: of their numbers less the
// pivot of the column, and of the squares of those.
template <class T>
void add_rows(const Part<T>& part, const T* in, int64_t rows, int64_t step, int64_t columns, const float* pivot,
              float* sums, float* squares) {
  for_each_panel(columns, [=, &part]<int kBlocks>(std::integral_constant<int, kBlocks>, int64_t at, int64_t n) {
    Block center[kBlocks];
    for (int j = 0; j < kBlocks; ++j) {
      center[j] = read(pivot + at + j * kBlock);
    }
    for_each_chain(rows, [&](int64_t row, int64_t end) {
      Block sum[kBlocks]{}, square[kBlocks]{};
      for (const T* from = in + row * step + at; row < end; ++row, from += step) {
        for (int j = 0; j < kBlocks; ++j) {
          fetch<0>(from + j * kBlock, part.ahead);
          const Block x = n == kBlock ? read(from + j * kBlock) - center[j] : first<T>(read(from, n) - center[j], n);
          sum[j] = sum[j] + x, square[j] = square[j] + x * x;
        }
      }
      for (int j = 0; j < kBlocks; ++j) {
        add(sum[j], sums + at + j * kBlock), add(square[j], squares + at + j * kBlock);
      }
    });
  });
}

#ifdef __AVX512BF16__
// The same without a pivot, by the instruction that adds two products: the squares of a pair of columns come in one
// sum, in the first one's place. It takes numbers below 2^-126 for zero.
inline void add_pairs(const Part<BFloat16>& part, const BFloat16* in, int64_t rows, int64_t columns, float* sums,
                      float* squares) {
  for_each_panel(columns, [=, &part]<int kBlocks>(std::integral_constant<int, kBlocks>, int64_t at, int64_t n) {
    const auto first = (__m512bh)_mm512_set1_epi32(0x3f80), second = (__m512bh)_mm512_set1_epi32(0x3f800000);
    for_each_chain(rows, [&](int64_t row, int64_t end) {
      Block sum[kBlocks]{}, square[kBlocks]{};
      for (const BFloat16* from = in + row * part.columns() + at; row < end; ++row, from += part.columns()) {
        for (int j = 0; j < kBlocks; ++j) {
          fetch<0>(from + j * kBlock, part.ahead);
          BFloat16 some[kBlock] = {};
          if (n < kBlock) {
            std::copy_n(from, n, some);
          }
          const auto pairs = (__m512bh)_mm512_loadu_si512(n < kBlock ? some : from + j * kBlock);
          sum[j].a = (Vector)_mm512_dpbf16_ps((__m512)sum[j].a, pairs, first);
          sum[j].b = (Vector)_mm512_dpbf16_ps((__m512)sum[j].b, pairs, second);
          square[j].a = (Vector)_mm512_dpbf16_ps((__m512)square[j].a, pairs, pairs);
        }
      }
      for (int j = 0; j < kBlocks; ++j) {
        add(sum[j], sums + at + j * kBlock), add(square[j], squares + at + j * kBlock);
      }
    });
  });
}
#endif

// Where a column lies in the order of its block.
template <class T>
int64_t place(int64_t column) {
  constexpr auto kPlaces = [] {
    std::array<uint8_t, kBlock> places{};
    for (uint32_t i = 0; i < kBlock; ++i) {
      places[kOrder<T>[i]] = static_cast<uint8_t>(i);
    }
    return places;
  }();
  return column / kBlock * kBlock + kPlaces[column % kBlock];
}

// f(group, first channel, channels, first column) for the columns of every group in every pixel of a part's rows.
template <class T, class F>
void for_each_group(const GroupNorm& p, const Part<T>& part, F f) {
  for (int64_t pixel = 0; pixel < part.together; ++pixel) {
    const int64_t column = part.at + pixel * part.channels - part.first, end = part.first + part.channels;
    for (int64_t c = part.first, g = c / p.group_size(); c < end; ++g) {
      const int64_t n = std::min(end, (g + 1) * p.group_size()) - c;
      f(g, c, n, column + c);
      c += n;
    }
  }
}

}  // namespace diffkern

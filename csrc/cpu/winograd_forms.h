// Winograd's F(2 x 2, 3 x 3), F(4 x 4, 3 x 3) and F(6 x 6, 3 x 3) (Lavin & Gray 2016): what becomes of a line of
// pixels, of points or of a kernel. winograd.h has what is done with lines.
#pragma once

#include "vector.h"

#include <cstdint>

namespace diffkern {

// M x M pixels at a time, of a picture as it is or doubled. Multiplications of a channel, for those of the definition:
// 16 for 36, 36 for 144 and 64 for 324; doubled 9 for 36, 25 for 144 and 49 for 324.
// kInteger: the points are integers of 16 bits, see winograd_integers.h.
template <int M, bool kDoubled, bool kInteger = false>
struct Form {
  static constexpr bool kDouble = kDoubled, kIntegers = kInteger;
  static constexpr int kPixels = M;                                      // of a line of a tile
  static constexpr int kPatch = kDoubled ? M / 2 + 2 : M + 2;            // of a line that it is made from
  static constexpr int kPoints = kDoubled ? M + 1 : M + 2;               // on a line
  static constexpr int kStep = kDoubled ? M / 2 : M;                     // from patch to patch
  static constexpr int kArea = kPoints * kPoints;

  // Which line of points the i-th of the three is whose points are kept, in tiles of 2 x 2.
  static constexpr int line(int i) { return i == 2 ? kPoints - 1 : i; }
};

// f.operator()<Form>() with the form of tiles of `pixels` x `pixels`, 2, 4 or 6; of integers they are 4 x 4.
template <class F>
auto with_form(int64_t pixels, bool doubled, bool integers, F f) {
  const auto either = [&]<int M, bool kInteger = false>() {
    using Doubled = Form<M, true, kInteger>;
    return doubled ? f.template operator()<Doubled>() : f.template operator()<Form<M, false, kInteger>>();
  };
  if (integers) {
    return either.template operator()<4, true>();
  }
  switch (pixels) {
    case 2:
      return either.template operator()<2>();
    case 4:
      return either.template operator()<4>();
    default:
      return either.template operator()<6>();
  }
}

// Whether the nine numbers that are kept of a kernel are points, in float32, from which the others follow by additions.
// In larger tiles they would be twice as large as 16-bit weights: those are kept as they are, and to make their points
// takes 3 to 6 % of the time of a block of tiles.
constexpr bool keeps_points(int64_t pixels) { return pixels == 2; }

// A line of a patch to a line of points.
inline void enter(Form<2, false>, const Vector* x, int step, Vector* out, int to) {
  out[0] = x[0] - x[2 * step];
  out[to] = x[step] + x[2 * step];
  out[2 * to] = x[2 * step] - x[step];
  out[3 * to] = x[step] - x[3 * step];
}

inline void enter(Form<2, true>, const Vector* x, int step, Vector* out, int to) {
  out[0] = x[0] - x[step];
  out[to] = x[step];
  out[2 * to] = x[step] - x[2 * step];
}

inline void enter(Form<4, false>, const Vector* x, int step, Vector* out, int to) {
  const Vector a = x[0], b = x[step], c = x[2 * step], d = x[3 * step], e = x[4 * step], f = x[5 * step];
  const Vector even = e - 4 * c, odd = d - 4 * b, far = e - c, twice = 2 * (d - b);
  out[0] = 4 * a - 5 * c + e;
  out[to] = even + odd;
  out[2 * to] = even - odd;
  out[3 * to] = far + twice;
  out[4 * to] = far - twice;
  out[5 * to] = 4 * b - 5 * d + f;
}

// The above of a, b, b, c, c, d: the third point is zero, and the two after it are multiples of one difference.
inline void enter(Form<4, true>, const Vector* x, int step, Vector* out, int to) {
  const Vector a = x[0], b = x[step], c = x[2 * step], d = x[3 * step];
  out[0] = 4 * a - 5 * b + c;
  out[to] = 2 * c - 8 * b;
  out[2 * to] = 3 * (c - b);
  out[3 * to] = b - c;
  out[4 * to] = 4 * b - 5 * c + d;
}

// The points 0, 1, -1, 2, -2, 1/2, -1/2 and infinity.
inline void enter(Form<6, false>, const Vector* x, int step, Vector* out, int to) {
  const Vector a = x[0], b = x[step], c = x[2 * step], d = x[3 * step], e = x[4 * step], f = x[5 * step];
  const Vector g = x[6 * step], h = x[7 * step];
  const Vector even = c + g - 4.25f * e, odd = b + f - 4.25f * d;
  const Vector far = g + 0.25f * c - 1.25f * e, twice = 0.5f * b - 2.5f * d + 2 * f;
  const Vector near = g + 4 * c - 5 * e, half = 2 * b - 2.5f * d + 0.5f * f;
  out[0] = a - g + 5.25f * (e - c);
  out[to] = even + odd;
  out[2 * to] = even - odd;
  out[3 * to] = far + twice;
  out[4 * to] = far - twice;
  out[5 * to] = near + half;
  out[6 * to] = near - half;
  out[7 * to] = h - b + 5.25f * (d - f);
}

// The above of a, b, b, c, c, d, d, e.
inline void enter(Form<6, true>, const Vector* x, int step, Vector* out, int to) {
  const Vector a = x[0], b = x[step], c = x[2 * step], d = x[3 * step], e = x[4 * step];
  const Vector far = d + 0.25f * b - 1.25f * c, near = d + 4 * b - 5 * c;
  out[0] = a - d + 5.25f * (c - b);
  out[to] = 2 * (b + d) - 8.5f * c;
  out[2 * to] = 3 * far;
  out[3 * to] = -far;
  out[4 * to] = 1.5f * near;
  out[5 * to] = 0.5f * near;
  out[6 * to] = e - b + 5.25f * (c - d);
}

// A line of points to pixels.
inline void leave(Form<2, false>, const Vector* x, int step, Vector* out, int to) {
  out[0] = x[0] + x[step] + x[2 * step];
  out[to] = x[step] - x[2 * step] - x[3 * step];
}

inline void leave(Form<2, true>, const Vector* x, int step, Vector* out, int to) {
  out[0] = x[0] + x[step];
  out[to] = x[step] - x[2 * step];
}

inline void leave(Form<4, false>, const Vector* x, int step, Vector* out, int to) {
  const Vector even = x[step] + x[2 * step], odd = x[step] - x[2 * step];
  const Vector far = x[3 * step] + x[4 * step], twice = 2 * (x[3 * step] - x[4 * step]);
  out[0] = x[0] + even + far;
  out[to] = odd + twice;
  out[2 * to] = even + 4 * far;
  out[3 * to] = odd + 4 * twice + x[5 * step];
}

inline void leave(Form<4, true>, const Vector* x, int step, Vector* out, int to) {
  const Vector far = x[2 * step] + x[3 * step], twice = 2 * (x[2 * step] - x[3 * step]);
  out[0] = x[0] + x[step] + far;
  out[to] = x[step] + twice;
  out[2 * to] = x[step] + 4 * far;
  out[3 * to] = x[step] + 4 * twice + x[4 * step];
}

inline void leave(Form<6, false>, const Vector* x, int step, Vector* out, int to) {
  const Vector even = x[step] + x[2 * step], odd = x[step] - x[2 * step];
  const Vector far = x[3 * step] + x[4 * step], twice = x[3 * step] - x[4 * step];
  const Vector near = x[5 * step] + x[6 * step], half = x[5 * step] - x[6 * step];
  out[0] = x[0] + even + far + near;
  out[to] = odd + 2 * twice + 0.5f * half;
  out[2 * to] = even + 4 * far + 0.25f * near;
  out[3 * to] = odd + 8 * twice + 0.125f * half;
  out[4 * to] = even + 16 * far + 0.0625f * near;
  out[5 * to] = odd + 32 * twice + 0.03125f * half + x[7 * step];
}

inline void leave(Form<6, true>, const Vector* x, int step, Vector* out, int to) {
  const Vector far = x[2 * step] + x[3 * step], twice = x[2 * step] - x[3 * step];
  const Vector near = x[4 * step] + x[5 * step], half = x[4 * step] - x[5 * step];
  out[0] = x[0] + x[step] + far + near;
  out[to] = x[step] + 2 * twice + 0.5f * half;
  out[2 * to] = x[step] + 4 * far + 0.25f * near;
  out[3 * to] = x[step] + 8 * twice + 0.125f * half;
  out[4 * to] = x[step] + 16 * far + 0.0625f * near;
  out[5 * to] = x[step] + 32 * twice + 0.03125f * half + x[6 * step];
}

// Three numbers of a line of the kernel to its points, in the larger tiles. A product with a float32 near 1/6, 1/24,
// 2/9, 1/90 or 8/45 is exact where the quotient is.
inline void weigh(Form<4, false>, const Vector* x, int step, Vector* out, int to) {
  const Vector a = x[0], b = x[step], c = x[2 * step];
  out[0] = a * 0.25f;
  out[to] = (a + c + b) * (-1.0f / 6);
  out[2 * to] = (a + c - b) * (-1.0f / 6);
  out[3 * to] = (a + 4 * c + 2 * b) * (1.0f / 24);
  out[4 * to] = (a + 4 * c - 2 * b) * (1.0f / 24);
  out[5 * to] = c;
}

inline void weigh(Form<4, true>, const Vector* x, int step, Vector* out, int to) {
  const Vector a = x[0], b = x[step], c = x[2 * step];
  out[0] = a * 0.25f;
  out[to] = (a + c + b) * (-1.0f / 6);
  out[2 * to] = (a + 4 * c + 2 * b) * (1.0f / 24);
  out[3 * to] = (a + 4 * c - 2 * b) * (1.0f / 24);
  out[4 * to] = c;
}

inline void weigh(Form<6, false>, const Vector* x, int step, Vector* out, int to) {
  const Vector a = x[0], b = x[step], c = x[2 * step];
  const Vector even = a + c, far = a + 4 * c, near = 4 * a + c, twice = 2 * b;
  out[0] = a;
  out[to] = (even + b) * (-2.0f / 9);
  out[2 * to] = (even - b) * (-2.0f / 9);
  out[3 * to] = (far + twice) * (1.0f / 90);
  out[4 * to] = (far - twice) * (1.0f / 90);
  out[5 * to] = (near + twice) * (8.0f / 45);
  out[6 * to] = (near - twice) * (8.0f / 45);
  out[7 * to] = c;
}

inline void weigh(Form<6, true>, const Vector* x, int step, Vector* out, int to) {
  const Vector a = x[0], b = x[step], c = x[2 * step];
  const Vector far = a + 4 * c, near = 4 * a + c, twice = 2 * b;
  out[0] = a;
  out[to] = (a + c + b) * (-2.0f / 9);
  out[2 * to] = (far + twice) * (1.0f / 90);
  out[3 * to] = (far - twice) * (1.0f / 90);
  out[4 * to] = (near + twice) * (8.0f / 45);
  out[5 * to] = (near - twice) * (8.0f / 45);
  out[6 * to] = c;
}

}  // namespace diffkern

// The lines of Winograd's F(4 x 4, 3 x 3) with points in integers, see winograd_integers.h.
//
// How far what is rounded grows depends on the points of a line (Barabasz, Anderson, Soodhalter & Gregg 2020). These
// have the least error of the sets that were tried, 11 and doubled 18: half of that of 0, 1, -1, 2, -2, doubled 0.87.
#pragma once

#include "winograd_forms.h"

namespace diffkern {

template <bool kDoubled>
using Integers = Form<4, kDoubled, true>;

// Channels whose sum an integer holds. What a doubled picture's weights are rounded to must be finer.
constexpr int64_t chain(Integers<false>) { return 32; }
constexpr int64_t chain(Integers<true>) { return 16; }

// 0, 5/8, -5/8, 3/2, -3/2 and infinity.
constexpr float kNear = 5.0f / 8, kFar = 3.0f / 2, kNear2 = kNear * kNear, kFar2 = kFar * kFar;

inline void enter(Integers<false>, const Vector* x, int step, Vector* out, int to) {
  const Vector a = x[0], b = x[step], c = x[2 * step], d = x[3 * step], e = x[4 * step], f = x[5 * step];
  const Vector near = e - kFar2 * c, near_odd = kNear * (d - kFar2 * b);
  const Vector far = e - kNear2 * c, far_odd = kFar * (d - kNear2 * b);
  out[0] = kNear2 * kFar2 * a - (kNear2 + kFar2) * c + e;
  out[to] = near + near_odd;
  out[2 * to] = near - near_odd;
  out[3 * to] = far + far_odd;
  out[4 * to] = far - far_odd;
  out[5 * to] = kNear2 * kFar2 * b - (kNear2 + kFar2) * d + f;
}

// 0, 1, 7/4, -7/4 and infinity: with these a doubled picture has nothing at a sixth. The third and the fourth differ in
// a factor.
constexpr float kWide = 7.0f / 4, kWide2 = kWide * kWide;

inline void enter(Integers<true>, const Vector* x, int step, Vector* out, int to) {
  const Vector a = x[0], b = x[step], c = x[2 * step], d = x[3 * step];
  out[0] = kWide2 * a - (1 + kWide2) * b + c;
  out[to] = c - kWide2 * b;
  out[2 * to] = b - c;
  out[3 * to] = b - c;
  out[4 * to] = kWide2 * b - (1 + kWide2) * c + d;
}

inline void leave(Integers<false>, const Vector* x, int step, Vector* out, int to) {
  const Vector near = x[step] + x[2 * step], near_odd = kNear * (x[step] - x[2 * step]);
  const Vector far = x[3 * step] + x[4 * step], far_odd = kFar * (x[3 * step] - x[4 * step]);
  out[0] = x[0] + near + far;
  out[to] = near_odd + far_odd;
  out[2 * to] = kNear2 * near + kFar2 * far;
  out[3 * to] = kNear2 * near_odd + kFar2 * far_odd + x[5 * step];
}

inline void leave(Integers<true>, const Vector* x, int step, Vector* out, int to) {
  const Vector wide = x[2 * step] + x[3 * step], wide_odd = kWide * (x[2 * step] - x[3 * step]);
  out[0] = x[0] + x[step] + wide;
  out[to] = x[step] + wide_odd;
  out[2 * to] = x[step] + kWide2 * wide;
  out[3 * to] = x[step] + kWide2 * wide_odd + x[4 * step];
}

inline void weigh(Integers<false>, const Vector* x, int step, Vector* out, int to) {
  const Vector a = x[0], b = x[step], c = x[2 * step];
  const Vector near = a + kNear2 * c, near_odd = kNear * b, far = a + kFar2 * c, far_odd = kFar * b;
  out[0] = a;
  out[to] = near + near_odd;
  out[2 * to] = near - near_odd;
  out[3 * to] = far + far_odd;
  out[4 * to] = far - far_odd;
  out[5 * to] = c;
}

inline void weigh(Integers<true>, const Vector* x, int step, Vector* out, int to) {
  const Vector a = x[0], b = x[step], c = x[2 * step];
  const Vector wide = a + kWide2 * c, wide_odd = kWide * b;
  out[0] = a;
  out[to] = a + b + c;
  out[2 * to] = wide + wide_odd;
  out[3 * to] = wide - wide_odd;
  out[4 * to] = c;
}

// What the points of a line are multiplied by: not before they are counted, but with their unit. It is 1 over the
// product of a point's distances to the others, but for what a doubled line's pixels are multiplied by.
template <bool kDoubled>
constexpr float factor(int i) {
  constexpr float near = 1 / (2 * kNear2 * (kNear2 - kFar2)), far = 1 / (2 * kFar2 * (kFar2 - kNear2));
  constexpr float whole[] = {1 / (kNear2 * kFar2), near, near, far, far, 1};
  constexpr float doubled[] = {1 / kWide2, -16.0f / 33, -32.0f / 147, 32.0f / 539, 1};
  return kDoubled ? doubled[i] : whole[i];
}

}  // namespace diffkern

// The steps of the colour jitter, and gray, on L pixels that are in three registers.
#pragma once

#include <math.h>

#include "augment.h"
#include "augment_vector.h"

namespace simclr::SIMCLR_ISA {
namespace {

// HSV hue by turns without leaving RGB: channel = max - chroma·clamp(min(k, 4 - k), 0, 1) with
// k = (n + 6h) mod 6, n = 5, 3, 1 for red, green, blue.
inline V wrap6(V x) { return x >= 6.0f ? x - 6.0f : x; }
inline V hue_channel(V h, float n, V top, V chroma) {
  const V k = wrap6(h + n);
  return top - chroma * clip(min(k, 4.0f - k));
}
inline void rotate_hue(float sixths, V& r, V& g, V& b) {
  const V top = max(r, max(g, b)), bottom = min(r, min(g, b)), chroma = top - bottom;
  const V inverse = chroma > 0.0f ? 1.0f / chroma : V{};
  V h = top == r ? (g - b) * inverse
                 : (top == g ? 2.0f + (b - r) * inverse : 4.0f + (r - g) * inverse);
  h = h < 0.0f ? h + 6.0f : h;
  h = wrap6(h + sixths);
  r = hue_channel(h, 5, top, chroma);
  g = hue_channel(h, 3, top, chroma);
  b = hue_channel(h, 1, top, chroma);
}
// Multiplying HSV S by f moves every channel towards V: x' = V - (V - x)·min(f, V / chroma).
inline void scale_chroma(float f, V& r, V& g, V& b) {
  const V top = max(r, max(g, b)), chroma = top - min(r, min(g, b));
  const V most = chroma > 0.0f ? top / chroma : V{};
  const V factor = max(min(V{} + f, most), V{});
  r = clip(top - (top - r) * factor);
  g = clip(top - (top - g) * factor);
  b = clip(top - (top - b) * factor);
}

inline void run_steps(const ColorStep* step, const ColorStep* end, V& r, V& g, V& b) {
  for (; step != end; ++step) {
    const float f = step->factor;
    switch (step->kind) {
      case Step::affine:
        r = clip(r * f + step->offset[0]);
        g = clip(g * f + step->offset[1]);
        b = clip(b * f + step->offset[2]);
        break;
      case Step::blend: {
        const V rest = luma(r, g, b) * (1.0f - f);
        r = clip(r * f + rest);
        g = clip(g * f + rest);
        b = clip(b * f + rest);
        break;
      }
      case Step::chroma:
        scale_chroma(f, r, g, b);
        break;
      case Step::hue:
        rotate_hue(6.0f * (f - floorf(f)), r, g, b);
        r = clip(r);
        g = clip(g);
        b = clip(b);
        break;
      case Step::gray:
        r = g = b = luma(r, g, b);
        break;
    }
  }
}

}  // namespace
}  // namespace simclr::SIMCLR_ISA

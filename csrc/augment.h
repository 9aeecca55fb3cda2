// One view of one image: crop and resize, flip, colour jitter, gray, blur, normalise, cast, layout.
#pragma once

#include <cstdint>

#include "isa.h"

namespace simclr {

enum class Pixel : int32_t { uint8, float32 };
enum class Element : int32_t { float32, float16, bfloat16 };
// affine:  x·factor + offset[channel], clipped. Brightness (both versions) and contrast.
// blend:   x·factor + luma·(1 - factor), clipped: torchvision's saturation.
// chroma:  HSV S·factor, clipped: TensorFlow's saturation.
// hue:     HSV H + factor turns.
enum class Step : int32_t { affine, blend, chroma, hue, gray };

struct ColorStep {
  Step kind;
  float factor;
  float offset[3];
};

// What all views of a call share.
struct AugmentSpec {
  int64_t size;        // output height and width
  bool antialias;      // the filter widens with the scale; otherwise always 4 (2) taps
  bool bilinear;       // triangle filter; otherwise Keys' cubic with a = -0.5
  bool clip_resized;   // clip right after the resize, as an 8-bit pipeline does
  bool luma_contrast;  // contrast around the mean luma; otherwise each channel around its own mean
  bool reflect;        // blur pads by reflection; otherwise with zeros
  bool channels_last;
  int32_t blur_radius;  // of the untruncated kernel
  Pixel pixel;
  Element element;
  float scale[3], shift[3];  // out = x·scale + shift with x in [0, 1]
};

struct AugmentView {
  const void* pixels;     // [h, w, 3], the box's first pixel
  int64_t row_stride;     // in elements
  int64_t height, width;  // of the box
  bool flip;
  int32_t steps;
  int32_t contrast;  // index of the contrast step, or `steps`; augment_view fills in its offset
  ColorStep step[5];
  float sigma;  // 0: no blur
  void* out;    // [3, size, size], or [size, size, 3] when channels_last
};

}  // namespace simclr

// Floats of scratch memory, 64-byte aligned, that augment_view needs for a box of this size.
SIMCLR_DECLARE_ISAS(int64_t, augment_scratch,
                    (const ::simclr::AugmentSpec&, int64_t height, int64_t width))
SIMCLR_DECLARE_ISAS(void, augment_view,
                    (const ::simclr::AugmentSpec&, ::simclr::AugmentView&, float* scratch))

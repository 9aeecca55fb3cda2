// One view of one image, in two passes over its pixels. A vector register holds L floats.
//
// Pass A makes L output rows at a time:
//   1. resize vertically; a vector holds L neighbours of a source row
//   2. transpose L×L blocks in registers; now a vector holds one column of the L output rows
//   3. resize horizontally, which needs no gathers this way, and run the colour steps before
//      contrast while the pixels are still in registers
//   4. add up the pixels, whose mean contrast needs; transpose back
// Pass B goes row by row: contrast and the later steps, blur, normalise, cast.
// Memory traffic: the box once, the float planes [3, S, S] once each way (they fit the L2 cache),
// the output once.
#include <math.h>
#include <string.h>

#include "augment.h"
#include "augment_color.h"

namespace simclr::SIMCLR_ISA {
namespace {

// ---- resize weights
struct Taps {
  int64_t width;  // weights per output
  int64_t* start;
  int64_t* count;
  float* weight;  // [size, width]
};

double filter(double x, bool bilinear) {
  x = x < 0 ? -x : x;
  if (bilinear) return x < 1 ? 1 - x : 0;
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

int64_t taps_width(const AugmentSpec& spec, int64_t in) {
  double stretch = spec.antialias && in > spec.size ? double(in) / double(spec.size) : 1;
  return int64_t(ceil((spec.bilinear ? 1 : 2) * stretch)) * 2 + 1;
}

// Samples outside [0, in) get no weight and the others are renormalised, as in Pillow, in torch's
// antialiased resize and in TensorFlow's half-pixel bicubic.
void fill_taps(const AugmentSpec& spec, int64_t in, double gain, Taps& taps) {
  const double scale = double(in) / double(spec.size);
  const double stretch = spec.antialias && scale > 1 ? scale : 1;
  const double support = (spec.bilinear ? 1 : 2) * stretch;
  for (int64_t i = 0; i < spec.size; ++i) {
    const double center = (double(i) + 0.5) * scale;
    int64_t first = int64_t(center - support + 0.5), last = int64_t(center + support + 0.5);
    first = center - support + 0.5 < 0 ? 0 : first;
    last = last > in ? in : last;
    float* weight = taps.weight + i * taps.width;
    double sum = 0;
    for (int64_t j = first; j < last; ++j) {
      const double w = filter((double(j) + 0.5 - center) / stretch, spec.bilinear);
      weight[j - first] = float(w);
      sum += w;
    }
    int64_t skip = 0;
    while (last - first > 1 && weight[last - first - 1] == 0) --last;
    while (skip < last - first - 1 && weight[skip] == 0) ++skip;
    taps.start[i] = first + skip;
    taps.count[i] = last - first - skip;
    for (int64_t k = 0; k < taps.count[i]; ++k)
      weight[k] = float(double(weight[k + skip]) * (gain / sum));
  }
}

// ---- output
constexpr int kMaxBlur = 64;  // padding of the row buffer; the truncated radius stays within it

struct Row {
  float* channel[3];
};

template <typename T, typename Store>
void write_row(const AugmentSpec& spec, const Row& row, T* out, int64_t y, T* staging, Store put) {
  const int64_t size = spec.size, padded = round_up(size);
  const bool direct = !spec.channels_last && size % L == 0;
  for (int c = 0; c < 3; ++c) {
    T* target = direct ? out + (c * size + y) * size : staging + c * padded;
    for (int64_t x = 0; x < size; x += L)
      put(target + x, load(row.channel[c] + x) * spec.scale[c] + spec.shift[c]);
    if (!direct && !spec.channels_last)
      memcpy(out + (c * size + y) * size, target, size_t(size) * sizeof(T));
  }
  if (!spec.channels_last) return;
  T* pixel = out + y * size * 3;
  const T *r = staging, *g = staging + padded, *b = staging + 2 * padded;
  for (int64_t x = 0; x < size; ++x) {
    pixel[3 * x] = r[x];
    pixel[3 * x + 1] = g[x];
    pixel[3 * x + 2] = b[x];
  }
}

void emit(const AugmentSpec& spec, const Row& row, void* out, int64_t y, float* staging) {
  auto* staging16 = reinterpret_cast<uint16_t*>(staging);
  switch (spec.element) {
    case Element::float32:
      return write_row(spec, row, static_cast<float*>(out), y, staging, store);
    case Element::float16:
      return write_row(spec, row, static_cast<uint16_t*>(out), y, staging16, store_float16);
    case Element::bfloat16:
      return write_row(spec, row, static_cast<uint16_t*>(out), y, staging16, store_bfloat16);
  }
}

// ---- scratch memory, carved in this order
struct Scratch {
  float* planes;      // [3, S, round_up(S)]
  float* transposed;  // [3·width, L] one group of rows after the vertical pass
  float* source;      // [rows of a group, L] source pixels of one column block as floats
  float* line;        // [kMaxBlur + round_up(S) + kMaxBlur + L] one channel's row, padded
  float* staging;     // [3, round_up(S)] output rows before interleaving
  float* blurred;     // [3, round_up(S)]
  Taps x, y;
  int64_t floats;
};

float* take(float*& cursor, int64_t floats) {
  float* start = cursor;
  cursor += round_up(floats);
  return start;
}

Taps carve_taps(const AugmentSpec& spec, int64_t in, float*& cursor) {
  Taps taps;
  taps.width = taps_width(spec, in);
  taps.start = reinterpret_cast<int64_t*>(take(cursor, 2 * spec.size));
  taps.count = reinterpret_cast<int64_t*>(take(cursor, 2 * spec.size));
  taps.weight = take(cursor, spec.size * taps.width);
  return taps;
}

Scratch carve(const AugmentSpec& spec, int64_t height, int64_t width, float* memory) {
  Scratch s;
  float* cursor = memory;
  const int64_t size = spec.size, padded = round_up(size);
  s.planes = take(cursor, 3 * size * padded);
  s.transposed = take(cursor, (3 * width + L) * L);
  s.source = take(cursor, height * L);
  s.line = take(cursor, padded + 2 * kMaxBlur + L);
  s.staging = take(cursor, 3 * padded);
  s.blurred = take(cursor, 3 * padded);
  s.x = carve_taps(spec, width, cursor);
  s.y = carve_taps(spec, height, cursor);
  s.floats = cursor - memory;
  return s;
}

// ---- pass A
template <typename P>
void resize_group_vertically(const AugmentView& view, const Scratch& s, const int64_t* rows) {
  const int64_t columns = 3 * view.width;
  int64_t first = s.y.start[rows[0]], last = first;
  for (int i = 0; i < L; ++i) {
    const int64_t start = s.y.start[rows[i]], end = start + s.y.count[rows[i]];
    first = start < first ? start : first;
    last = end > last ? end : last;
  }
  for (int64_t column = 0; column < columns; column += L) {
    const P* pixels = static_cast<const P*>(view.pixels) + first * view.row_stride + column;
    if (columns - column >= L) {
      for (int64_t j = 0; j < last - first; ++j)
        store(s.source + j * L, load_pixels(pixels + j * view.row_stride));
    } else {
      for (int64_t j = 0; j < last - first; ++j) {
        P tail[L] = {};
        memcpy(tail, pixels + j * view.row_stride, size_t(columns - column) * sizeof(P));
        store(s.source + j * L, load_pixels(tail));
      }
    }
    V block[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      const float* weight = s.y.weight + rows[i] * s.y.width;
      const float* source = s.source + (s.y.start[rows[i]] - first) * L;
      V sum = {};
      for (int64_t k = 0; k < s.y.count[rows[i]]; ++k) sum += load(source + k * L) * weight[k];
      block[i] = sum;
    }
    transpose(block);
    for (int i = 0; i < L; ++i) store(s.transposed + (column + i) * L, block[i]);
  }
}

// Resizes and runs the steps before contrast. sums[c]: the sum of channel c before contrast.
template <typename P>
void pass_a(const AugmentSpec& spec, const AugmentView& view, const Scratch& s, double* sums) {
  const int64_t size = spec.size, padded = round_up(size);
  const ColorStep* contrast = view.step + view.contrast;
  for (int64_t y = 0; y < size; y += L) {
    int64_t rows[L];
    V inside;
    for (int i = 0; i < L; ++i) {
      rows[i] = y + i < size ? y + i : size - 1;
      inside[i] = y + i < size ? 1.0f : 0.0f;
    }
    resize_group_vertically<P>(view, s, rows);
    V sum[3] = {};
    for (int64_t x0 = 0; x0 < size; x0 += L) {
      V block[3][L];
      for (int i = 0; i < L; ++i) {
        const int64_t column = x0 + i < size ? x0 + i : size - 1;
        const int64_t x = view.flip ? size - 1 - column : column;
        const float* weight = s.x.weight + x * s.x.width;
        const float* source = s.transposed + 3 * s.x.start[x] * L;
        V r = {}, g = {}, b = {};
        for (int64_t k = 0; k < s.x.count[x]; ++k) {
          r += load(source + (3 * k) * L) * weight[k];
          g += load(source + (3 * k + 1) * L) * weight[k];
          b += load(source + (3 * k + 2) * L) * weight[k];
        }
        if (spec.clip_resized) {
          r = clip(r);
          g = clip(g);
          b = clip(b);
        }
        run_steps(view.step, contrast, r, g, b);
        if (x0 + i < size) {
          sum[0] += r;
          sum[1] += g;
          sum[2] += b;
        }
        block[0][i] = r;
        block[1][i] = g;
        block[2][i] = b;
      }
      for (int c = 0; c < 3; ++c) {
        transpose(block[c]);
        for (int i = 0; i < L && y + i < size; ++i)
          store(s.planes + (c * size + y + i) * padded + x0, block[c][i]);
      }
    }
    for (int c = 0; c < 3; ++c) {
      const V masked = sum[c] * inside;
      for (int i = 0; i < L; ++i) sums[c] += double(masked[i]);
    }
  }
}

void fill_contrast_offset(const AugmentSpec& spec, const double* sums, ColorStep& step) {
  const double pixels = double(spec.size) * double(spec.size);
  const double luma_sum = 0.2989 * sums[0] + 0.587 * sums[1] + 0.114 * sums[2];
  for (int c = 0; c < 3; ++c) {
    const double mean = (spec.luma_contrast ? luma_sum : sums[c]) / pixels;
    step.offset[c] = float(mean * (1.0 - double(step.factor)));
  }
}

// ---- pass B
// The Gaussian's tails beyond 4σ weigh 6e-5 in total, which is at most 0.016 / 255 in a pixel.
int blur_weights(const AugmentSpec& spec, float sigma, float* weight) {
  if (!(sigma > 0)) return 0;
  int radius = int(ceil(4.0 * double(sigma)));
  radius = radius < spec.blur_radius ? radius : spec.blur_radius;
  radius = radius < kMaxBlur ? radius : kMaxBlur;
  double sum = 0;
  for (int k = -radius; k <= radius; ++k) sum += exp(-0.5 * k * k / (double(sigma) * sigma));
  for (int k = 0; k <= radius; ++k)
    weight[k] = float(exp(-0.5 * k * k / (double(sigma) * sigma)) / sum);
  return radius;
}

Row plane_row(const AugmentSpec& spec, const Scratch& s, int64_t y) {
  const int64_t padded = round_up(spec.size);
  Row row;
  for (int c = 0; c < 3; ++c) row.channel[c] = s.planes + (c * spec.size + y) * padded;
  return row;
}

void color_row(const AugmentSpec& spec, const AugmentView& view, const Row& row) {
  for (int64_t x = 0; x < spec.size; x += L) {
    V r = load(row.channel[0] + x), g = load(row.channel[1] + x), b = load(row.channel[2] + x);
    run_steps(view.step + view.contrast, view.step + view.steps, r, g, b);
    store(row.channel[0] + x, clip(r));
    store(row.channel[1] + x, clip(g));
    store(row.channel[2] + x, clip(b));
  }
}

void blur_row(const AugmentSpec& spec, const float* weight, int radius, float* channel,
              float* line) {
  float* center = line + kMaxBlur;
  memcpy(center, channel, size_t(spec.size) * sizeof(float));
  for (int k = 1; k <= radius; ++k) {
    center[-k] = spec.reflect ? center[k] : 0.0f;
    center[spec.size - 1 + k] = spec.reflect ? center[spec.size - 1 - k] : 0.0f;
  }
  for (int64_t x = 0; x < spec.size; x += L) {
    V sum = load(center + x) * weight[0];
    for (int k = 1; k <= radius; ++k)
      sum += (load(center + x - k) + load(center + x + k)) * weight[k];
    store(channel + x, sum);
  }
}

// Row y of the plane; beyond the border its reflection, or null where the padding is zero.
const float* blur_neighbour(const AugmentSpec& spec, const float* plane, int64_t y) {
  if (y < 0 || y >= spec.size) {
    if (!spec.reflect) return nullptr;
    y = y < 0 ? -y : 2 * (spec.size - 1) - y;
  }
  return plane + y * round_up(spec.size);
}

void blur_column(const AugmentSpec& spec, const Scratch& s, const float* weight, int radius,
                 int64_t y, const Row& out) {
  for (int c = 0; c < 3; ++c) {
    const float* plane = s.planes + c * spec.size * round_up(spec.size);
    const float* rows[2 * kMaxBlur + 1];
    float weights[2 * kMaxBlur + 1];
    int count = 0;
    for (int k = -radius; k <= radius; ++k) {
      const float* row = blur_neighbour(spec, plane, y + k);
      if (row) {
        rows[count] = row;
        weights[count++] = weight[k < 0 ? -k : k];
      }
    }
    for (int64_t x = 0; x < spec.size; x += L) {
      V sum = {};
      for (int k = 0; k < count; ++k) sum += load(rows[k] + x) * weights[k];
      store(out.channel[c] + x, clip(sum));
    }
  }
}

void pass_b(const AugmentSpec& spec, const AugmentView& view, const Scratch& s) {
  float weight[kMaxBlur + 1];
  const int radius = blur_weights(spec, view.sigma, weight);
  const int64_t size = spec.size;
  if (radius == 0) {
    for (int64_t y = 0; y < size; ++y) {
      const Row row = plane_row(spec, s, y);
      color_row(spec, view, row);
      emit(spec, row, view.out, y, s.staging);
    }
    return;
  }
  Row blurred;
  for (int c = 0; c < 3; ++c) blurred.channel[c] = s.blurred + c * round_up(size);
  for (int64_t y = 0; y < size + radius; ++y) {
    if (y < size) {
      const Row row = plane_row(spec, s, y);
      color_row(spec, view, row);
      for (float* channel : row.channel) blur_row(spec, weight, radius, channel, s.line);
    }
    if (y < radius) continue;
    blur_column(spec, s, weight, radius, y - radius, blurred);
    emit(spec, blurred, view.out, y - radius, s.staging);
  }
}

}  // namespace

int64_t augment_scratch(const AugmentSpec& spec, int64_t height, int64_t width) {
  return carve(spec, height, width, nullptr).floats;
}

void augment_view(const AugmentSpec& spec, AugmentView& view, float* memory) {
  Scratch s = carve(spec, view.height, view.width, memory);
  fill_taps(spec, view.width, 1.0, s.x);
  fill_taps(spec, view.height, spec.pixel == Pixel::uint8 ? 1.0 / 255 : 1.0, s.y);
  double sums[3] = {};
  if (spec.pixel == Pixel::uint8)
    pass_a<uint8_t>(spec, view, s, sums);
  else
    pass_a<float>(spec, view, s, sums);
  if (view.contrast < view.steps) fill_contrast_offset(spec, sums, view.step[view.contrast]);
  pass_b(spec, view, s);
}

}  // namespace simclr::SIMCLR_ISA

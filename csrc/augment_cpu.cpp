// Schema and CPU implementation of simclr_fast::augment_views; the arithmetic is in
// augment_kernel.cpp, the meaning of every argument in simclr_fast/augment/params.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "augment.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Image {
  const char* pixels;
  int64_t height, width, row_stride;
};

Image image_of(const Tensor& image, int64_t first_dim) {
  STD_TORCH_CHECK(image.size(first_dim + 2) == 3 && image.stride(first_dim + 2) == 1 &&
                      image.stride(first_dim + 1) == 3,
                  "images must be [H, W, 3] with contiguous rows");
  return {static_cast<const char*>(image.const_data_ptr()), image.size(first_dim),
          image.size(first_dim + 1), image.stride(first_dim)};
}

// One tensor per image, or one [n, H, W, 3] tensor.
std::vector<Image> images_of(const std::vector<Tensor>& tensors, int64_t n) {
  std::vector<Image> images;
  images.reserve(n);
  if (tensors.size() == 1 && tensors[0].dim() == 4) {
    const Image first = image_of(tensors[0], 1);
    const int64_t step = tensors[0].stride(0) * int64_t(tensors[0].element_size());
    STD_TORCH_CHECK(tensors[0].size(0) == n, "images and parameters differ in number");
    for (int64_t i = 0; i < n; ++i)
      images.push_back({first.pixels + i * step, first.height, first.width, first.row_stride});
    return images;
  }
  STD_TORCH_CHECK(int64_t(tensors.size()) == n, "images and parameters differ in number");
  for (const Tensor& tensor : tensors) {
    STD_TORCH_CHECK(tensor.dim() == 3, "images must be [H, W, 3]");
    STD_TORCH_CHECK(tensor.scalar_type() == tensors[0].scalar_type(), "images differ in dtype");
    images.push_back(image_of(tensor, 0));
  }
  return images;
}

simclr::Element element_of(const Tensor& out) {
  switch (out.scalar_type()) {
    case ScalarType::Float:
      return simclr::Element::float32;
    case ScalarType::Half:
      return simclr::Element::float16;
    case ScalarType::BFloat16:
      return simclr::Element::bfloat16;
    default:
      STD_TORCH_CHECK(false, "out must be float32, float16 or bfloat16");
  }
}

float* scratch_memory(int64_t floats) {
  thread_local std::vector<float> memory;
  if (int64_t(memory.size()) < floats + 16) memory.resize(floats + 16);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

template <typename T>
const T* checked(const Tensor& parameter, int64_t n, int64_t columns, ScalarType type) {
  STD_TORCH_CHECK(parameter.scalar_type() == type && parameter.is_contiguous() &&
                      parameter.numel() == n * columns,
                  "a parameter has the wrong dtype, layout or number of elements");
  return static_cast<const T*>(parameter.const_data_ptr());
}

// params: box [n, 4] int32; switches [n, 3] uint8 (flip, jitter, gray); order [n, 4] uint8;
// factors [n, 4] and sigma [n] float32. normalize: scale of R, G, B, then shift of R, G, B.
void augment_views(std::vector<Tensor> tensors, Tensor box, Tensor switches, Tensor order,
                   Tensor factors, Tensor sigma, std::vector<double> normalize, bool simclr_spec,
                   bool additive_brightness, bool bilinear, int64_t blur_radius, Tensor out) {
  const int64_t n = out.size(0), size = out.size(2);
  if (n == 0) return;
  const std::vector<Image> images = images_of(tensors, n);
  const bool floats = tensors[0].scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(floats || tensors[0].scalar_type() == ScalarType::Byte,
                  "images must be uint8 or float32");
  STD_TORCH_CHECK(out.dim() == 4 && out.size(1) == 3 && out.size(3) == size && size > 0,
                  "out must be [n, 3, size, size]");
  const bool channels_last = out.stride(1) == 1 && out.stride(3) == 3 && out.stride(2) == 3 * size;
  const bool planar = out.stride(3) == 1 && out.stride(2) == size && out.stride(1) == size * size;
  STD_TORCH_CHECK(channels_last || planar, "out must be contiguous or channels_last");
  STD_TORCH_CHECK(normalize.size() == 6, "normalize must hold 6 numbers");

  simclr::AugmentSpec spec{};
  spec.size = size;
  spec.antialias = spec.clip_resized = spec.luma_contrast = spec.reflect = !simclr_spec;
  spec.bilinear = bilinear;
  spec.channels_last = channels_last && !planar;
  spec.blur_radius = int32_t(blur_radius);
  spec.pixel = floats ? simclr::Pixel::float32 : simclr::Pixel::uint8;
  spec.element = element_of(out);
  for (int c = 0; c < 3; ++c) {
    spec.scale[c] = float(normalize[c]);
    spec.shift[c] = float(normalize[3 + c]);
  }

  const auto* boxes = checked<int32_t>(box, n, 4, ScalarType::Int);
  const auto* flags = checked<uint8_t>(switches, n, 3, ScalarType::Byte);
  const auto* orders = checked<uint8_t>(order, n, 4, ScalarType::Byte);
  const auto* factor = checked<float>(factors, n, 4, ScalarType::Float);
  const auto* sigmas = checked<float>(sigma, n, 1, ScalarType::Float);
  const int64_t pixel_bytes = floats ? 4 : 1;
  const int64_t view_bytes = out.stride(0) * int64_t(out.element_size());
  auto* target = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < n; ++i) {
    const int32_t* b = boxes + 4 * i;
    STD_TORCH_CHECK(b[0] >= 0 && b[1] >= 0 && b[2] > 0 && b[3] > 0 &&
                        int64_t(b[0]) + b[2] <= images[i].height &&
                        int64_t(b[1]) + b[3] <= images[i].width,
                    "a box leaves its image");
  }

  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int32_t* b = boxes + 4 * i;
      simclr::AugmentView view{};
      view.row_stride = images[i].row_stride;
      view.pixels = images[i].pixels + (b[0] * view.row_stride + b[1] * int64_t{3}) * pixel_bytes;
      view.height = b[2];
      view.width = b[3];
      view.flip = flags[3 * i] != 0;
      view.sigma = sigmas[i];
      view.out = target + i * view_bytes;
      view.contrast = -1;
      for (int j = 0; j < 4 && flags[3 * i + 1]; ++j) {
        const int op = orders[4 * i + j];
        const float f = factor[4 * i + op % 4];
        simclr::ColorStep& step = view.step[view.steps++];
        step = {simclr::Step::affine, f, {0, 0, 0}};
        if (op == 0 && additive_brightness) step = {simclr::Step::affine, 1, {f, f, f}};
        if (op == 1) view.contrast = view.steps - 1;
        if (op == 2) step.kind = simclr_spec ? simclr::Step::chroma : simclr::Step::blend;
        if (op == 3) step.kind = simclr::Step::hue;
      }
      if (flags[3 * i + 2]) view.step[view.steps++] = {simclr::Step::gray, 0, {0, 0, 0}};
      if (view.contrast < 0) view.contrast = view.steps;
      const int64_t floats_needed = SIMCLR_DISPATCH(augment_scratch)(spec, b[2], b[3]);
      SIMCLR_DISPATCH(augment_view)(spec, view, scratch_memory(floats_needed));
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(simclr_fast, m) {
  m.def(
      "augment_views(Tensor[] images, Tensor box, Tensor switches, Tensor order, Tensor factors, "
      "Tensor sigma, float[] normalize, bool simclr_spec, bool additive_brightness, bool bilinear, "
      "int blur_radius, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(simclr_fast, CPU, m) {
  m.impl("augment_views", TORCH_BOX(&augment_views));
}

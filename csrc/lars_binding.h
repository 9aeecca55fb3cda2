// For the CPU and the CUDA binding of simclr_fast::lars_: turns argument lists into raw pointers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "lars.h"

namespace simclr {

using torch::stable::Tensor;

class LarsArguments {
 public:
  std::vector<LarsGroup> groups;
  std::vector<LarsTensor> tensors;  // none of them empty

  // hyper holds, per group, the six doubles of LarsGroup in their order.
  LarsArguments(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                const std::vector<Tensor>& buffers, const std::vector<int64_t>& group_sizes,
                const std::vector<int64_t>& flags, const std::vector<double>& hyper) {
    STD_TORCH_CHECK(params.size() == grads.size() && group_sizes.size() == flags.size() &&
                        hyper.size() == 6 * flags.size(),
                    "lars_: lists of unequal length");
    tensors.reserve(params.size());
    size_t next = 0, next_buffer = 0;
    for (size_t i = 0; i < flags.size(); ++i) {
      const double* h = &hyper[6 * i];
      groups.push_back({h[0], h[1], h[2], h[3], h[4], h[5], static_cast<int32_t>(flags[i])});
      for (int64_t j = 0; j < group_sizes[i]; ++j, ++next) {
        STD_TORCH_CHECK(next < params.size(), "lars_: group_sizes exceed the parameters");
        const Tensor* v = nullptr;
        if (h[1] != 0.0) {
          STD_TORCH_CHECK(next_buffer < buffers.size(), "lars_: too few momentum buffers");
          v = &buffers[next_buffer++];
        }
        add(params[next], grads[next], v, static_cast<int32_t>(i));
      }
    }
    STD_TORCH_CHECK(next == params.size() && next_buffer == buffers.size(),
                    "lars_: group_sizes do not cover the parameters and buffers");
  }

  // Copies back what was updated in a contiguous copy because its strides allowed nothing else.
  void finish() {
    for (auto& [original, copy] : copies_) torch::stable::copy_(original, copy);
  }

 private:
  std::vector<std::pair<Tensor, Tensor>> copies_;
  std::vector<Tensor> kept_;

  // Straight from the C interface: stable::Tensor's accessors translate every enumeration, which
  // for hundreds of tensors would take longer than the rest of the call.
  template <typename T>
  static T ask(AOTITorchError (*getter)(AtenTensorHandle, T*), const Tensor& t) {
    T value{};
    STABLE_TORCH_ERROR_CODE_CHECK(getter(t.get(), &value));
    return value;
  }

  static LarsType type_of(int32_t dtype) {
    static const int32_t f32 = aoti_torch_dtype_float32(), f64 = aoti_torch_dtype_float64(),
                         f16 = aoti_torch_dtype_float16(), bf16 = aoti_torch_dtype_bfloat16();
    STD_TORCH_CHECK(dtype == f32 || dtype == f64 || dtype == f16 || dtype == bf16,
                    "the fused LARS takes float16, bfloat16, float32 and float64 parameters; "
                    "fused=False takes others");
    return dtype == f32   ? LarsType::f32
           : dtype == f64 ? LarsType::f64
           : dtype == f16 ? LarsType::f16
                          : LarsType::bf16;
  }

  static bool same_strides(const Tensor& a, const Tensor& b) {
    const auto sizes = a.sizes(), x = a.strides(), y = b.strides();
    for (size_t i = 0; i < sizes.size(); ++i)
      if (sizes[i] > 1 && x[i] != y[i]) return false;
    return true;
  }

  // Whether the elements fill one block of memory, in whatever order of dimensions.
  static bool is_dense(const Tensor& t) {
    const auto sizes = t.sizes(), strides = t.strides();
    std::vector<std::pair<int64_t, int64_t>> order;
    for (size_t i = 0; i < sizes.size(); ++i)
      if (sizes[i] > 1) order.emplace_back(strides[i], sizes[i]);
    std::sort(order.begin(), order.end());
    int64_t expected = 1;
    for (const auto& [stride, size] : order) {
      if (stride != expected) return false;
      expected *= size;
    }
    return true;
  }

  static bool same_sizes(const Tensor& a, const Tensor& b) {
    const auto x = a.sizes(), y = b.sizes();
    return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
  }

  void* writable(const Tensor& t) {
    if (t.is_contiguous()) return t.data_ptr();
    copies_.emplace_back(t, torch::stable::contiguous(t));
    return copies_.back().second.data_ptr();
  }

  const void* readable(const Tensor& t) {
    if (t.is_contiguous()) return t.data_ptr();
    kept_.push_back(torch::stable::contiguous(t));
    return kept_.back().data_ptr();
  }

  void add(const Tensor& p, const Tensor& g, const Tensor* v, int32_t group) {
    static const int32_t strided = aoti_torch_layout_strided();
    STD_TORCH_CHECK(ask(aoti_torch_get_layout, g) == strided,
                    "LARS needs strided gradients, got a sparse one");
    const int32_t dtype = ask(aoti_torch_get_dtype, p);
    STD_TORCH_CHECK(
        ask(aoti_torch_get_dtype, g) == dtype && (!v || ask(aoti_torch_get_dtype, *v) == dtype),
        "the fused LARS takes gradients and momentum buffers of their parameter's "
        "dtype; fused=False takes others");
    const LarsType type = type_of(dtype);
    const int64_t n = p.numel();
    const bool contiguous = p.is_contiguous() && g.is_contiguous() && (!v || v->is_contiguous());
    STD_TORCH_CHECK(contiguous ? n == g.numel() && (!v || n == v->numel())
                               : same_sizes(p, g) && (!v || same_sizes(p, *v)),
                    "lars_: a gradient or momentum buffer differs in shape from its parameter");
    if (n == 0) return;
    if (contiguous || (same_strides(p, g) && (!v || same_strides(p, *v)) && is_dense(p)))
      tensors.push_back({p.data_ptr(), g.data_ptr(), v ? v->data_ptr() : nullptr, n, type, group});
    else
      tensors.push_back({writable(p), readable(g), v ? writable(*v) : nullptr, n, type, group});
  }
};

}  // namespace simclr

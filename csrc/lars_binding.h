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
#include "torch_check.h"

namespace simclr {

using torch::stable::Tensor;

// The tensors of a list argument, without an allocation for each as in std::vector<Tensor>: for
// hundreds of small tensors that is much of the call.
class TensorList {
 public:
  explicit TensorList(StableIValue argument) {
    const auto list = torch::stable::detail::to<StableListHandle>(argument);
    size_t size = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    handles_.resize(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue item;
      STABLE_TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
      handles_[i] = torch::stable::detail::to<AtenTensorHandle>(item);
    }
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  }
  ~TensorList() {
    for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
  }
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  bool empty() const { return handles_.empty(); }
  size_t size() const { return handles_.size(); }
  AtenTensorHandle operator[](size_t i) const { return handles_[i]; }
  auto begin() const { return handles_.begin(); }
  auto end() const { return handles_.end(); }

 private:
  std::vector<AtenTensorHandle> handles_;
};

// A getter of torch's C interface, called for a borrowed handle.
template <typename T>
T ask(AOTITorchError (*getter)(AtenTensorHandle, T*), AtenTensorHandle t) {
  T value{};
  STABLE_TORCH_ERROR_CODE_CHECK(getter(t, &value));
  return value;
}

inline Tensor owned(AtenTensorHandle t) {
  AtenTensorHandle copy = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(t, &copy));
  return Tensor(copy);
}

// Like TORCH_BOX(kernel), but with TensorList for the lists of tensors.
template <auto kernel>
void boxed_lars(StableIValue* arguments, uint64_t count, uint64_t) {
  using torch::stable::detail::to;
  STD_TORCH_CHECK(count == 9, "lars_: 9 arguments are expected, got ", count);
  const TensorList params(arguments[0]), grads(arguments[1]), buffers(arguments[2]);
  kernel(params, grads, buffers, to<std::vector<int64_t>>(arguments[3]),
         to<std::vector<int64_t>>(arguments[4]), to<std::vector<double>>(arguments[5]),
         to<std::vector<Tensor>>(arguments[6]), to<std::optional<Tensor>>(arguments[7]),
         to<std::optional<Tensor>>(arguments[8]));
}

class LarsArguments {
 public:
  std::vector<LarsGroup> groups;
  std::vector<LarsTensor> tensors;  // none of them empty

  // hyper holds, per group, the six doubles of LarsGroup in their order.
  LarsArguments(const TensorList& params, const TensorList& grads, const TensorList& buffers,
                const std::vector<int64_t>& group_sizes, const std::vector<int64_t>& flags,
                const std::vector<double>& hyper) {
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
        AtenTensorHandle v = nullptr;
        if (h[1] != 0.0) {
          STD_TORCH_CHECK(next_buffer < buffers.size(), "lars_: too few momentum buffers");
          v = buffers[next_buffer++];
        }
        add(params[next], grads[next], v, static_cast<int32_t>(i));
      }
    }
    STD_TORCH_CHECK(next == params.size() && next_buffer == buffers.size(),
                    "lars_: group_sizes do not cover the parameters and buffers");
  }

  // Copies results back to tensors whose strides made the update work on a contiguous copy.
  void finish() {
    for (auto& [original, copy] : copies_) torch::stable::copy_(original, copy);
  }

 private:
  std::vector<std::pair<Tensor, Tensor>> copies_;
  std::vector<Tensor> kept_;

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

  struct Shape {
    int64_t dim;
    const int64_t *sizes, *strides;
    explicit Shape(AtenTensorHandle t)
        : dim(ask(aoti_torch_get_dim, t)),
          sizes(ask(aoti_torch_get_sizes, t)),
          strides(ask(aoti_torch_get_strides, t)) {}
  };

  static bool same_strides(AtenTensorHandle a, AtenTensorHandle b) {
    const Shape x(a), y(b);
    for (int64_t i = 0; i < x.dim; ++i)
      if (x.sizes[i] > 1 && x.strides[i] != y.strides[i]) return false;
    return true;
  }

  // Whether the elements fill one block of memory, in any order of dimensions.
  static bool is_dense(AtenTensorHandle t) {
    const Shape shape(t);
    std::vector<std::pair<int64_t, int64_t>> order;
    for (int64_t i = 0; i < shape.dim; ++i)
      if (shape.sizes[i] > 1) order.emplace_back(shape.strides[i], shape.sizes[i]);
    std::sort(order.begin(), order.end());
    int64_t expected = 1;
    for (const auto& [stride, size] : order) {
      if (stride != expected) return false;
      expected *= size;
    }
    return true;
  }

  static bool same_sizes(AtenTensorHandle a, AtenTensorHandle b) {
    const Shape x(a), y(b);
    return x.dim == y.dim && std::equal(x.sizes, x.sizes + x.dim, y.sizes);
  }

  static bool is_contiguous(AtenTensorHandle t) { return ask(aoti_torch_is_contiguous, t); }
  static int64_t numel(AtenTensorHandle t) { return ask(aoti_torch_get_numel, t); }
  static void* data(AtenTensorHandle t) { return ask(aoti_torch_get_data_ptr, t); }

  void* writable(AtenTensorHandle t) {
    if (is_contiguous(t)) return data(t);
    const Tensor original = owned(t);
    copies_.emplace_back(original, torch::stable::contiguous(original));
    return copies_.back().second.data_ptr();
  }

  const void* readable(AtenTensorHandle t) {
    if (is_contiguous(t)) return data(t);
    kept_.push_back(torch::stable::contiguous(owned(t)));
    return kept_.back().data_ptr();
  }

  void add(AtenTensorHandle p, AtenTensorHandle g, AtenTensorHandle v, int32_t group) {
    static const int32_t strided = aoti_torch_layout_strided();
    STD_TORCH_CHECK(ask(aoti_torch_get_layout, g) == strided,
                    "LARS needs strided gradients, got a sparse one");
    const int32_t dtype = ask(aoti_torch_get_dtype, p);
    STD_TORCH_CHECK(
        ask(aoti_torch_get_dtype, g) == dtype && (!v || ask(aoti_torch_get_dtype, v) == dtype),
        "the fused LARS takes gradients and momentum buffers of their parameter's "
        "dtype; fused=False takes others");
    const LarsType type = type_of(dtype);
    const int64_t n = numel(p);
    const bool contiguous = is_contiguous(p) && is_contiguous(g) && (!v || is_contiguous(v));
    STD_TORCH_CHECK(contiguous ? n == numel(g) && (!v || n == numel(v))
                               : same_sizes(p, g) && (!v || same_sizes(p, v)),
                    "lars_: a gradient or momentum buffer differs in shape from its parameter");
    if (n == 0) return;
    if (contiguous || (same_strides(p, g) && (!v || same_strides(p, v)) && is_dense(p)))
      tensors.push_back({data(p), data(g), v ? data(v) : nullptr, n, type, group});
    else
      tensors.push_back({writable(p), readable(g), v ? writable(v) : nullptr, n, type, group});
  }
};

}  // namespace simclr

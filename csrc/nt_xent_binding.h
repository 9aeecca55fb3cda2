// Shared by the CPU bindings of NT-Xent and of the supervised loss.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <initializer_list>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#include "nt_xent.h"
#include "torch_check.h"

namespace simclr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void run_workers(int64_t count, void (*body)(void*, int64_t), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(context, worker);
  });
}

Workers workers() { return {int64_t(torch::stable::get_num_threads()), run_workers}; }

// An uninitialised, contiguous CPU tensor. Calls the shim directly: torch::stable::new_empty goes
// through the dispatcher, which takes several times as long and counts for small batches.
Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = sizes.begin()[1];
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle tensor;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(),
                                                         strides, code,
                                                         aoti_torch_device_type_cpu(), 0, &tensor));
  return Tensor(tensor);
}

class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  ~Memory() {
    for (void* block : owned_) std::free(block);
  }

  Workspace workspace() {
    return {this, [](void* self, int64_t bytes) {
              constexpr int64_t line = 64;
              void* block = std::aligned_alloc(line, (bytes / line + 1) * line);
              if (!block) throw std::bad_alloc();
              static_cast<Memory*>(self)->owned_.push_back(block);
              return block;
            }};
  }

 private:
  std::vector<void*> owned_;
};

ScalarType statistics_dtype(const Tensor& z) {
  return z.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor dense(const Tensor& t, ScalarType dtype) {
  const Tensor typed = t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
  return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
}

double value(const Tensor& temperature) {
  STD_TORCH_CHECK(temperature.dim() == 0 && temperature.is_cpu(),
                  "temperature must be a 0-dim CPU tensor");
  if (temperature.scalar_type() == ScalarType::Float)
    return *static_cast<const float*>(temperature.const_data_ptr());
  const Tensor t = dense(temperature, ScalarType::Double);
  return *static_cast<const double*>(t.const_data_ptr());
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

#if defined(SIMCLR_WITH_BF16)
#define SIMCLR_RUN_BF16(name, p) SIMCLR_DISPATCH_BF16(name)(p)
#else
#define SIMCLR_RUN_BF16(name, p) STD_TORCH_CHECK(false, "no bfloat16 kernels were compiled")
#endif

template <class T, class Z>
void run(const NtXentNormalize<T, Z>& p) {
  if constexpr (sizeof(Z) == 2)
    SIMCLR_RUN_BF16(nt_xent_normalize_bf16, p);
  else if constexpr (sizeof(T) == 8)
    SIMCLR_DISPATCH(nt_xent_normalize_f64)(p);
  else
    SIMCLR_DISPATCH(nt_xent_normalize_f32)(p);
}

template <class T>
void run(const NtXentForward<T>& p) {
  if constexpr (sizeof(T) == 8) {
    SIMCLR_DISPATCH(nt_xent_forward_f64)(p);
  } else {
    if (p.z1)
      SIMCLR_RUN_BF16(nt_xent_forward_bf16, p);
    else
      SIMCLR_DISPATCH(nt_xent_forward_f32)(p);
  }
}

template <class T, class Z>
void run(const NtXentBackward<T, Z>& p) {
  if constexpr (sizeof(Z) == 2)
    SIMCLR_RUN_BF16(nt_xent_backward_bf16, p);
  else if constexpr (sizeof(T) == 8)
    SIMCLR_DISPATCH(nt_xent_backward_f64)(p);
  else
    SIMCLR_DISPATCH(nt_xent_backward_f32)(p);
}

// Calls f with a value of the type that `dtype` names.
template <class F>
void with_type(ScalarType dtype, const F& f) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "expected float32 or float64");
  if (dtype == ScalarType::Double)
    f(double());
  else
    f(float());
}

}  // namespace
}  // namespace simclr

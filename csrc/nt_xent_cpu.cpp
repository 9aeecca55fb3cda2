// NT-Xent's ops on the CPU: tensors in, csrc/nt_xent*_kernel.cpp, tensors out. The schemas are in
// simclr_fast/ops.py, which also serves them without this extension.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "nt_xent.h"

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

Tensor empty(const Tensor& like, std::vector<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

struct Memory {
  const Tensor& like;
  std::vector<Tensor> owned{};

  Workspace workspace() {
    return {this, [](void* self, int64_t bytes) {
              Memory& memory = *static_cast<Memory*>(self);
              memory.owned.push_back(empty(memory.like, {bytes}, ScalarType::Byte));
              return memory.owned.back().mutable_data_ptr();
            }};
  }
};

ScalarType statistics_dtype(const Tensor& z) {
  return z.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor dense(const Tensor& t, ScalarType dtype) {
  return torch::stable::contiguous(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

double value(const Tensor& temperature) {
  STD_TORCH_CHECK(temperature.dim() == 0 && temperature.is_cpu(),
                  "temperature must be a 0-dim CPU tensor");
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

// Both views, contiguous, in the dtype of the arithmetic.
struct Views {
  Tensor first, second;
  int64_t pairs, dim;

  template <class T>
  const T* z1() const {
    return data<T>(first);
  }
  template <class T>
  const T* z2() const {
    return data<T>(second) + (second.get() == first.get() ? pairs * dim : 0);
  }
};

Views make_views(const Tensor& z1, const std::optional<Tensor>& z2) {
  STD_TORCH_CHECK(z1.dim() == 2 && z1.numel() > 0, "z1 must be [rows, features], not empty");
  const ScalarType dtype = statistics_dtype(z1);
  const Tensor first = dense(z1, dtype);
  if (!z2) {
    STD_TORCH_CHECK(z1.size(0) % 2 == 0, "z1 alone needs an even number of rows");
    return {first, first, z1.size(0) / 2, z1.size(1)};
  }
  STD_TORCH_CHECK(z2->dim() == 2 && z2->size(0) == z1.size(0) && z2->size(1) == z1.size(1) &&
                      z2->scalar_type() == z1.scalar_type(),
                  "z1 and z2 must have one shape and dtype");
  return {first, dense(*z2, dtype), z1.size(0), z1.size(1)};
}

template <class T>
void run(const NtXentNormalize<T>& p) {
  if constexpr (sizeof(T) == 8)
    SIMCLR_DISPATCH(nt_xent_normalize_f64)(p);
  else
    SIMCLR_DISPATCH(nt_xent_normalize_f32)(p);
}

template <class T>
void run(const NtXentForward<T>& p) {
  if constexpr (sizeof(T) == 8)
    SIMCLR_DISPATCH(nt_xent_forward_f64)(p);
  else
    SIMCLR_DISPATCH(nt_xent_forward_f32)(p);
}

template <class T>
void run(const NtXentBackward<T>& p) {
  if constexpr (sizeof(T) == 8)
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

std::tuple<Tensor, Tensor> normalize(const Tensor& z1, std::optional<Tensor> z2,
                                     const Tensor& temperature) {
  const Views z = make_views(z1, z2);
  const ScalarType dtype = statistics_dtype(z1);
  Tensor u = empty(z1, {2 * z.pairs, z.dim}, dtype), inv_norm = empty(z1, {2 * z.pairs}, dtype);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    run(NtXentNormalize<T>{z.z1<T>(), z.z2<T>(), z.pairs, z.dim, value(temperature),
                           mutable_data<T>(u), mutable_data<T>(inv_norm), workers()});
  });
  return {u, inv_norm};
}

std::tuple<Tensor, Tensor, Tensor> rows(const Tensor& u_all, const Tensor& temperature,
                                        int64_t row_offset, int64_t rows, bool statistics) {
  const int64_t total = u_all.size(0);
  STD_TORCH_CHECK(row_offset >= 0 && row_offset % 2 == 0 && rows > 0 && rows % 2 == 0 &&
                      row_offset + rows <= total,
                  "rows must be pairs of u_all's rows");
  const ScalarType dtype = u_all.scalar_type();
  const Tensor u = torch::stable::contiguous(u_all);
  Tensor loss = empty(u, {rows}, dtype), lse = empty(u, {rows}, ScalarType::Double);
  Tensor stats = empty(u, {statistics ? rows : 0, 4}, dtype);
  Memory memory{u};
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    run(NtXentForward<T>{data<T>(u), total, u.size(1), row_offset, rows, value(temperature),
                         mutable_data<T>(loss), mutable_data<double>(lse),
                         statistics ? mutable_data<T>(stats) : nullptr, workers(),
                         memory.workspace()});
  });
  return {loss, lse, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> nt_xent(const Tensor& z1,
                                                           std::optional<Tensor> z2,
                                                           const Tensor& temperature,
                                                           bool statistics) {
  auto [u, inv_norm] = normalize(z1, z2, temperature);
  auto [loss, lse, stats] = rows(u, temperature, 0, u.size(0), statistics);
  return {loss, lse, stats, u, inv_norm};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_all, const Tensor& u_all,
                                    const Tensor& lse_all, const Tensor& loss,
                                    const Tensor& inv_norm, const Tensor& z1,
                                    std::optional<Tensor> z2, const Tensor& temperature,
                                    int64_t row_offset) {
  const Views z = make_views(z1, z2);
  const int64_t rows = 2 * z.pairs, total = u_all.size(0);
  const ScalarType dtype = u_all.scalar_type();
  STD_TORCH_CHECK(dtype == statistics_dtype(z1) && u_all.size(1) == z.dim && row_offset >= 0 &&
                      row_offset + rows <= total && grad_all.numel() == total &&
                      lse_all.numel() == total && loss.numel() == rows &&
                      inv_norm.numel() == rows,
                  "the arguments of nt_xent_backward do not belong together");
  const Tensor u = torch::stable::contiguous(u_all), own = torch::stable::contiguous(loss);
  const Tensor lse = dense(lse_all, ScalarType::Double);
  const Tensor grad =
      grad_all.scalar_type() == dtype ? grad_all : torch::stable::to(grad_all, dtype);
  Tensor grad_z = empty(u, {rows, z.dim}, dtype), grad_temperature = empty(u, {}, dtype);
  Memory memory{u};
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    run(NtXentBackward<T>{data<T>(grad), grad.stride(0), data<T>(u), total, z.dim,
                          data<double>(lse), row_offset, rows, data<T>(own), z.z1<T>(), z.z2<T>(),
                          value(temperature), mutable_data<T>(grad_z),
                          mutable_data<T>(grad_temperature), workers(), memory.workspace()});
  });
  const ScalarType out = z1.scalar_type();
  return {out == dtype ? grad_z : torch::stable::to(grad_z, out),
          temperature.scalar_type() == dtype
              ? grad_temperature
              : torch::stable::to(grad_temperature, temperature.scalar_type())};
}

}  // namespace
}  // namespace simclr

STABLE_TORCH_LIBRARY_IMPL(simclr_fast, CPU, m) {
  m.impl("nt_xent", TORCH_BOX(&simclr::nt_xent));
  m.impl("nt_xent_normalize", TORCH_BOX(&simclr::normalize));
  m.impl("nt_xent_rows", TORCH_BOX(&simclr::rows));
  m.impl("nt_xent_backward", TORCH_BOX(&simclr::backward));
}

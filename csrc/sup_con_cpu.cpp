// The supervised contrastive loss's ops on the CPU, over NT-Xent's kernels.
#include "nt_xent_binding.h"

namespace simclr {
namespace {

std::tuple<Tensor, Tensor> normalize(const Tensor& z, const Tensor& temperature) {
  STD_TORCH_CHECK(z.dim() == 2 && z.size(1) > 0, "z must be [rows, features]");
  const ScalarType dtype = statistics_dtype(z);
  const Tensor dense_z = dense(z, dtype);
  const int64_t num_rows = z.size(0), dim = z.size(1);
  Tensor u = empty({num_rows, dim}, dtype), inv_norm = empty({num_rows}, dtype);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const T* first = data<T>(dense_z);
    run(NtXentNormalize<T>{first, first + dim, 2 * dim, num_rows, dim, value(temperature),
                           mutable_data<T>(u), mutable_data<T>(inv_norm), workers()});
  });
  return {u, inv_norm};
}

void check_classes(const Tensor& ids, const Tensor& inverse_count, int64_t total,
                   ScalarType dtype) {
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Int && ids.is_contiguous() &&
                      inverse_count.scalar_type() == dtype && inverse_count.is_contiguous() &&
                      ids.numel() == total && inverse_count.numel() == total,
                  "ids and inverse_count must be contiguous, one per row of u_all");
  const int32_t* id = data<int32_t>(ids);
  for (int64_t i = 0; i < total; ++i)
    STD_TORCH_CHECK(id[i] >= 0 && id[i] < total, "ids must be at least 0 and below the rows");
}

std::tuple<Tensor, Tensor> row_loss(const Tensor& u_all, const Tensor& ids,
                                    const Tensor& inverse_count, const Tensor& temperature,
                                    int64_t row_offset, int64_t num_rows) {
  const int64_t total = u_all.size(0);
  const ScalarType dtype = u_all.scalar_type();
  STD_TORCH_CHECK(row_offset >= 0 && num_rows >= 0 && row_offset + num_rows <= total,
                  "rows must be rows of u_all");
  check_classes(ids, inverse_count, total, dtype);
  const Tensor u = dense(u_all, dtype);
  Tensor row_loss = empty({num_rows}, dtype), lse = empty({num_rows}, ScalarType::Double);
  if (num_rows == 0) return {row_loss, lse};
  Memory memory;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    run(NtXentForward<T>{data<T>(u),
                         total,
                         u.size(1),
                         row_offset,
                         num_rows,
                         value(temperature),
                         false,
                         mutable_data<T>(row_loss),
                         mutable_data<double>(lse),
                         nullptr,
                         workers(),
                         memory.workspace(),
                         {data<int32_t>(ids), data<T>(inverse_count)}});
  });
  return {row_loss, lse};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& u_all, const Tensor& lse_all,
                                    const Tensor& ids, const Tensor& inverse_count,
                                    const Tensor& inv_norm, const Tensor& z,
                                    const Tensor& temperature, int64_t row_offset) {
  const int64_t total = u_all.size(0), num_rows = z.size(0), dim = z.size(1);
  const ScalarType dtype = u_all.scalar_type();
  STD_TORCH_CHECK(dtype == statistics_dtype(z) && u_all.size(1) == dim && row_offset >= 0 &&
                      row_offset + num_rows <= total && grad.dim() == 1 && grad.numel() == total &&
                      lse_all.numel() == total && inv_norm.numel() == num_rows,
                  "the arguments of sup_con_backward do not belong together");
  check_classes(ids, inverse_count, total, dtype);
  const Tensor u = dense(u_all, dtype), lse = dense(lse_all, ScalarType::Double);
  const Tensor own = dense(z, dtype);
  const Tensor g = grad.scalar_type() == dtype ? grad : torch::stable::to(grad, dtype);
  Tensor grad_z = empty({num_rows, dim}, dtype), grad_temperature = empty({}, dtype);
  Memory memory;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    *mutable_data<T>(grad_temperature) = 0;
    if (num_rows == 0) return;
    run(NtXentBackward<T>{data<T>(g),
                          g.stride(0),
                          1.0,
                          data<T>(u),
                          total,
                          dim,
                          data<double>(lse),
                          row_offset,
                          num_rows,
                          false,
                          nullptr,
                          data<T>(own),
                          nullptr,
                          value(temperature),
                          mutable_data<T>(grad_z),
                          mutable_data<T>(grad_temperature),
                          workers(),
                          memory.workspace(),
                          {data<int32_t>(ids), data<T>(inverse_count)}});
  });
  const ScalarType out = z.scalar_type();
  return {out == dtype ? grad_z : torch::stable::to(grad_z, out), grad_temperature};
}

}  // namespace
}  // namespace simclr

STABLE_TORCH_LIBRARY_IMPL(simclr_fast, CPU, m) {
  m.impl("sup_con_normalize", TORCH_BOX(&simclr::normalize));
  m.impl("sup_con_row_loss", TORCH_BOX(&simclr::row_loss));
  m.impl("sup_con_backward", TORCH_BOX(&simclr::backward));
}

// NT-Xent's ops on the CPU: tensors in, csrc/nt_xent*_kernel.cpp, tensors out. The schemas are in
// simclr_fast/ops/nt_xent.py, which also serves them without this extension.
#include "nt_xent_binding.h"

namespace simclr {
namespace {

// Whether this CPU multiplies such embeddings as they are.
bool in_bf16(const Tensor& z) { return z.scalar_type() == ScalarType::BFloat16 && has_bf16(); }

// Both views, contiguous, in the dtype of the arithmetic, or bfloat16 if in_bf16.
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
  STD_TORCH_CHECK(z1.dim() == 2 && z1.size(1) > 0, "z1 must be [rows, features]");
  const ScalarType dtype = in_bf16(z1) ? ScalarType::BFloat16 : statistics_dtype(z1);
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

// u and inv_norm, without values.
std::tuple<Tensor, Tensor> allocate_normalized(const Views& z, ScalarType dtype) {
  return {empty({2 * z.pairs, z.dim}, dtype), empty({2 * z.pairs}, dtype)};
}

template <class T, class Z>
NtXentNormalize<T, Z> normalization(const Views& z, double temperature, Tensor& u,
                                    Tensor& inv_norm) {
  return {z.z1<Z>(),
          z.z2<Z>(),
          z.dim,
          2 * z.pairs,
          z.dim,
          temperature,
          mutable_data<T>(u),
          mutable_data<T>(inv_norm),
          workers()};
}

std::tuple<Tensor, Tensor> normalize_views(const Views& z, ScalarType dtype, double temperature) {
  auto [u, inv_norm] = allocate_normalized(z, dtype);
  if (z.first.scalar_type() == ScalarType::BFloat16)
    run(normalization<float, Bf16>(z, temperature, u, inv_norm));
  else
    with_type(dtype, [&, &u = u, &inv_norm = inv_norm](auto type) {
      using T = decltype(type);
      run(normalization<T, T>(z, temperature, u, inv_norm));
    });
  return {u, inv_norm};
}

std::tuple<Tensor, Tensor> normalize(const Tensor& z1, std::optional<Tensor> z2,
                                     const Tensor& temperature) {
  return normalize_views(make_views(z1, z2), statistics_dtype(z1), value(temperature));
}

// kept: [kept_size] or empty. views: of which u_all was made, or null. Of bfloat16 the products are
// computed from them and inv_norm; otherwise u_all and inv_norm are made of them first.
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& u_all, const Tensor& temperature,
                                           int64_t row_offset, int64_t num_rows, bool decoupled,
                                           bool statistics, Tensor kept,
                                           const Views* views = nullptr,
                                           Tensor* inv_norm = nullptr) {
  const int64_t total = u_all.size(0);
  STD_TORCH_CHECK(row_offset >= 0 && row_offset % 2 == 0 && num_rows >= 0 && num_rows % 2 == 0 &&
                      row_offset + num_rows <= total,
                  "rows must be pairs of u_all's rows");
  const ScalarType dtype = u_all.scalar_type();
  const Tensor u = dense(u_all, dtype);
  Tensor row_loss = empty({num_rows}, dtype), lse = empty({num_rows}, ScalarType::Double);
  Tensor stats = empty({statistics ? num_rows : 0, 4}, dtype);
  if (num_rows == 0) return {row_loss, lse, stats};
  Memory memory;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    NtXentForward<T> p{data<T>(u),
                       total,
                       u.size(1),
                       row_offset,
                       num_rows,
                       value(temperature),
                       decoupled,
                       mutable_data<T>(row_loss),
                       mutable_data<double>(lse),
                       statistics ? mutable_data<T>(stats) : nullptr,
                       workers(),
                       memory.workspace(),
                       {},
                       kept.numel() ? mutable_data<T>(kept) : nullptr};
    NtXentNormalize<T> making;
    if (views && views->first.scalar_type() == ScalarType::BFloat16) {
      p.z1 = views->z1<Bf16>(), p.z2 = views->z2<Bf16>();
      p.inv_norm = data<T>(*inv_norm);
    } else if (views) {
      Tensor made = u_all;
      making = normalization<T, T>(*views, p.temperature, made, *inv_norm);
      p.normalize = &making;
    }
    run(p);
  });
  return {row_loss, lse, stats};
}

std::tuple<Tensor, Tensor, Tensor> row_loss(const Tensor& u_all, const Tensor& temperature,
                                            int64_t row_offset, int64_t num_rows, bool decoupled,
                                            bool statistics) {
  return forward(u_all, temperature, row_offset, num_rows, decoupled, statistics,
                 empty({0}, u_all.scalar_type()));
}

// Numbered as torch's own losses do; simclr_fast/ops/nt_xent.py has the same numbers.
enum Reduction : int64_t { kNone, kMean, kSum };

// [2N], view 1's rows first, or their sum or mean, from interleaved rows.
template <class T>
Tensor reduce(const Tensor& row_loss, int64_t reduction) {
  const int64_t num_rows = row_loss.size(0);
  const T* row = data<T>(row_loss);
  if (reduction == kNone) {
    Tensor out = empty({num_rows}, row_loss.scalar_type());
    T* view_major = mutable_data<T>(out);
    for (int64_t i = 0; i < num_rows; ++i) view_major[i % 2 * (num_rows / 2) + i / 2] = row[i];
    return out;
  }
  double sum = 0;
  for (int64_t i = 0; i < num_rows; ++i) sum += double(row[i]);
  Tensor out = empty({}, row_loss.scalar_type());
  *mutable_data<T>(out) = T(reduction == kMean ? sum / double(num_rows) : sum);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> nt_xent(
    const Tensor& z1, std::optional<Tensor> z2, const Tensor& temperature, int64_t reduction,
    bool decoupled, bool statistics, bool keep) {
  const Views views = make_views(z1, z2);
  const ScalarType dtype = statistics_dtype(z1);
  auto [u, inv_norm] = in_bf16(z1) ? normalize_views(views, dtype, value(temperature))
                                   : allocate_normalized(views, dtype);
  const int64_t num_rows = u.size(0);
  Tensor kept = empty({keep ? kept_size(num_rows, u.size(1)) : 0}, u.scalar_type());
  auto [row_loss, lse, stats] =
      forward(u, temperature, 0, num_rows, decoupled, statistics, kept, &views, &inv_norm);
  Tensor loss;
  with_type(u.scalar_type(),
            [&](auto type) { loss = reduce<decltype(type)>(row_loss, reduction); });
  return {loss, row_loss, lse, stats, u, inv_norm, kept};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, bool mean, const Tensor& u_all,
                                    const Tensor& lse_all, const Tensor& row_loss,
                                    const Tensor& inv_norm, const Tensor& z1,
                                    std::optional<Tensor> z2, const Tensor& temperature,
                                    int64_t row_offset, bool decoupled,
                                    std::optional<Tensor> kept) {
  const ScalarType dtype = u_all.scalar_type();
  Views z = make_views(z1, z2);
  const int64_t num_rows = 2 * z.pairs, total = u_all.size(0);
  // With the rows of other ranks, of which only u is here, the arithmetic is float32.
  const bool bf16 = in_bf16(z1) && num_rows == total;
  if (in_bf16(z1) && !bf16) z.first = dense(z.first, dtype), z.second = dense(z.second, dtype);
  STD_TORCH_CHECK(dtype == statistics_dtype(z1) && u_all.size(1) == z.dim && row_offset >= 0 &&
                      row_offset + num_rows <= total &&
                      (grad.dim() == 0 || grad.numel() == total) && lse_all.numel() == total &&
                      row_loss.numel() == num_rows && inv_norm.numel() == num_rows,
                  "the arguments of nt_xent_backward do not belong together");
  const bool has_kept = kept && kept->numel();
  STD_TORCH_CHECK(!has_kept || (num_rows == total && kept->scalar_type() == dtype &&
                                kept->numel() == kept_size(total, z.dim)),
                  "kept does not belong to these rows");
  const Tensor u = dense(u_all, dtype), own_loss = dense(row_loss, dtype);
  const Tensor lse = dense(lse_all, ScalarType::Double), norms = dense(inv_norm, dtype);
  const Tensor g = grad.scalar_type() == dtype ? grad : torch::stable::to(grad, dtype);
  Tensor grad_z = empty({num_rows, z.dim}, z.first.scalar_type());
  Tensor grad_temperature = empty({}, dtype);
  Memory memory;
  const auto backward_as = [&](auto type, auto element) {
    using T = decltype(type);
    using Z = decltype(element);
    *mutable_data<T>(grad_temperature) = 0;
    if (num_rows == 0) return;
    run(NtXentBackward<T, Z>{data<T>(g),
                             g.dim() ? g.stride(0) : 0,
                             mean ? 1 / double(total) : 1.0,
                             data<T>(u),
                             total,
                             z.dim,
                             data<double>(lse),
                             row_offset,
                             num_rows,
                             decoupled,
                             data<T>(own_loss),
                             z.z1<Z>(),
                             z.z2<Z>(),
                             value(temperature),
                             mutable_data<Z>(grad_z),
                             mutable_data<T>(grad_temperature),
                             workers(),
                             memory.workspace(),
                             {},
                             has_kept ? data<T>(*kept) : nullptr,
                             data<T>(norms)});
  };
  if (bf16)
    backward_as(float(), Bf16());
  else
    with_type(dtype, [&](auto type) { backward_as(type, type); });
  const ScalarType out = z1.scalar_type();
  return {out == grad_z.scalar_type() ? grad_z : torch::stable::to(grad_z, out),
          temperature.scalar_type() == dtype
              ? grad_temperature
              : torch::stable::to(grad_temperature, temperature.scalar_type())};
}

}  // namespace
}  // namespace simclr

STABLE_TORCH_LIBRARY_IMPL(simclr_fast, CPU, m) {
  m.impl("nt_xent", TORCH_BOX(&simclr::nt_xent));
  m.impl("nt_xent_normalize", TORCH_BOX(&simclr::normalize));
  m.impl("nt_xent_row_loss", TORCH_BOX(&simclr::row_loss));
  m.impl("nt_xent_backward", TORCH_BOX(&simclr::backward));
}

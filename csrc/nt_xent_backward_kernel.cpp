// NT-Xent's backward pass on the CPU, compiled once per instruction set.
//
// G_i = Σ_j W_ij u_j over the negatives j, W_ij = g_i e^(s_ij - lse_i) + g_j e^(s_ij - lse_j); then,
// row by row in double precision, the positive's term and the Jacobian of the normalisation.
#include "nt_xent_blocks.h"
#include "nt_xent_tiles.h"

namespace simclr::SIMCLR_ISA {
namespace {

// A block of u in slices of kProductVecs vectors of features: [slice][block][features].
template <class T>
void slice(const T* u, int64_t count, int64_t dim, int64_t padded_dim, int64_t block, T* out) {
  constexpr int64_t width = kProductVecs * kLanes<T>;
  for (int64_t d = 0; d < padded_dim; d += width, out += block * width)
    for (int64_t r = 0; r < count; ++r)
      for (int64_t k = 0; k < width; ++k)
        out[r * width + k] = d + k < dim ? u[r * dim + d + k] : T(0);
}

// What multiplies the exponentials: see Weights in nt_xent_tiles.h.
template <class T>
struct Factors {
  T* factor;  // [total rounded up to panels], 0 beyond total
  T* lse;     // in bits, or null
  double scale;
};

template <class T>
Factors<T> make_factors(const NtXentBackward<T>& p) {
  const int64_t padded = p.total + kPanel<T>;
  Factors<T> f{allocate<T>(p.workspace, padded), nullptr, 0};
  if (!in_range<T>(p.temperature, p.total)) f.lse = allocate<T>(p.workspace, padded);
  // The largest upstream gradient is taken out, so that small ones do not become subnormal.
  for (int64_t i = 0; i < p.total; ++i) {
    const double g = __builtin_fabs(double(p.grad[i * p.grad_stride]));
    if (!(g <= f.scale)) f.scale = g;
    if (!p.grad_stride) break;
  }
  if (!(f.scale > 0)) f.scale = f.scale == 0 ? 1 : f.scale;
  parallel_rows(p.workers, padded, [&](int64_t i) {
    f.factor[i] = 0;
    if (f.lse) f.lse[i] = 0;
    if (i >= p.total) return;
    const double lse = p.lse[i] * kLog2E;
    const double g = double(p.grad[i * p.grad_stride]) / f.scale;
    if (f.lse) f.lse[i] = T(lse);
    f.factor[i] = T(g * __builtin_exp2((f.lse ? double(f.lse[i]) : 0) - lse));
  });
  return f;
}

template <class T>
void weighted_sums(const NtXentBackward<T>& p, const Factors<T>& f, T* g, int64_t padded_dim) {
  const int64_t block = block_rows<T>(p.total);
  bool finite = true;
  const Packed<T> columns = pack(p.u, 0, p.total, p.dim, block, p.workers, p.workspace, &finite);
  const bool symmetric = p.rows == p.total;
  const Packed<T> rows = symmetric ? columns
                                   : pack(p.u, p.row_offset, p.rows, p.dim, block, p.workers,
                                          p.workspace, &finite);
  const int64_t sliced = block * round_up(padded_dim, kProductVecs * kLanes<T>);
  const int64_t each = block * block + 2 * sliced;
  T* scratch = allocate<T>(p.workspace, p.workers.count * each);
  for_block_pairs(rows, columns, p.workers, p.workspace, [&](int64_t b, int64_t c, int64_t worker) {
    const Block<T> I = rows[b], J = columns[c];
    T* w = scratch + worker * each;
    T *u_rows = w + block * block, *u_columns = u_rows + sliced;
    const Weights<T> weights{f.factor + I.first,
                             f.factor + J.first,
                             f.lse ? f.lse + I.first : nullptr,
                             f.lse ? f.lse + J.first : nullptr,
                             w,
                             block};
    for (int64_t j = 0; j < J.padded; j += kPanel<T>) weigh_panel(I, J, j, p.dim, weights);
    slice(p.u + J.first * p.dim, J.count, p.dim, padded_dim, block, u_columns);
    add_product(w, block, int64_t(1), I.padded, J.count, u_columns, block,
                g + (I.first - rows.first) * padded_dim, padded_dim);
    if (!symmetric || b == c) return;
    slice(p.u + I.first * p.dim, I.count, p.dim, padded_dim, block, u_rows);
    add_product(w, int64_t(1), block, J.padded, I.count, u_rows, block,
                g + (J.first - rows.first) * padded_dim, padded_dim);
  });
}

// Gradients of one view of a pair. q: weight of the positive, over temperature; the projection
// removes u, so its term is q·(positive - u), exact for aligned views. Returns <u, dL/du>.
template <class T>
double finish_view(const T* z, const T* other, int64_t dim, const T* g, double g_scale, double q,
                   T* out) {
  const double length = norm(z, dim), other_length = norm(other, dim);
  const double inverse = 1 / (length > kNormEps ? length : kNormEps);
  const double other_inverse = 1 / (other_length > kNormEps ? other_length : kNormEps);
  const double along = sum_of(dim, [&](int64_t k) {
    const double u = double(z[k]) * inverse, positive = double(other[k]) * other_inverse;
    return (g_scale * double(g[k]) + q * (positive - u)) * u;
  });
  const double radial = length > kNormEps ? along : 0;
  for (int64_t k = 0; k < dim; ++k) {
    const double u = double(z[k]) * inverse, positive = double(other[k]) * other_inverse;
    const double grad = g_scale * double(g[k]) + q * (positive - u);
    out[k] = T((grad - radial * u) * inverse);
  }
  return along + q * length * length * inverse * inverse;
}

template <class T>
void finish(const NtXentBackward<T>& p, const Factors<T>& f, const T* g, int64_t padded_dim) {
  const int64_t pairs = p.rows / 2;
  double* radial = allocate<double>(p.workspace, pairs);
  const double g_scale = f.scale / __builtin_sqrt(p.temperature * kLog2E);
  parallel_rows(p.workers, pairs, [&](int64_t pair) {
    double q = 0;
    for (int64_t row = 2 * pair; row < 2 * pair + 2; ++row)
      q += __builtin_expm1(-double(p.loss[row])) / p.temperature *
           double(p.grad[(p.row_offset + row) * p.grad_stride]);
    const T *z1 = p.z1 + pair * p.dim, *z2 = p.z2 + pair * p.dim, *row = g + 2 * pair * padded_dim;
    T* out = p.grad_z + pair * p.dim;
    radial[pair] = finish_view(z1, z2, p.dim, row, g_scale, q, out) +
                   finish_view(z2, z1, p.dim, row + padded_dim, g_scale, q, out + pairs * p.dim);
  });
  double sum = 0;
  for (int64_t pair = 0; pair < pairs; ++pair) sum += radial[pair];
  *p.grad_temperature = T(sum / (-2 * p.temperature));
}

template <class T>
void backward(const NtXentBackward<T>& p) {
  const int64_t padded_dim = round_up(p.dim, kLanes<T>);
  const int64_t padded_rows = round_up(p.rows, kPanel<T>);
  const Factors<T> factors = make_factors(p);
  T* g = allocate<T>(p.workspace, padded_rows * padded_dim);
  parallel_rows(p.workers, padded_rows, [&](int64_t row) {
    __builtin_memset(g + row * padded_dim, 0, padded_dim * sizeof(T));
  });
  weighted_sums(p, factors, g, padded_dim);
  finish(p, factors, g, padded_dim);
}

}  // namespace

void nt_xent_backward_f32(const NtXentBackward<float>& p) { backward(p); }
void nt_xent_backward_f64(const NtXentBackward<double>& p) { backward(p); }

}  // namespace simclr::SIMCLR_ISA

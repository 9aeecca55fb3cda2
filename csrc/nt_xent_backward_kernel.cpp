// NT-Xent's backward pass on the CPU, compiled once per instruction set.
//
// First G_i = Σ_j W_ij u_j over the negatives j, with
// W_ij = g_i e^(s_ij - lse_i) + g_j e^(s_ij - lse_j).
// Then, row by row in double precision, the positive's term and the gradient of the normalisation.
#include "nt_xent_classes.h"
#include "nt_xent_schedule.h"
#include "nt_xent_tiles.h"

namespace simclr::SIMCLR_ISA {
namespace {

// Copies a row of u in slices of kProductVecs vectors of features. Slices are `stride` apart.
template <class T>
void slice_row(const T* u, int64_t dim, int64_t padded_dim, int64_t stride, T* out) {
  constexpr int64_t width = kProductVecs * kLanes<T>;
  for (int64_t d = 0; d < padded_dim; d += width, out += stride)
    for (int64_t k = 0; k < width; ++k) out[k] = d + k < dim ? u[d + k] : T(0);
}

// The factors of the exponentials. Weights in nt_xent_tiles.h has the formulas.
template <class T>
struct Factors {
  T* factor;  // [total rounded up to panels], 0 beyond total
  T* lse;     // in bits, or null
  T* share;   // [total], g / (a row's positives), or null
  double scale;
};

template <class T>
Factors<T> make_factors(const NtXentBackward<T>& p) {
  const int64_t padded = p.total + kPanel<T>;
  Factors<T> f{allocate<T>(p.workspace, padded), nullptr, nullptr, 0};
  if (!in_range<T>(p.temperature, p.total)) f.lse = allocate<T>(p.workspace, padded);
  if (p.classes.ids) f.share = allocate<T>(p.workspace, p.total);
  // Divide by the largest upstream gradient, so that small ones do not become subnormal.
  for (int64_t i = 0; i < p.total; ++i) {
    const double g = __builtin_fabs(double(p.grad[i * p.grad_stride]));
    if (!(g <= f.scale)) f.scale = g;
    if (!p.grad_stride) break;
  }
  if (f.scale == 0) f.scale = 1;
  parallel_rows(p.workers, padded, [&](int64_t i) {
    f.factor[i] = 0;
    if (f.lse) f.lse[i] = 0;
    if (i >= p.total) return;
    const double lse = p.lse[i] * kLog2E;
    const double g = double(p.grad[i * p.grad_stride]) / f.scale;
    if (f.lse) f.lse[i] = T(lse);
    if (f.share) {
      f.share[i] = T(g * double(p.classes.inverse_count[i]));
      if (p.classes.inverse_count[i] == 0) return;
    }
    f.factor[i] = T(g * __builtin_exp2((f.lse ? double(f.lse[i]) : 0) - lse));
  });
  f.scale *= p.grad_scale;
  return f;
}

// g [rows, padded_dim] = Σ_j W_ij u_j.
template <class T>
void weighted_sums(const NtXentBackward<T>& p, const Factors<T>& f, T* g, int64_t padded_dim) {
  const int64_t block = block_rows<T>(p.total);
  const int pair_bits = p.classes.ids ? 0 : 1;
  const bool symmetric = p.rows == p.total;
  const int64_t padded_rows = round_up(p.rows, kPanel<T>);
  // u in the order in which the products read it: [block][slice][row][features].
  constexpr int64_t width = kProductVecs * kLanes<T>;
  const int64_t sliced_dim = round_up(padded_dim, width);
  T* sliced = allocate<T>(p.workspace, round_up(p.total, block) * sliced_dim);
  bool finite = true;
  const auto prepare = [&](int64_t row) {
    if (row < padded_rows) __builtin_memset(g + row * padded_dim, 0, padded_dim * sizeof(T));
    if (row < p.total)
      slice_row(p.u + row * p.dim, p.dim, padded_dim, block * width,
                sliced + row / block * block * sliced_dim + row % block * width);
  };
  const T* kept = f.lse ? nullptr : p.kept;
  Packed<T> columns{nullptr, 0, p.total, p.dim, block, pair_bits};
  if (kept)
    parallel_rows(p.workers, padded_rows, prepare);
  else
    columns =
        pack(p.u, 0, p.total, p.dim, block, pair_bits, p.workers, p.workspace, &finite, prepare);
  const Packed<T> rows = symmetric ? columns
                                   : pack(p.u, p.row_offset, p.rows, p.dim, block, pair_bits,
                                          p.workers, p.workspace, &finite, [](int64_t) {});
  T* scratch = allocate<T>(p.workspace, p.workers.count * block * block);
  for_block_pairs(
      rows, columns, p.workers, p.workspace,
      [&](int64_t b, int64_t c, int64_t worker, int64_t number) {
        const Block<T> I = rows[b], J = columns[c];
        T* w = scratch + worker * block * block;
        const Weights<T> weights{f.factor + I.first,
                                 f.factor + J.first,
                                 f.lse ? f.lse + I.first : nullptr,
                                 f.lse ? f.lse + J.first : nullptr,
                                 w,
                                 block};
        if (kept) weigh_kept(I, J, kept + number * block * block, weights);
        for (int64_t j = 0; !kept && j < J.padded; j += kPanel<T>) {
          weigh_panel(I, J, j, p.dim, weights);
          if (f.share) subtract_shares(I, J, j, p.classes.ids, f.share, w, block);
        }
        add_product(w, block, int64_t(1), I.padded, J.count, sliced + c * block * sliced_dim, block,
                    g + b * block * padded_dim, padded_dim);
        if (symmetric && b != c)
          add_product(w, int64_t(1), block, J.padded, I.count, sliced + b * block * sliced_dim,
                      block, g + c * block * padded_dim, padded_dim);
      });
}

// The two views of a pair, and where their gradients go.
template <class T>
struct Pair {
  const T* z[2];          // [dim]
  const T* negatives[2];  // [dim], Σ_j W_ij u_j; times scale: dL/du without the positive's term
  double scale;
  double q;    // weight of the positive, over temperature
  T* grad[2];  // [dim]
};

// dL/du has the term q·positive. The projection removes multiples of u, so the term may be
// q·(positive - u) instead, which keeps its digits for aligned views.
// Returns Σ <u, dL/du> over both views.
template <class T>
double finish_pair(const Pair<T>& p, int64_t dim) {
  double inverse[2];
  bool clamped[2];
  for (int v = 0; v < 2; ++v) {
    const double length = norm(p.z[v], dim);
    clamped[v] = !(length > kNormEps);
    inverse[v] = 1 / (clamped[v] ? kNormEps : length);
  }
  Doubles sums[2] = {}, squares{};
  for (int64_t k = 0; k < dim; k += kDoubles) {
    const Doubles u0 = load_doubles(p.z[0] + k, dim - k) * inverse[0];
    const Doubles u1 = load_doubles(p.z[1] + k, dim - k) * inverse[1];
    const Doubles toward = p.q * (u1 - u0);
    sums[0] += (p.scale * load_doubles(p.negatives[0] + k, dim - k) + toward) * u0;
    sums[1] += (p.scale * load_doubles(p.negatives[1] + k, dim - k) - toward) * u1;
    squares += u0 * u0 + u1 * u1;
  }
  const double along[2] = {sum_lanes(sums[0]), sum_lanes(sums[1])};
  // A clamped norm is a constant: there is no projection, and the q·u that was subtracted is added
  // again.
  const double radial[2] = {clamped[0] ? -p.q : along[0], clamped[1] ? -p.q : along[1]};
  for (int64_t k = 0; k < dim; k += kDoubles) {
    const Doubles u0 = load_doubles(p.z[0] + k, dim - k) * inverse[0];
    const Doubles u1 = load_doubles(p.z[1] + k, dim - k) * inverse[1];
    const Doubles toward = p.q * (u1 - u0);
    const Doubles g0 = p.scale * load_doubles(p.negatives[0] + k, dim - k) + toward;
    const Doubles g1 = p.scale * load_doubles(p.negatives[1] + k, dim - k) - toward;
    store_doubles(p.grad[0] + k, dim - k, (g0 - radial[0] * u0) * inverse[0]);
    store_doubles(p.grad[1] + k, dim - k, (g1 - radial[1] * u1) * inverse[1]);
  }
  return along[0] + along[1] + p.q * sum_lanes(squares);
}

template <class T>
void finish(const NtXentBackward<T>& p, const Factors<T>& f, const T* g, int64_t padded_dim) {
  const int64_t pairs = p.rows / 2;
  double* radial = allocate<double>(p.workspace, pairs);
  const double g_scale = f.scale / __builtin_sqrt(p.temperature * kLog2E);
  parallel_rows(p.workers, pairs, [&](int64_t pair) {
    double q = 0;
    for (int64_t row = 2 * pair; row < 2 * pair + 2; ++row)
      q += (p.decoupled ? -1 : __builtin_expm1(-double(p.loss[row]))) *
           double(p.grad[(p.row_offset + row) * p.grad_stride]);
    const T* row = g + 2 * pair * padded_dim;
    T* out = p.grad_z + pair * p.dim;
    radial[pair] = finish_pair<T>({{p.z1 + pair * p.dim, p.z2 + pair * p.dim},
                                   {row, row + padded_dim},
                                   g_scale,
                                   q * p.grad_scale / p.temperature,
                                   {out, out + pairs * p.dim}},
                                  p.dim);
  });
  double sum = 0;
  for (int64_t pair = 0; pair < pairs; ++pair) sum += radial[pair];
  *p.grad_temperature = T(sum / (-2 * p.temperature));
}

template <class T>
void backward(const NtXentBackward<T>& p) {
  const int64_t padded_dim = round_up(p.dim, kLanes<T>);
  const Factors<T> factors = make_factors(p);
  T* g = allocate<T>(p.workspace, round_up(p.rows, kPanel<T>) * padded_dim);
  weighted_sums(p, factors, g, padded_dim);
  if (p.classes.ids)
    finish_class_gradients(p, factors.scale / __builtin_sqrt(p.temperature * kLog2E), g,
                           padded_dim);
  else
    finish(p, factors, g, padded_dim);
}

}  // namespace

void nt_xent_backward_f32(const NtXentBackward<float>& p) { backward(p); }
void nt_xent_backward_f64(const NtXentBackward<double>& p) { backward(p); }

}  // namespace simclr::SIMCLR_ISA

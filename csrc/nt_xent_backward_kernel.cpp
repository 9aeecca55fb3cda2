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
  T* factor;       // [total + kPanel], 0 beyond total
  T* lse;          // in bits, or null
  T* share;        // [total], g / (a row's positives), or null
  double largest;  // upstream gradient, by which g is divided
};

template <class T, class Z>
Factors<T> allocate_factors(const NtXentBackward<T, Z>& p) {
  const int64_t padded = p.total + kPanel<T>;
  Factors<T> f{allocate<T>(p.workspace, padded), nullptr, nullptr, 0};
  if (!in_range<T>(p.temperature, p.total)) f.lse = allocate<T>(p.workspace, padded);
  for (int64_t row = p.total; row < padded; ++row) {
    f.factor[row] = 0;
    if (f.lse) f.lse[row] = 0;
  }
  if (p.classes.ids) f.share = allocate<T>(p.workspace, p.total);
  // Divide by the largest upstream gradient, so that small ones do not become subnormal.
  for (int64_t i = 0; i < p.total; ++i) {
    const double g = __builtin_fabs(double(p.grad[i * p.grad_stride]));
    if (!(g <= f.largest)) f.largest = g;
    if (!p.grad_stride) break;
  }
  if (f.largest == 0) f.largest = 1;
  return f;
}

template <class T, class Z>
void make_factor(const NtXentBackward<T, Z>& p, const Factors<T>& f, int64_t row) {
  if (row >= p.total) return;
  const double lse = p.lse[row] * kLog2E;
  const double g = double(p.grad[row * p.grad_stride]) / f.largest;
  if (f.lse) f.lse[row] = T(lse);
  if (f.share) {
    f.share[row] = T(g * double(p.classes.inverse_count[row]));
    f.factor[row] = 0;
    if (p.classes.inverse_count[row] == 0) return;
  }
  f.factor[row] = T(g * __builtin_exp2((f.lse ? double(f.lse[row]) : 0) - lse));
}

#if !defined(SIMCLR_BF16)
// g [rows, padded_dim] = Σ_j W_ij u_j, then finish() on every worker.
template <class T, class F>
void weighted_sums(const NtXentBackward<T>& p, const Factors<T>& f, T* g, int64_t padded_dim,
                   const F& finish) {
  const int64_t block = block_rows<T>(p.total);
  const int pair_bits = p.classes.ids ? 0 : 1;
  const bool symmetric = p.rows == p.total;
  const int64_t padded_rows = round_up(p.rows, kPanel<T>);
  // u in the order in which the products read it: [block][slice][row][features].
  constexpr int64_t width = kProductVecs * kLanes<T>;
  const int64_t sliced_dim = round_up(padded_dim, width);
  T* sliced = allocate<T>(p.workspace, round_up(p.total, block) * sliced_dim);
  const auto prepare = [&](int64_t row) {
    make_factor(p, f, row);
    if (row < padded_rows) __builtin_memset(g + row * padded_dim, 0, padded_dim * sizeof(T));
    if (row < p.total)
      slice_row(p.u + row * p.dim, p.dim, padded_dim, block * width,
                sliced + row / block * block * sliced_dim + row % block * width);
  };
  const T* kept = f.lse ? nullptr : p.kept;
  Packed<T> columns{nullptr, 0, p.total, p.dim, block, pair_bits};
  if (!kept) columns = allocate_panels<T>(0, p.total, p.dim, block, pair_bits, p.workspace);
  const Packed<T> rows =
      symmetric ? columns
                : allocate_panels<T>(p.row_offset, p.rows, p.dim, block, pair_bits, p.workspace);
  const int64_t team = team_size(rows, columns, p.workers);
  T* scratch = allocate<T>(p.workspace, team * block * block);
  bool finite = true;  // of no interest here
  Phase packing, packing_rows;
  BlockPairs pairs = block_pairs(rows, p.workspace);
  run_team(p.workers, team, [&](int64_t worker) {
    if (kept)
      share_rows(packing, round_up(p.total, kPanel<T>), prepare);
    else
      pack(packing, p.u, columns, &finite, prepare);
    if (!symmetric) pack(packing_rows, p.u, rows, &finite, [](int64_t) {});
    T* w = scratch + worker * block * block;
    for_block_pairs(pairs, rows, columns, [&](int64_t b, int64_t c, int64_t number) {
      const Block<T> I = rows[b], J = columns[c];
      const Weights<T> weights{f.factor + I.first,
                               f.factor + J.first,
                               f.lse ? f.lse + I.first : nullptr,
                               f.lse ? f.lse + J.first : nullptr,
                               w,
                               block};
      if (kept) weigh_kept(I, J, kept + number * block * block, weights);
      for (int64_t j = 0; !kept && j < J.padded; j += kPanel<T>) {
        weigh_panel(I, J, j, weights);
        if (f.share) subtract_shares(I, J, j, p.classes.ids, f.share, w, block);
      }
      add_product(w, block, int64_t(1), I.padded, J.count, sliced + c * block * sliced_dim, block,
                  g + b * block * padded_dim, padded_dim);
      if (symmetric && b != c)
        add_product(w, int64_t(1), block, J.padded, I.count, sliced + b * block * sliced_dim, block,
                    g + c * block * padded_dim, padded_dim);
    });
    finish();
  });
}
#else
// What the products with W read of z: pairs of rows, feature by feature.
struct RowPairs {
  // [block][slice][row pair][kProductVecs·kLanes features]
  float* sliced;
  // For AMX: [block][feature][row pair].
  float* by_feature;
};

// Rows `row` and `row + 1` of the padded rows.
inline void pair_rows(const Packed<float>& z, int64_t row, int64_t padded_dim, int64_t sliced_dim,
                      const RowPairs& out) {
  constexpr int64_t width = kProductVecs * kLanes<float>;
  const int64_t block = z.block / 2, b = row / z.block, r = row % z.block / 2;
  using Pair = uint32_t __attribute__((may_alias));
  const auto* even = reinterpret_cast<const Pair*>(z.by_row + row * z.depth);
  const auto* odd = even + z.depth;
  for (int64_t d = 0; d < padded_dim; d += width) {
    auto* slice = reinterpret_cast<Pair*>(out.sliced + (b * sliced_dim + d) * block + r * width);
    const int64_t count = smaller(width / 2, z.depth - d / 2);
    for (int64_t k = 0; k < count; ++k) {
      const uint32_t first = even[d / 2 + k], second = odd[d / 2 + k];
      slice[2 * k] = (first & 0xffff) | second << 16;
      slice[2 * k + 1] = first >> 16 | (second & 0xffff0000u);
    }
    for (int64_t k = 2 * count; k < width; ++k) slice[k] = 0;
    auto* column = reinterpret_cast<Pair*>(out.by_feature) + (b * padded_dim + d) * block + r;
    for (int64_t k = 0; out.by_feature && k < smaller(width, padded_dim - d); ++k)
      column[k * block] = slice[k];
  }
}

// g [rows, padded_dim] = Σ_j W_ij u_j, then finish() on every worker.
template <class F>
void weighted_sums(const NtXentBackward<float, Bf16>& p, const Factors<float>& f, float* g,
                   int64_t padded_dim, const F& finish) {
  const int64_t block = block_rows<float>(p.total), padded = round_up(p.total, kPanel<float>);
  const Packed<float> z = allocate_views(p.total, p.dim, block, p.workspace);
  constexpr int64_t width = kProductVecs * kLanes<float>;
  const int64_t sliced_dim = round_up(padded_dim, width), blocks = z.blocks();
  RowPairs row_pairs{allocate<float>(p.workspace, blocks * block / 2 * sliced_dim), nullptr};
  // The products with the mirrored W: of AMX features by rows, otherwise they go to g.
  float* mirrored = nullptr;
#if defined(SIMCLR_AMX)
  row_pairs.by_feature = allocate<float>(p.workspace, blocks * block / 2 * padded_dim);
  mirrored = allocate<float>(p.workspace, blocks * block * padded_dim);
#endif
  const float* kept = f.lse ? nullptr : p.kept;
  const int64_t team = team_size(z, z, p.workers);
  // W twice, in bfloat16: in pairs of columns and in pairs of rows.
  float* scratch = allocate<float>(p.workspace, team * block * block);
  bool finite = true;  // of no interest here
  Phase packing, pairing, adding;
  BlockPairs pairs = block_pairs(z, p.workspace);
  run_team(p.workers, team, [&](int64_t worker) {
    pack_views(packing, p.z1, p.z2, p.inv_norm, z, p.dim, p.temperature, &finite);
    share_rows(pairing, padded / 2, [&](int64_t pair) {
      const int64_t row = 2 * pair;
      make_factor(p, f, row);
      make_factor(p, f, row + 1);
      __builtin_memset(g + row * padded_dim, 0, size_t(2 * padded_dim) * sizeof(float));
      // Here a block ends after `block` rows, also the last one.
      const int64_t end = row + 2 < padded ? row + 2 : blocks * block;
      if (mirrored)
        __builtin_memset(mirrored + row * padded_dim, 0,
                         size_t((end - row) * padded_dim) * sizeof(float));
      pair_rows(z, row, padded_dim, sliced_dim, row_pairs);
    });
    float *w = scratch + worker * block * block, *across = w + block * block / 2;
    for_block_pairs(pairs, z, z, [&](int64_t b, int64_t c, int64_t number) {
      const TileRegisters tiles;
      const Block<float> I = z[b], J = z[c];
      const Weights<float> weights{f.factor + I.first,
                                   f.factor + J.first,
                                   f.lse ? f.lse + I.first : nullptr,
                                   f.lse ? f.lse + J.first : nullptr,
                                   w,
                                   block,
                                   across,
                                   I.scale,
                                   J.scale};
      if (kept) weigh_kept(I, J, kept + number * block * block, weights);
      for (int64_t j = 0; !kept && j < J.padded; j += kPanel<float>) weigh_panel(I, J, j, weights);
      const float *z_rows = row_pairs.sliced + b * block / 2 * sliced_dim,
                  *z_columns = row_pairs.sliced + c * block / 2 * sliced_dim;
      float *g_rows = g + b * block * padded_dim, *g_columns = g + c * block * padded_dim;
#if defined(SIMCLR_AMX)
      for (int64_t d = 0; d < padded_dim; d += width)
        add_matrix_product(w, block / 2, z_columns + d * block / 2, width, J.padded / 2, g_rows + d,
                           padded_dim, I.padded, smaller(width, padded_dim - d));
      if (b != c)
        add_matrix_product(row_pairs.by_feature + b * block / 2 * padded_dim, block / 2, across,
                           block, I.padded / 2, mirrored + c * block * padded_dim, block,
                           padded_dim, J.padded);
      (void)z_rows, (void)g_columns;
#else
      add_product(w, block / 2, int64_t(1), I.padded, J.count / 2, z_columns, block / 2, g_rows,
                  padded_dim);
      if (b != c)
        add_product(across, int64_t(1), block, J.padded, I.count / 2, z_rows, block / 2, g_columns,
                    padded_dim);
#endif
    });
    if (mirrored)
      share_rows(adding, p.total, [&](int64_t row) {
        const float* from = mirrored + row / block * block * padded_dim + row % block;
        for (int64_t d = 0; d < padded_dim; ++d) g[row * padded_dim + d] += from[d * block];
      });
    finish();
  });
}
#endif

// The two views of a pair, and where their gradients go.
template <class T, class Z>
struct Pair {
  const Z* z[2];          // [dim]
  const T* negatives[2];  // [dim], Σ_j W_ij u_j; times scale: dL/du without the positive's term
  double scale;
  double q;    // weight of the positive, over temperature
  Z* grad[2];  // [dim]
};

// dL/du has the term q·positive. The projection removes multiples of u, so the term may be
// q·(positive - u) instead, which keeps its digits for aligned views.
// Returns Σ <u, dL/du> over both views.
template <class T, class Z>
double finish_pair(const Pair<T, Z>& p, int64_t dim) {
  double inverse[2];
  bool clamped[2];
  for (int v = 0; v < 2; ++v) {
    const double length = norm(p.z[v], dim);
    clamped[v] = !(length > kNormEps);
    inverse[v] = 1 / (clamped[v] ? kNormEps : length);
  }
  Doubles sums[2] = {}, squares{};
  for_doubles(dim, [&](int64_t k, int64_t count) {
    const Doubles u0 = load_doubles(p.z[0] + k, count) * inverse[0];
    const Doubles u1 = load_doubles(p.z[1] + k, count) * inverse[1];
    const Doubles toward = p.q * (u1 - u0);
    sums[0] += (p.scale * load_doubles(p.negatives[0] + k, count) + toward) * u0;
    sums[1] += (p.scale * load_doubles(p.negatives[1] + k, count) - toward) * u1;
    squares += u0 * u0 + u1 * u1;
  });
  const double along[2] = {sum_lanes(sums[0]), sum_lanes(sums[1])};
  // A clamped norm is a constant: there is no projection, and the q·u that was subtracted is added
  // again.
  const double radial[2] = {clamped[0] ? -p.q : along[0], clamped[1] ? -p.q : along[1]};
  for_doubles(dim, [&](int64_t k, int64_t count) {
    const Doubles u0 = load_doubles(p.z[0] + k, count) * inverse[0];
    const Doubles u1 = load_doubles(p.z[1] + k, count) * inverse[1];
    const Doubles toward = p.q * (u1 - u0);
    const Doubles g0 = p.scale * load_doubles(p.negatives[0] + k, count) + toward;
    const Doubles g1 = p.scale * load_doubles(p.negatives[1] + k, count) - toward;
    store_doubles(p.grad[0] + k, count, (g0 - radial[0] * u0) * inverse[0]);
    store_doubles(p.grad[1] + k, count, (g1 - radial[1] * u1) * inverse[1]);
  });
  return along[0] + along[1] + p.q * sum_lanes(squares);
}

// radial: [rows / 2] Σ <u, dL/du> over both views of a pair.
template <class T, class Z>
void finish_row_pair(const NtXentBackward<T, Z>& p, double g_scale, const T* g, int64_t padded_dim,
                     double* radial, int64_t pair) {
  double q = 0;
  for (int64_t row = 2 * pair; row < 2 * pair + 2; ++row)
    q += (p.decoupled ? -1 : __builtin_expm1(-double(p.loss[row]))) *
         double(p.grad[(p.row_offset + row) * p.grad_stride]);
  const T* row = g + 2 * pair * padded_dim;
  Z* out = p.grad_z + pair * p.dim;
  radial[pair] = finish_pair<T, Z>({{p.z1 + pair * p.dim, p.z2 + pair * p.dim},
                                    {row, row + padded_dim},
                                    g_scale,
                                    q * p.grad_scale / p.temperature,
                                    {out, out + p.rows / 2 * p.dim}},
                                   p.dim);
}

template <class T, class Z>
void backward(const NtXentBackward<T, Z>& p) {
#if defined(SIMCLR_AMX)
  const int64_t padded_dim = round_up(p.dim, 16);
#else
  const int64_t padded_dim = round_up(p.dim, kLanes<T>);
#endif
  const Factors<T> factors = allocate_factors(p);
  T* g = allocate<T>(p.workspace, round_up(p.rows, kPanel<T>) * padded_dim);
  // g times this is dL/du.
  const double g_scale = factors.largest * p.grad_scale / __builtin_sqrt(p.temperature * kLog2E);
  double* radial = allocate<double>(p.workspace, p.rows);
  int64_t parts = p.rows / 2;
  Phase finishing;
#if !defined(SIMCLR_BF16)
  if (p.classes.ids) {
    parts = p.rows;
    weighted_sums(p, factors, g, padded_dim, [&] {
      share_rows(finishing, parts, [&](int64_t row) {
        finish_class_row_gradient(p, g_scale, g, padded_dim, radial, row);
      });
    });
  } else
#endif
    weighted_sums(p, factors, g, padded_dim, [&] {
      share_rows(finishing, parts,
                 [&](int64_t pair) { finish_row_pair(p, g_scale, g, padded_dim, radial, pair); });
    });
  double sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += radial[part];
  *p.grad_temperature = T(sum / (-2 * p.temperature));
}

}  // namespace

#if defined(SIMCLR_BF16)
void nt_xent_backward_bf16(const NtXentBackward<float, Bf16>& p) { backward(p); }
#else
void nt_xent_backward_f32(const NtXentBackward<float>& p) { backward(p); }
void nt_xent_backward_f64(const NtXentBackward<double>& p) { backward(p); }
#endif

}  // namespace simclr::SIMCLR_ISA

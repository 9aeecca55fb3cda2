// The tiles of NT-Xent on the CPU: similarities, exponentials while they are in registers, and the
// products of the weights W with the embeddings.
// A register tile loads its columns from one panel as vectors and broadcasts its rows from another.
#pragma once

#include "nt_xent_schedule.h"
#if defined(SIMCLR_BF16)
#include "nt_xent_bf16.h"
#endif

namespace simclr::SIMCLR_ISA {
namespace {

template <class T>
using Tile = Vec<T>[kTileRows<T>][kTileVecs];

#if !defined(SIMCLR_BF16)

template <class T>
SIMCLR_INLINE Vec<T> broadcast_operand(const T& value) {
  return broadcast<T>(value);
}

template <class T>
SIMCLR_INLINE Vec<T> multiply_add(Vec<T> sum, Vec<T> a, Vec<T> b) {
  return sum + a * b;
}

#endif

#if !defined(SIMCLR_AMX)
// The products of rows [i, i + kTileRows) of block I and the panel of block J that starts at j.
template <class T>
SIMCLR_INLINE void multiply_panel(const Block<T>& I, int64_t i, const Block<T>& J, int64_t j,
                                  Tile<T>& x) {
  const int64_t start = i / kPanel<T> * kPanel<T>;
  const T *rows = I.panels + start * I.depth + (i - start), *columns = J.panels + j * J.depth;
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows<T>; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kTileVecs; ++v) x[r][v] = Vec<T>{};
  for (int64_t k = 0; k < I.depth; ++k, rows += kPanel<T>, columns += kPanel<T>) {
    Vec<T> c[kTileVecs];
#pragma GCC unroll 3
    for (int v = 0; v < kTileVecs; ++v) c[v] = load(columns + v * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows<T>; ++r) {
      const Vec<T> row = in_register<T>(broadcast_operand(rows[r]));
#pragma GCC unroll 3
      for (int v = 0; v < kTileVecs; ++v)
        x[r][v] = in_register<T>(multiply_add<T>(x[r][v], row, c[v]));
    }
  }
}
#endif

template <class T>
SIMCLR_INLINE void similarities(const Block<T>& I, int64_t i, const Block<T>& J, int64_t j,
                                Tile<T>& x) {
  multiply_panel(I, i, J, j, x);
#if defined(SIMCLR_BF16)
  multiply_scales(I, i, J, j, x);
#endif
}

// Whether a register tile holds a pair (self or positive) or rows that only fill up a panel.
template <class T>
SIMCLR_INLINE bool needs_mask(const Block<T>& I, int64_t i, const Block<T>& J, int64_t j) {
  const int64_t row = I.first + i, column = J.first + j;
  return (row < column + kPanel<T> && column < row + kTileRows<T>) || i + kTileRows<T> > I.count ||
         j + kPanel<T> > J.count;
}

// All bits are set for negatives, none for self, positive and rows that fill up a panel.
template <class T>
using Mask = typename Lanes<T>::IntVec[kTileRows<T>][kTileVecs];

template <class T>
SIMCLR_INLINE void make_mask(const Block<T>& I, int64_t i, const Block<T>& J, int64_t j,
                             Mask<T>& keep) {
  using Int = typename Lanes<T>::IntVec;
  using Bits = typename Lanes<T>::Bits;
  // Counted from the tile's first column. It is even, and so is the first row where pairs matter.
  const int bits = I.pair_bits;
  const Bits pair = Bits(((I.first + i) >> bits) - ((J.first + j) >> bits));
  const Bits columns = Bits(J.count - j);
  Int lane;
#pragma GCC unroll 16
  for (int l = 0; l < kLanes<T>; ++l) lane[l] = l;
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows<T>; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kTileVecs; ++v) {
      const Int column = lane + v * kLanes<T>;
      const Int rows = Int{} - Bits(i + r < I.count ? 1 : 0);
      keep[r][v] = rows & ((column >> bits) != Int{} + Bits(pair + (r >> bits))) &
                   (column < Int{} + columns);
    }
}

// The results of the forward pass over the negatives of each row: arrays [rows][2], for columns of
// the row's own view [0] and of the other view [1].
struct Sums {
  double* sum;       // Σ 2^(x - reference)
  double* weighted;  // Σ 2^(x - reference)·x
  double* highest;   // max x
};

enum class Pass {
  sum,        // Σ 2^x
  stats,      // and Σ 2^x·x and max x
  highest,    // max x
  reference,  // Σ 2^(x - reference) and Σ 2^(x - reference)·x, reference = max x
};

constexpr bool has_sum(Pass p) { return p != Pass::highest; }
constexpr bool has_weighted(Pass p) { return p == Pass::stats || p == Pass::reference; }
constexpr bool has_highest(Pass p) { return p == Pass::stats || p == Pass::highest; }

// Partial results of one tile in vector lanes. A vector of columns starts at an even index, so even
// lanes are view 1; a register tile starts at an even row.
template <class T>
struct RowPartials {
  Vec<T>*sum, *weighted, *highest;  // [block rows]
  T* kept;                          // [block rows, block rows] 2^x, or null
  int64_t stride;
};

template <class T>
struct ColumnPartials {
  Vec<T> sum[2][kTileVecs], weighted[2][kTileVecs], highest[2][kTileVecs];  // [view of the row]
};

// References of the rows of both blocks, as vectors over columns.
template <class T>
struct References {
  const T* rows;     // [block rows][2]: same view, other view
  const T* columns;  // [2][kPanel]: for rows of view 1, of view 2
};

template <class T>
SIMCLR_INLINE Vec<T> alternate(T even, T odd) {
  typename Lanes<T>::IntVec is_odd;
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes<T>; ++lane) is_odd[lane] = lane % 2 ? -1 : 0;
  return is_odd ? broadcast<T>(odd) : broadcast<T>(even);
}

// Leaves 2^(x - reference) in x.
template <class T, Pass pass, bool mirror, bool masked>
SIMCLR_INLINE void collect(Tile<T>& x, const Mask<T>& keep, int64_t i, RowPartials<T>& rows,
                           ColumnPartials<T>& columns, const References<T>& references) {
  const Vec<T> lowest = broadcast<T>(-1e30f);
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows<T>; ++r) {
    Vec<T> sum{}, weighted{}, highest = lowest, reference{};
    if constexpr (pass == Pass::reference) {
      const T* own = references.rows + 2 * (i + r);
      reference = alternate<T>(own[r % 2], own[1 - r % 2]);
    }
#pragma GCC unroll 3
    for (int v = 0; v < kTileVecs; ++v) {
      const Vec<T> logit = x[r][v];
      if constexpr (has_highest(pass)) {
        const Vec<T> candidate = masked ? (keep[r][v] ? logit : lowest) : logit;
        highest = maximum<T>(highest, candidate);
        if constexpr (mirror)
          columns.highest[r % 2][v] = maximum<T>(columns.highest[r % 2][v], candidate);
      }
      if constexpr (has_sum(pass)) {
        const bool relative = pass == Pass::reference;
        Vec<T> e = relative ? exp2_or_zero<T>(logit - reference) : exp2_in_range<T>(logit);
        if constexpr (masked) e = keep[r][v] ? e : Vec<T>{};
        x[r][v] = e;
        sum += e;
        if constexpr (has_weighted(pass)) weighted += e * logit;
        if constexpr (mirror) {
          if constexpr (relative) {
            const T* own = references.columns + r % 2 * kPanel<T> + v * kLanes<T>;
            e = exp2_or_zero<T>(logit - load(own));
            if constexpr (masked) e = keep[r][v] ? e : Vec<T>{};
          }
          columns.sum[r % 2][v] += e;
          if constexpr (has_weighted(pass)) columns.weighted[r % 2][v] += e * logit;
        }
      }
    }
    if constexpr (has_sum(pass)) rows.sum[i + r] += sum;
    if constexpr (has_weighted(pass)) rows.weighted[i + r] += weighted;
    if constexpr (has_highest(pass)) rows.highest[i + r] = maximum<T>(rows.highest[i + r], highest);
  }
}

// Rows [begin, end) of block I against one panel of block J.
template <class T, Pass pass, bool mirror>
void collect_panel(const Block<T>& I, int64_t begin, int64_t end, const Block<T>& J, int64_t j,
                   RowPartials<T>& rows, ColumnPartials<T>& columns,
                   const References<T>& references) {
  for (int64_t i = begin; i < end; i += kTileRows<T>) {
    Tile<T> x;
    similarities(I, i, J, j, x);
    if (needs_mask(I, i, J, j)) {
      Mask<T> keep;
      make_mask(I, i, J, j, keep);
      collect<T, pass, mirror, true>(x, keep, i, rows, columns, references);
    } else {
      collect<T, pass, mirror, false>(x, {}, i, rows, columns, references);
    }
    if (!rows.kept) continue;
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows<T>; ++r)
#pragma GCC unroll 3
      for (int v = 0; v < kTileVecs; ++v)
        store(rows.kept + (i + r) * rows.stride + j + v * kLanes<T>, x[r][v]);
  }
}

// Weights of one register tile into w: W_ij = 2^x·(a_i + a_j), or, when the logits leave the range
// of 2^x, g_i·2^(x - lse_i) + g_j·2^(x - lse_j).
template <class T>
struct Weights {
  const T *row_factor, *column_factor;  // a, or g: of the blocks' rows, 0 for filling
  const T *row_lse, *column_lse;        // in bits; null: a is meant
  T* w;                                 // of bfloat16: pairs of columns, times the column's scale
  int64_t stride;                       // values between rows
  // Of bfloat16: the same in pairs of rows, times the row's scale; and these scales.
  T* across = nullptr;  // [block rows / 2, stride]
  const T *row_scale = nullptr, *column_scale = nullptr;
};

// Stores the weights of an even row and of the next one.
template <class T>
SIMCLR_INLINE void store_weights(const Weights<T>& p, int64_t row, int64_t column, Vec<T> even,
                                 Vec<T> odd) {
#if defined(SIMCLR_BF16)
  const Vec<T> scale = load(p.column_scale + column);
  uint16_t* halves = reinterpret_cast<uint16_t*>(p.w) + row * p.stride + column;
  store_rounded(halves, even * scale);
  store_rounded(halves + p.stride, odd * scale);
  store(p.across + row / 2 * p.stride + column,
        (Vec<T>)(round_to_bf16(even * p.row_scale[row]) |
                 (round_to_bf16(odd * p.row_scale[row + 1]) << 16)));
#else
  store(p.w + row * p.stride + column, even);
  store(p.w + (row + 1) * p.stride + column, odd);
#endif
}

template <class T, bool masked>
SIMCLR_INLINE void weigh(const Tile<T>& x, const Mask<T>& keep, int64_t i, int64_t j,
                         const Weights<T>& p) {
#pragma GCC unroll 4
  for (int r = 0; r < kTileRows<T>; r += 2)
#pragma GCC unroll 3
    for (int v = 0; v < kTileVecs; ++v) {
      const int64_t column = j + v * kLanes<T>;
      const Vec<T> factor = load(p.column_factor + column);
      Vec<T> w[2];
#pragma GCC unroll 2
      for (int o = 0; o < 2; ++o) {
        w[o] = exp2_in_range<T>(x[r + o][v]) * (p.row_factor[i + r + o] + factor);
        if constexpr (masked) w[o] = keep[r + o][v] ? w[o] : Vec<T>{};
      }
      store_weights(p, i + r, column, w[0], w[1]);
    }
}

template <class T>
void weigh_by_lse(const Tile<T>& x, const Mask<T>& keep, int64_t i, int64_t j,
                  const Weights<T>& p) {
  for (int r = 0; r < kTileRows<T>; r += 2)
    for (int v = 0; v < kTileVecs; ++v) {
      const int64_t column = j + v * kLanes<T>;
      Vec<T> w[2];
      for (int o = 0; o < 2; ++o) {
        const int64_t at = i + r + o;
        const Vec<T> logit = x[r + o][v];
        const Vec<T> row = exp2_or_zero<T>(logit - p.row_lse[at]) * p.row_factor[at];
        const Vec<T> mirrored =
            exp2_or_zero<T>(logit - load(p.column_lse + column)) * load(p.column_factor + column);
        w[o] = keep[r + o][v] ? row + mirrored : Vec<T>{};
      }
      store_weights(p, i + r, column, w[0], w[1]);
    }
}

template <class T>
void weigh_panel(const Block<T>& I, const Block<T>& J, int64_t j, const Weights<T>& p) {
  for (int64_t i = 0; i < I.padded; i += kTileRows<T>) {
    Tile<T> x;
    Mask<T> keep;
    similarities(I, i, J, j, x);
    const bool masked = needs_mask(I, i, J, j);
    if (masked || p.row_lse) make_mask(I, i, J, j, keep);
    if (p.row_lse)
      weigh_by_lse<T>(x, keep, i, j, p);
    else if (masked)
      weigh<T, true>(x, keep, i, j, p);
    else
      weigh<T, false>(x, {}, i, j, p);
  }
}

// Like weigh_panel for all panels of J, from the 2^x that the forward pass kept. In a block's pair
// with itself, the forward pass kept the panels from a row's own on; the others mirror them.
template <class T>
void weigh_kept(const Block<T>& I, const Block<T>& J, const T* kept, const Weights<T>& p) {
  const bool diagonal = I.first == J.first;
  for (int64_t i = 0; i < I.padded; i += 2) {
    const int64_t begin = diagonal ? i / kPanel<T> * kPanel<T> : 0;
    const T* rows = kept + i * p.stride;
    for (int64_t j = 0; j < J.padded; j += kLanes<T>) {
      Vec<T> e[2] = {};
      if (j < begin)
        for (int l = 0; l < kLanes<T>; ++l)
          for (int o = 0; o < 2; ++o) e[o][l] = kept[(j + l) * p.stride + i + o];
      else
        for (int o = 0; o < 2; ++o) e[o] = load(rows + o * p.stride + j);
      const Vec<T> factor = load(p.column_factor + j);
      store_weights(p, i, j, e[0] * (p.row_factor[i] + factor),
                    e[1] * (p.row_factor[i + 1] + factor));
    }
  }
}

// kProductRows rows of g += W·u, vecs vectors wide. W's element (row, k) is w[row·rows + k·steps].
template <class T, int vecs>
SIMCLR_INLINE void product_tile(const T* w, int64_t rows, int64_t steps, int64_t depth, const T* u,
                                T* g, int64_t g_stride) {
  Vec<T> sum[kProductRows][vecs];
#pragma GCC unroll 6
  for (int r = 0; r < kProductRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) sum[r][v] = load(g + r * g_stride + v * kLanes<T>);
  for (int64_t k = 0; k < depth; ++k, w += steps, u += kProductVecs * kLanes<T>) {
    Vec<T> column[vecs];
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) column[v] = load(u + v * kLanes<T>);
#pragma GCC unroll 6
    for (int r = 0; r < kProductRows; ++r) {
      const Vec<T> weight = in_register<T>(broadcast_operand(w[r * rows]));
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v)
        sum[r][v] = in_register<T>(multiply_add<T>(sum[r][v], weight, column[v]));
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kProductRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) store(g + r * g_stride + v * kLanes<T>, sum[r][v]);
}

template <class T, int vecs>
void product_slice(const T* w, int64_t rows, int64_t steps, int64_t count, int64_t depth,
                   const T* u, T* g, int64_t g_stride) {
  for (int64_t i = 0; i < count; i += kProductRows)
    product_tile<T, vecs>(w + i * rows, rows, steps, depth, u, g + i * g_stride, g_stride);
}

// g [count, padded_dim] += W·u, with u in slices of kProductVecs vectors: [slice][depth][features].
template <class T>
void add_product(const T* w, int64_t rows, int64_t steps, int64_t count, int64_t depth, const T* u,
                 int64_t slice_rows, T* g, int64_t padded_dim) {
  constexpr int64_t width = kProductVecs * kLanes<T>;
  for (int64_t d = 0; d < padded_dim; d += width, u += slice_rows * width) {
    const int64_t vecs = (padded_dim - d) / kLanes<T>;
    if (vecs >= kProductVecs)
      product_slice<T, kProductVecs>(w, rows, steps, count, depth, u, g + d, padded_dim);
    else if (vecs == 3)
      product_slice<T, 3>(w, rows, steps, count, depth, u, g + d, padded_dim);
    else if (vecs == 2)
      product_slice<T, 2>(w, rows, steps, count, depth, u, g + d, padded_dim);
    else
      product_slice<T, 1>(w, rows, steps, count, depth, u, g + d, padded_dim);
  }
}

}  // namespace
}  // namespace simclr::SIMCLR_ISA

// NT-Xent's normalisation and forward pass on the CPU, compiled once per instruction set.
#include "nt_xent_classes.h"
#include "nt_xent_schedule.h"
#include "nt_xent_tiles.h"

namespace simclr::SIMCLR_ISA {
namespace {

template <class T, class Z>
void normalize_row(const NtXentNormalize<T, Z>& p, int64_t row) {
  const double scale = __builtin_sqrt(kLog2E / p.temperature);
  const Z* z = (row % 2 ? p.z2 : p.z1) + row / 2 * p.stride;
  const double length = norm(z, p.dim);
  const double inverse = 1 / (length > kNormEps ? length : kNormEps);
  // 0, or NaN when the row holds NaN or infinity.
  const double poison = length - length;
  T* u = p.u + row * p.dim;
  for_doubles(p.dim, [&](int64_t k, int64_t count) {
    store_doubles(u + k, count, load_doubles(z + k, count) * (scale * inverse) + poison);
  });
  p.inv_norm[row] = T(inverse + poison);
}

template <class T, class Z>
void normalize(const NtXentNormalize<T, Z>& p) {
  parallel_rows(p.workers, p.rows, [&](int64_t row) { normalize_row(p, row); });
}

template <class T>
double lane_sum(Vec<T> v, int parity) {
  double sum = 0;
  for (int lane = parity; lane < kLanes<T>; lane += 2) sum += double(v[lane]);
  return sum;
}

template <class T>
double lane_max(Vec<T> v, int parity) {
  double highest = -1e30;
  for (int lane = parity; lane < kLanes<T>; lane += 2)
    highest = double(v[lane]) > highest ? double(v[lane]) : highest;
  return highest;
}

void raise(double& highest, double value) { highest = value > highest ? value : highest; }

template <class T>
void fill(Vec<T>* v, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) v[i] = broadcast<T>(value);
}

template <class T>
void clear(RowPartials<T>& rows, int64_t count) {
  fill<T>(rows.sum, count, 0);
  fill<T>(rows.weighted, count, 0);
  fill<T>(rows.highest, count, -1e30f);
}

template <class T>
void clear(ColumnPartials<T>& columns) {
  fill<T>(columns.sum[0], 2 * kTileVecs, 0);
  fill<T>(columns.weighted[0], 2 * kTileVecs, 0);
  fill<T>(columns.highest[0], 2 * kTileVecs, -1e30f);
}

// Where Sums has the results of a row over the columns of a view: 2·row for the row's own view,
// 2·row + 1 for the other one.
int64_t sum_index(int64_t row, int64_t view) { return 2 * row + ((view ^ row) & 1); }

// Adds the partial results of `count` rows, the first of which has number first_row in sums.
template <class T, Pass pass>
void add_rows(const RowPartials<T>& rows, int64_t first_row, int64_t count, const Sums& sums) {
  for (int64_t i = 0; i < count; ++i)
    for (int view = 0; view < 2; ++view) {
      const int64_t at = sum_index(first_row + i, view);
      if (has_sum(pass)) sums.sum[at] += lane_sum<T>(rows.sum[i], view);
      if (has_weighted(pass)) sums.weighted[at] += lane_sum<T>(rows.weighted[i], view);
      if (has_highest(pass)) raise(sums.highest[at], lane_max<T>(rows.highest[i], view));
    }
}

// The same for the columns of one panel. x is symmetric: they are rows too, and the rows are their
// columns.
template <class T, Pass pass>
void add_columns(const ColumnPartials<T>& columns, int64_t first_row, int64_t count,
                 const Sums& sums) {
  for (int64_t i = 0; i < count; ++i)
    for (int view = 0; view < 2; ++view) {
      const int64_t at = sum_index(first_row + i, view);
      const int64_t v = i / kLanes<T>, lane = i % kLanes<T>;
      if (has_sum(pass)) sums.sum[at] += double(columns.sum[view][v][lane]);
      if (has_weighted(pass)) sums.weighted[at] += double(columns.weighted[view][v][lane]);
      if (has_highest(pass)) raise(sums.highest[at], double(columns.highest[view][v][lane]));
    }
}

// The references of a panel's columns when they are rows: over columns of view 1, then of view 2.
// Rows that only fill up the panel get 0.
template <class T>
void column_references(const T* references, int64_t first_row, int64_t count, T* out) {
  for (int view = 0; view < 2; ++view)
    for (int64_t i = 0; i < kPanel<T>; ++i)
      out[view * kPanel<T> + i] = i < count ? references[sum_index(first_row + i, view)] : T(0);
}

// Adds to sums what block I's rows collect over block J's columns and, if x is symmetric, what J's
// rows collect over I's columns. first_row, first_column: the blocks' first rows in sums.
template <class T, Pass pass>
void collect_pair(const Block<T>& I, int64_t first_row, const Block<T>& J, int64_t first_column,
                  bool symmetric, const T* references, RowPartials<T>& rows, const Sums& sums) {
  const bool diagonal = symmetric && I.first == J.first;
  clear(rows, I.padded);
  for (int64_t j = 0; j < J.padded; j += kPanel<T>) {
    const int64_t count = smaller(kPanel<T>, J.count - j);
    ColumnPartials<T> columns;
    clear(columns);
    T panel_references[2 * kPanel<T>];
    if constexpr (pass == Pass::reference)
      if (symmetric) column_references(references, first_column + j, count, panel_references);
    const References<T> reference{references ? references + 2 * first_row : nullptr,
                                  panel_references};
    // Rows [0, mirrored) count for the columns too. A block's pair with itself holds each x twice:
    // the rows before the panel are mirrored, those after it are left out.
    const int64_t mirrored = !symmetric ? 0 : diagonal ? j : I.padded;
    const int64_t end = diagonal ? j + kPanel<T> : I.padded;
    collect_panel<T, pass, true>(I, 0, mirrored, J, j, rows, columns, reference);
    collect_panel<T, pass, false>(I, mirrored, end, J, j, rows, columns, reference);
    if (mirrored) add_columns<T, pass>(columns, first_column + j, count, sums);
  }
  add_rows<T, pass>(rows, first_row, I.count, sums);
}

// scratch: three vectors per row of a block.
template <class T, Pass pass>
void collect_blocks(BlockPairs& pairs, const Packed<T>& rows, const Packed<T>& columns,
                    const Sums& sums, const T* references, Vec<T>* scratch,
                    const NtXentForward<T>& p) {
  const bool symmetric = rows.panels == columns.panels;
  const int64_t block = rows.block;
  for_block_pairs(pairs, rows, columns, [&](int64_t b, int64_t c, int64_t number) {
#if defined(SIMCLR_BF16)
    const TileRegisters tiles;
#endif
    const Block<T> I = rows[b], J = columns[c];
    RowPartials<T> partials{scratch, scratch + block, scratch + 2 * block, nullptr, block};
    // The backward pass can use 2^x only without references.
    if (p.kept && (pass == Pass::sum || pass == Pass::stats))
      partials.kept = p.kept + number * block * block;
    collect_pair<T, pass>(I, I.first - rows.first, J, J.first - columns.first, symmetric,
                          references, partials, sums);
  });
}

// The x of every pair, [rows / 2], with the same bits as for negatives: it is compared with them,
// and equal rows must tie.
template <class T>
void positive_logits(Phase& phase, const Packed<T>& rows, const Packed<T>& columns,
                     const NtXentForward<T>& p, T* out) {
  share(phase, round_up(p.rows, kTileRows<T>) / kTileRows<T>, [&](int64_t task) {
#if defined(SIMCLR_BF16)
    const TileRegisters tiles;
#endif
    const int64_t first = task * kTileRows<T>;
    int64_t panel = -1;
    Tile<T> x;
    for (int64_t row = first; row < smaller(p.rows, first + kTileRows<T>); row += 2) {
      const int64_t column = p.row_offset + row + 1, in_block = column % columns.block;
      if (column / kPanel<T> != panel) {
        panel = column / kPanel<T>;
        similarities(rows[first / rows.block], first % rows.block, columns[column / columns.block],
                     in_block / kPanel<T> * kPanel<T>, x);
      }
      const int64_t lane = in_block % kPanel<T>;
      out[row / 2] = x[row - first][lane / kLanes<T>][lane % kLanes<T>];
    }
  });
}

// log2 Σ 2^x, mean of x under the softmax and maximum of x over a set of columns.
struct Negatives {
  double log2_sum, mean, highest;
};

Negatives both(const Negatives& a, const Negatives& b) {
  const Negatives& more = a.log2_sum > b.log2_sum ? a : b;
  const Negatives& less = a.log2_sum > b.log2_sum ? b : a;
  if (less.log2_sum == -__builtin_inf()) return more;
  const double ratio = __builtin_exp2(less.log2_sum - more.log2_sum);
  return {more.log2_sum + __builtin_log1p(ratio) * kLog2E,
          (more.mean + ratio * less.mean) / (1 + ratio),
          more.highest > less.highest ? more.highest : less.highest};
}

// compared: the positive's x as positive_logits has it. positive: the same in double precision, for
// the entropy.
template <class T>
void top1_and_entropy(const Negatives& negatives, double positive, T compared, T* out) {
  const Negatives all = both(negatives, {positive, positive, positive});
  out[0] = double(compared) > negatives.highest ? T(1) : T(0);
  const double entropy = (all.log2_sum - all.mean) / kLog2E;
  out[1] = T(entropy > 0 ? entropy : 0);
}

// log(1 + 2^bits), to full relative accuracy.
double softplus_of_bits(double bits) {
  return bits > 0 ? bits / kLog2E + __builtin_log1p(__builtin_exp2(-bits))
                  : __builtin_log1p(__builtin_exp2(bits));
}

template <class T>
void finish_row(const NtXentForward<T>& p, const Sums& sums, const T* references,
                const ClassSums<T>* classes, double positive, T compared, int64_t row) {
  Negatives all{__builtin_log2(sums.sum[2 * row] + sums.sum[2 * row + 1]), 0, 0};
  if (references || p.stats) {
    Negatives negatives[2];
    for (int c = 0; c < 2; ++c) {
      const int64_t at = 2 * row + c;
      const double sum = sums.sum[at];
      negatives[c] = {-__builtin_inf(), 0, -__builtin_inf()};
      if (!(sum > 0)) continue;
      negatives[c].log2_sum = __builtin_log2(sum) + (references ? double(references[at]) : 0);
      if (sums.weighted) negatives[c].mean = sums.weighted[at] / sum;
      if (sums.highest) negatives[c].highest = sums.highest[at];
    }
    all = both(negatives[0], negatives[1]);
    if (p.stats) {
      top1_and_entropy(negatives[1], positive, compared, p.stats + 4 * row);
      top1_and_entropy(all, positive, compared, p.stats + 4 * row + 2);
    }
  }
  if (p.classes.ids) {
    finish_class_row(p, *classes, all.log2_sum, row);
    return;
  }
  // log(positive + negatives) - log(positive), without its cancellation.
  const double difference = all.log2_sum - positive;
  const double loss = p.decoupled ? difference / kLog2E : softplus_of_bits(difference);
  p.loss[row] = T(loss);
  p.lse[row] = p.decoupled ? all.log2_sum / kLog2E : positive / kLog2E + loss;
}

template <class T>
void forward(const NtXentForward<T>& p) {
  const int64_t block = block_rows<T>(p.total);
  const int pair_bits = p.classes.ids ? 0 : 1;
  const bool symmetric = p.rows == p.total, ranged = in_range<T>(p.temperature, p.total);
#if defined(SIMCLR_BF16)
  const Packed<T> columns = allocate_views(p.total, p.dim, block, p.workspace);
#else
  const Packed<T> columns = allocate_panels<T>(0, p.total, p.dim, block, pair_bits, p.workspace);
#endif
  const Packed<T> rows =
      symmetric ? columns
                : allocate_panels<T>(p.row_offset, p.rows, p.dim, block, pair_bits, p.workspace);
  const int64_t team = team_size(rows, columns, p.workers);
  Vec<T>* scratch = allocate<Vec<T>>(p.workspace, team * 3 * block);
  double* values = allocate<double>(p.workspace, 6 * p.rows);
  for (int64_t i = 0; i < 4 * p.rows; ++i) values[i] = 0;
  for (int64_t i = 4 * p.rows; i < 6 * p.rows; ++i) values[i] = -1e30;
  Sums sums{values, values + 2 * p.rows, values + 4 * p.rows};
  if (ranged && !p.stats) sums.weighted = sums.highest = nullptr;
  const int64_t referenced = 2 * round_up(p.rows, kPanel<T>);
  T* references = ranged ? nullptr : allocate<T>(p.workspace, referenced);
  T* compared = p.stats ? allocate<T>(p.workspace, p.rows / 2) : nullptr;
  ClassSums<T> classes{};
  if (p.classes.ids) classes = sum_classes(p);
  bool finite = true;
  Phase packing, packing_rows, referring, comparing, finishing;
  BlockPairs pairs = block_pairs(rows, p.workspace), again = block_pairs(rows, p.workspace);
  run_team(p.workers, team, [&](int64_t worker) {
#if defined(SIMCLR_BF16)
    pack_views(packing, p.z1, p.z2, p.inv_norm, columns, p.dim, p.temperature, &finite);
#else
    pack(packing, p.u, columns, &finite, [&](int64_t row) {
      if (p.normalize && row < p.total) normalize_row(*p.normalize, row);
    });
    if (!symmetric) pack(packing_rows, p.u, rows, &finite, [](int64_t) {});
#endif
    if (!__atomic_load_n(&finite, __ATOMIC_RELAXED)) return;
    Vec<T>* own = scratch + worker * 3 * block;
    if (ranged && p.stats) {
      collect_blocks<T, Pass::stats>(pairs, rows, columns, sums, nullptr, own, p);
    } else if (ranged) {
      collect_blocks<T, Pass::sum>(pairs, rows, columns, sums, nullptr, own, p);
    } else {
      collect_blocks<T, Pass::highest>(pairs, rows, columns, sums, nullptr, own, p);
      share(referring, 1, [&](int64_t) {
        for (int64_t i = 0; i < referenced; ++i)
          references[i] = i < 2 * p.rows ? T(sums.highest[i]) : T(0);
      });
      collect_blocks<T, Pass::reference>(again, rows, columns, sums, references, own, p);
    }
    if (compared) positive_logits(comparing, rows, columns, p, compared);
    share_rows(finishing, (p.rows + 1) / 2, [&](int64_t pair) {
      const T* u = p.u + (p.row_offset + 2 * pair) * p.dim;
      const double positive = p.classes.ids ? 0 : dot(u, u + p.dim, p.dim);
      for (int64_t row = 2 * pair; row < smaller(2 * pair + 2, p.rows); ++row)
        finish_row(p, sums, references, &classes, positive, compared ? compared[pair] : T(0), row);
    });
  });
  if (finite) return;
  for (int64_t i = 0; i < p.rows; ++i) p.lse[i] = p.loss[i] = T(__builtin_nan(""));
  for (int64_t i = 0; p.stats && i < 4 * p.rows; ++i) p.stats[i] = T(__builtin_nan(""));
}

}  // namespace

#if defined(SIMCLR_BF16)
void nt_xent_normalize_bf16(const NtXentNormalize<float, Bf16>& p) { normalize(p); }
void nt_xent_forward_bf16(const NtXentForward<float>& p) { forward(p); }
#else
void nt_xent_normalize_f32(const NtXentNormalize<float>& p) { normalize(p); }
void nt_xent_normalize_f64(const NtXentNormalize<double>& p) { normalize(p); }
void nt_xent_forward_f32(const NtXentForward<float>& p) { forward(p); }
void nt_xent_forward_f64(const NtXentForward<double>& p) { forward(p); }
#endif

}  // namespace simclr::SIMCLR_ISA

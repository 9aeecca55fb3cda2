// Blocks of rows of NT-Xent on the CPU, and the order in which pairs of blocks are visited.
//
// In one process x is symmetric, so only tiles on and above the diagonal are computed. In the
// forward pass each gives sums of its rows and of its columns. In the backward pass its weights W
// are multiplied by the u of its columns and by the u of its rows.
// Pairs of blocks go in rounds: I + J = round, modulo the number of blocks. So each block has one
// pair in a round. A pair waits only for the pairs of the previous round that contain its blocks.
// So every sum is taken in the same order for any number of threads, and a slow thread delays only
// a few others.
// A pass is one parallel region. Its threads go through phases, whose tasks they take as they come,
// and wait at the end of a phase until the tasks of the others are done. So a thread that starts
// late is not waited for, and one thread that runs all workers in turn does all work as the first.
#pragma once

#include <sched.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "nt_xent.h"
#include "nt_xent_vector.h"

namespace simclr::SIMCLR_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kNormEps = 1e-12;
constexpr int64_t kLargestBlock = 192;
constexpr int64_t kBlocksWanted = 10;

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
int64_t block_rows(int64_t total) {
  return smaller(kLargestBlock, round_up(total / kBlocksWanted + 1, kPanel<T>));
}

// Whether 2^x and its sums stay in range. Otherwise every row needs its own reference.
template <class T>
bool in_range(double temperature, int64_t total) {
  return kLog2E / temperature * 1.001 + __builtin_log2(double(total)) + 8 <
         double(Lanes<T>::max_exponent);
}

// body(worker) for workers [0, count), on as many threads.
template <class F>
void run_team(const Workers& workers, int64_t count, const F& body) {
  workers.run(
      count, [](void* f, int64_t worker) { (*static_cast<const F*>(f))(worker); },
      const_cast<F*>(&body));
}

inline void wait_for(const int64_t* done, int64_t count) {
  // For some ten microseconds without a call of the system: most waits are shorter, and a busy
  // system gives the core away for milliseconds.
  for (int spins = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) < count; ++spins)
    if (spins > 50000) sched_yield();
}

struct Phase {
  int64_t next = 0, done = 0;  // tasks taken, tasks finished
};

// Every worker of a team calls this. task(number) runs once for every number in [0, count).
template <class F>
void share(Phase& phase, int64_t count, const F& task) {
  int64_t own = 0;
  for (;;) {
    const int64_t number = __atomic_fetch_add(&phase.next, int64_t(1), __ATOMIC_RELAXED);
    if (number >= count) break;
    task(number);
    ++own;
  }
  __atomic_fetch_add(&phase.done, own, __ATOMIC_RELEASE);
  wait_for(&phase.done, count);
}

template <class F>
void share_rows(Phase& phase, int64_t count, const F& f) {
  constexpr int64_t chunk = 32;
  share(phase, round_up(count, chunk) / chunk, [&](int64_t c) {
    for (int64_t row = c * chunk; row < smaller(count, (c + 1) * chunk); ++row) f(row);
  });
}

// One phase alone.
template <class F>
void parallel(const Workers& workers, int64_t count, const F& f) {
  Phase phase;
  run_team(workers, smaller(workers.count, count), [&](int64_t) { share(phase, count, f); });
}

template <class F>
void parallel_rows(const Workers& workers, int64_t count, const F& f) {
  constexpr int64_t chunk = 32;
  Phase phase;
  run_team(workers, smaller(workers.count, round_up(count, chunk) / chunk),
           [&](int64_t) { share_rows(phase, count, f); });
}

template <class T>
T* allocate(const Workspace& workspace, int64_t count) {
  return static_cast<T*>(workspace.allocate(workspace.owner, count * int64_t(sizeof(T))));
}

template <class T>
struct Block {
  const T* panels;
  int64_t first;   // index of its first row among all rows
  int64_t count;   // rows
  int64_t padded;  // rows, with the zero rows that fill up the last panel
  int pair_bits;   // 1: no row meets itself or its pair's other row; 0: no row meets itself
  int64_t depth;   // elements of a row in the panels
  // Of bfloat16 operands (csrc/nt_xent_bf16.h), otherwise null.
  const T* by_row;  // [padded, depth]
  const T* scale;   // [padded]
};

// Rows [first, first + count) of u in panels of kPanel rows, feature-major: panel[k][r]. `block`
// rows make a block.
template <class T>
struct Packed {
  T* panels;
  int64_t first, count, depth, block;
  int pair_bits;
  T *by_row = nullptr, *scale = nullptr;  // as in Block

  int64_t panel_count() const { return round_up(count, kPanel<T>) / kPanel<T>; }
  int64_t blocks() const { return (count + block - 1) / block; }
  Block<T> operator[](int64_t b) const {
    const int64_t rows = smaller(block, count - b * block);
    return {panels + b * block * depth,
            first + b * block,
            rows,
            round_up(rows, kPanel<T>),
            pair_bits,
            depth,
            by_row + (by_row ? b * block * depth : 0),
            scale + (scale ? b * block : 0)};
  }
};

template <class T>
struct Four {
  typedef T Type __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T))));
};

// Copies features 0..3 of four rows of u to the panel, where each feature is contiguous.
template <class T>
SIMCLR_INLINE void transpose(const T* u, int64_t dim, T* panel, typename Four<T>::Type& poison) {
  using V = typename Four<T>::Type;
  V r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = *reinterpret_cast<const V*>(u + i * dim);
    poison += r[i] * 0;
  }
#pragma GCC unroll 4
  for (int f = 0; f < 4; ++f)
    *reinterpret_cast<V*>(panel + f * kPanel<T>) = V{r[0][f], r[1][f], r[2][f], r[3][f]};
}

// Copies up to kPanel rows of u to the panel. Returns whether all values are finite.
template <class T>
bool pack_panel(const T* u, int64_t rows, int64_t dim, T* panel) {
  typename Four<T>::Type poison{};
  const int64_t whole_rows = rows / 4 * 4, whole_dim = dim / 4 * 4;
  for (int64_t r = 0; r < whole_rows; r += 4)
    for (int64_t k = 0; k < whole_dim; k += 4)
      transpose(u + r * dim + k, dim, panel + k * kPanel<T> + r, poison);
  for (int64_t r = 0; r < kPanel<T>; ++r)
    for (int64_t k = r < whole_rows ? whole_dim : 0; k < dim; ++k) {
      const T value = r < rows ? u[r * dim + k] : T(0);
      poison[0] += value * 0;
      panel[k * kPanel<T> + r] = value;
    }
  return poison[0] + poison[1] + poison[2] + poison[3] == 0;
}

template <class T>
Packed<T> allocate_panels(int64_t first, int64_t count, int64_t dim, int64_t block, int pair_bits,
                          const Workspace& workspace) {
  Packed<T> packed{nullptr, first, count, dim, block, pair_bits};
  packed.panels = allocate<T>(workspace, packed.panel_count() * kPanel<T> * dim);
  return packed;
}

// Fills the panels. Before, calls each_row(row) for every row of a panel, also for those that fill
// it up, on the thread that packs the panel.
template <class T, class F>
void pack(Phase& phase, const T* u, const Packed<T>& packed, bool* finite, const F& each_row) {
  share(phase, packed.panel_count(), [&](int64_t p) {
    const int64_t row = p * kPanel<T>;
    for (int64_t r = row; r < row + kPanel<T>; ++r) each_row(r);
    if (!pack_panel(u + (packed.first + row) * packed.depth, smaller(kPanel<T>, packed.count - row),
                    packed.depth, packed.panels + row * packed.depth))
      __atomic_store_n(finite, false, __ATOMIC_RELAXED);
  });
}

// Finds the pair with number t in the order of rounds. t must not become smaller between calls.
// With four blocks: (0,0) (1,3) (2,2) | (0,1) (2,3) | (0,2) (1,1) (3,3) | (0,3) (1,2).
struct PairOrder {
  int64_t blocks;
  int64_t round = 0, before = 0;  // pairs in earlier rounds

  int64_t lower() const { return round / 2 + 1; }
  int64_t pairs() const { return lower() + (round + blocks) / 2 - round; }
  void seek(int64_t t) {
    while (t - before >= pairs()) before += pairs(), ++round;
  }
  int64_t row(int64_t t) const {
    return t - before < lower() ? t - before : round + 1 + (t - before - lower());
  }
  int64_t column(int64_t t) const { return (round - row(t) + blocks) % blocks; }
};

// The state of one pass over the pairs of blocks.
struct BlockPairs {
  int64_t* rounds;  // [blocks] that a block has finished
  Phase phase{};
};

template <class T>
BlockPairs block_pairs(const Packed<T>& rows, const Workspace& workspace) {
  BlockPairs pairs{allocate<int64_t>(workspace, rows.blocks())};
  for (int64_t b = 0; b < rows.blocks(); ++b) pairs.rounds[b] = 0;
  return pairs;
}

// How many workers a pass over the pairs occupies. It is enough for the phases before and after,
// unless few rows meet many columns.
template <class T>
int64_t team_size(const Packed<T>& rows, const Packed<T>& columns, const Workers& workers) {
  const int64_t blocks = rows.blocks(), rest = columns.panel_count() / 8;
  const int64_t busy = rows.panels == columns.panels ? (blocks + 1) / 2 : blocks;
  return smaller(workers.count, busy > rest ? busy : rest);
}

// f(I, J, number of the pair) for every pair of blocks I <= J, or, if rows and columns differ, for
// all of them.
template <class T, class F>
void for_block_pairs(BlockPairs& pairs, const Packed<T>& rows, const Packed<T>& columns,
                     const F& f) {
  const int64_t blocks = rows.blocks();
  if (rows.panels != columns.panels) {
    share(pairs.phase, blocks, [&](int64_t I) {
      for (int64_t J = 0; J < columns.blocks(); ++J) f(I, J, I * columns.blocks() + J);
    });
    return;
  }
  PairOrder order{blocks};
  share(pairs.phase, blocks * (blocks + 1) / 2, [&](int64_t t) {
    order.seek(t);
    const int64_t I = order.row(t), J = order.column(t);
    wait_for(pairs.rounds + I, order.round);
    wait_for(pairs.rounds + J, order.round);
    f(I, J, t);
    __atomic_store_n(pairs.rounds + I, order.round + 1, __ATOMIC_RELEASE);
    __atomic_store_n(pairs.rounds + J, order.round + 1, __ATOMIC_RELEASE);
  });
}

// Row-wise arithmetic is in double precision, in eight lanes whatever the instruction set.
constexpr int64_t kDoubles = 8;
typedef double Doubles __attribute__((vector_size(64), aligned(8)));

template <class T>
struct Eight {
  typedef T Type __attribute__((vector_size(8 * sizeof(T)), aligned(sizeof(T))));
};

SIMCLR_INLINE float to_float(Bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

template <class T>
SIMCLR_INLINE Doubles to_doubles(typename Eight<T>::Type v) {
  // GCC would convert two halves and join them, at half the speed. Without the mask it warns of an
  // uninitialised value in its own header.
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Doubles)_mm512_maskz_cvtps_pd(__mmask8(-1), (__m256)v);
#endif
  return __builtin_convertvector(v, Doubles);
}

// The first `count` elements, at most eight; lanes beyond are zero.
template <class T>
SIMCLR_INLINE Doubles load_doubles(const T* p, int64_t count) {
  if (count >= kDoubles) return to_doubles<T>(*reinterpret_cast<const typename Eight<T>::Type*>(p));
  Doubles v{};
  for (int64_t l = 0; l < count; ++l) v[l] = double(p[l]);
  return v;
}

template <class T>
SIMCLR_INLINE void store_doubles(T* p, int64_t count, Doubles v) {
  using Type = typename Eight<T>::Type;
  if (count >= kDoubles)
    *reinterpret_cast<Type*>(p) = __builtin_convertvector(v, Type);
  else
    for (int64_t l = 0; l < count; ++l) p[l] = T(v[l]);
}

SIMCLR_INLINE Doubles load_doubles(const Bf16* p, int64_t count) {
  Doubles v{};
  if (count < kDoubles) {
    for (int64_t l = 0; l < count; ++l) v[l] = double(to_float(p[l]));
    return v;
  }
  Eight<uint16_t>::Type halves;
  __builtin_memcpy(&halves, p, sizeof(halves));
  const Eight<uint32_t>::Type bits = __builtin_convertvector(halves, Eight<uint32_t>::Type) << 16;
  return to_doubles<float>((Eight<float>::Type)bits);
}

// Rounds to the nearest, ties to even. NaN stays NaN.
SIMCLR_INLINE void store_doubles(Bf16* p, int64_t count, Doubles v) {
  const auto floats = __builtin_convertvector(v, Eight<float>::Type);
  const auto bits = (Eight<uint32_t>::Type)floats;
  const Eight<uint32_t>::Type rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto halves = __builtin_convertvector(floats == floats ? rounded : (bits >> 16) | 0x40,
                                              Eight<uint16_t>::Type);
  __builtin_memcpy(p, &halves, size_t(smaller(count, kDoubles)) * sizeof(Bf16));
}

SIMCLR_INLINE double sum_lanes(Doubles v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// f(k, count) for the elements from k on: eight, and at the end of a row the rest.
template <class F>
SIMCLR_INLINE void for_doubles(int64_t dim, const F& f) {
  int64_t k = 0;
  for (; k + kDoubles <= dim; k += kDoubles) f(k, kDoubles);
  if (k < dim) f(k, dim - k);
}

template <class Z>
double dot(const Z* a, const Z* b, int64_t dim) {
  // Four sums, as one would wait for each addition.
  Doubles sums[4] = {};
  int64_t k = 0;
  for (; k + 4 * kDoubles <= dim; k += 4 * kDoubles)
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s)
      sums[s] += load_doubles(a + k + s * kDoubles, kDoubles) *
                 load_doubles(b + k + s * kDoubles, kDoubles);
  for_doubles(dim - k, [&](int64_t from, int64_t count) {
    sums[0] += load_doubles(a + k + from, count) * load_doubles(b + k + from, count);
  });
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class Z>
double norm(const Z* z, int64_t dim) {
  return __builtin_sqrt(dot(z, z, dim));
}

}  // namespace
}  // namespace simclr::SIMCLR_ISA

// NT-Xent on the CPU. Rows are interleaved: rows 2k and 2k+1 are the two views of pair k.
//
// u: rows of length sqrt(log2(e)/temperature), so that x_ij = <u_i, u_j> is the logit in bits.
#pragma once

#include <cstdint>

#include "isa.h"

namespace simclr {

struct Bf16 {
  uint16_t bits;  // the upper half of a float
};

// Rows of several classes, in any order and number. A row's positives are the others of its class.
template <class T>
struct Classes {
  const int32_t* ids = nullptr;      // [total], below total, equal within a class; null: pairs
  const T* inverse_count = nullptr;  // [total], 1 / (a row's positives), 0 without any
};

// Runs body(context, worker) for every worker in [0, count), on as many threads.
struct Workers {
  int64_t count;
  void (*run)(int64_t count, void (*body)(void*, int64_t), void* context);
};

// Memory that lives until the call ends.
struct Workspace {
  void* owner;
  void* (*allocate)(void* owner, int64_t bytes);
};

// Z: what the embeddings and their gradients are; Bf16 if the arithmetic is bfloat16's.
template <class T, class Z = T>
struct NtXentNormalize {
  const Z* z1;  // [rows 0, 2, .., dim]
  const Z* z2;  // [rows 1, 3, .., dim]
  int64_t stride, rows, dim;
  double temperature;
  T* u;         // [rows, dim], a row with NaN or infinity is NaN
  T* inv_norm;  // [rows]
  Workers workers;
};

// How many values 2^x of negatives the forward pass keeps for the backward pass: those of all block
// pairs of csrc/nt_xent_schedule.h; or 0 if that is more than a few times the size of u.
// simclr_fast/ops/nt_xent.py has the same formula.
inline int64_t kept_size(int64_t total, int64_t dim) {
  const int64_t block = total / 10 + 49 < 192 ? total / 10 + 49 : 192;
  return total > 4 * dim ? 0 : (total + block) * (total + 2 * block) / 2;
}

template <class T>
struct NtXentForward {
  const T* u;  // [total, dim]
  int64_t total, dim;
  int64_t row_offset, rows;  // the rows whose loss is wanted; columns are all rows
  double temperature;
  bool decoupled;  // the positive is left out of the denominator
  T* loss;         // [rows]
  double* lse;     // [rows] natural logarithm of the denominator
  T* stats;        // [rows, 4] or null
  Workers workers;
  Workspace workspace;
  Classes<T> classes{};
  T* kept = nullptr;  // [kept_size] or null
  // The rows that u was made of, if the arithmetic is bfloat16's. Then rows = total, no classes.
  const Bf16* z1 = nullptr;     // [total / 2, dim]
  const Bf16* z2 = nullptr;     // [total / 2, dim]
  const T* inv_norm = nullptr;  // [total]
  // Makes u and inv_norm first, or null: they are made. Then rows = total, no classes.
  const NtXentNormalize<T>* normalize = nullptr;
};

template <class T, class Z = T>
struct NtXentBackward {
  const T* grad;  // [total], stride grad_stride (0: one value for all rows)
  int64_t grad_stride;
  double grad_scale;  // multiplies grad
  const T* u;         // [total, dim]
  int64_t total, dim;
  const double* lse;  // [total]
  int64_t row_offset, rows;
  bool decoupled;
  const T* loss;  // [rows]
  const Z* z1;    // [rows / 2, dim], or [rows, dim] of classes
  const Z* z2;    // [rows / 2, dim]
  double temperature;
  Z* grad_z;            // [2, rows / 2, dim], or [rows, dim] of classes
  T* grad_temperature;  // []
  Workers workers;
  Workspace workspace;
  Classes<T> classes{};
  const T* kept = nullptr;      // what the forward pass kept, or null
  const T* inv_norm = nullptr;  // [total], if the arithmetic is bfloat16's. Then rows = total
};

}  // namespace simclr

SIMCLR_DECLARE_ISAS(void, nt_xent_normalize_f32, (const NtXentNormalize<float>& p))
SIMCLR_DECLARE_ISAS(void, nt_xent_normalize_f64, (const NtXentNormalize<double>& p))
SIMCLR_DECLARE_ISAS(void, nt_xent_forward_f32, (const NtXentForward<float>& p))
SIMCLR_DECLARE_ISAS(void, nt_xent_forward_f64, (const NtXentForward<double>& p))
SIMCLR_DECLARE_ISAS(void, nt_xent_backward_f32, (const NtXentBackward<float>& p))
SIMCLR_DECLARE_ISAS(void, nt_xent_backward_f64, (const NtXentBackward<double>& p))

#if defined(SIMCLR_DECLARE_BF16)
SIMCLR_DECLARE_BF16(void, nt_xent_normalize_bf16, (const NtXentNormalize<float, Bf16>& p))
SIMCLR_DECLARE_BF16(void, nt_xent_forward_bf16, (const NtXentForward<float>& p))
SIMCLR_DECLARE_BF16(void, nt_xent_backward_bf16, (const NtXentBackward<float, Bf16>& p))
#endif

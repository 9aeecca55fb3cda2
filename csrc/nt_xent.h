// NT-Xent on the CPU. Rows are interleaved: rows 2k and 2k+1 are the two views of pair k.
//
// u: rows of length sqrt(log2(e)/temperature), so that x_ij = <u_i, u_j> is the logit in bits.
#pragma once

#include <cstdint>

#include "isa.h"

namespace simclr {

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

template <class T>
struct NtXentNormalize {
  const T* z1;  // [pairs, dim] contiguous
  const T* z2;  // [pairs, dim] contiguous
  int64_t pairs, dim;
  double temperature;
  T* u;         // [2 pairs, dim], a row with NaN or infinity is NaN
  T* inv_norm;  // [2 pairs]
  Workers workers;
};

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
};

template <class T>
struct NtXentBackward {
  const T* grad;        // [total], stride grad_stride (0: one value for all rows)
  int64_t grad_stride;
  double grad_scale;    // multiplies grad
  const T* u;           // [total, dim]
  int64_t total, dim;
  const double* lse;    // [total]
  int64_t row_offset, rows;
  bool decoupled;
  const T* loss;        // [rows]
  const T* z1;          // [rows / 2, dim]
  const T* z2;          // [rows / 2, dim]
  double temperature;
  T* grad_z;            // [2, rows / 2, dim]
  T* grad_temperature;  // []
  Workers workers;
  Workspace workspace;
};

}  // namespace simclr

SIMCLR_DECLARE_ISAS(void, nt_xent_normalize_f32, (const NtXentNormalize<float>& p))
SIMCLR_DECLARE_ISAS(void, nt_xent_normalize_f64, (const NtXentNormalize<double>& p))
SIMCLR_DECLARE_ISAS(void, nt_xent_forward_f32, (const NtXentForward<float>& p))
SIMCLR_DECLARE_ISAS(void, nt_xent_forward_f64, (const NtXentForward<double>& p))
SIMCLR_DECLARE_ISAS(void, nt_xent_backward_f32, (const NtXentBackward<float>& p))
SIMCLR_DECLARE_ISAS(void, nt_xent_backward_f64, (const NtXentBackward<double>& p))


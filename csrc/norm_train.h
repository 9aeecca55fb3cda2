// A batch norm in training with a residual and ReLU, and its gradients, on the CPU. No torch, no
// STL. The rows of x are dense, [rows, channels], as those of a tensor in channels_last.
//
//   forward    s_c = Σ (x - shift), q_c = Σ (x - shift)²; norm_act.h makes y from them
//   backward   g = dy where y > 0, else 0 (without ReLU g = dy)
//              s_c = Σ g, q_c = Σ g·(x - mean); then dx = a_c·g + b_c·(x - mean) + d_c
//
// Two passes read x each time; the first of the backward also writes g if the residual needs it.
#pragma once

#include <stdint.h>

#include "isa.h"
#include "norm_act.h"

namespace simclr {

// `units` of `period` values: as many rows as make `period` a multiple of kNormBlock. Rows beyond
// the last whole unit are the last unit, of `rest` values. Arrays of one value per channel repeat
// up to `period`.
struct NormTrain {
  NormActType type;
  // y: null without ReLU, and if dy is g already.
  const void *x, *dy, *y;
  // Written: g (null if nobody needs it) by the sums, dx by the gradient.
  void *g, *dx;
  // The shift of the forward's sums, or the mean.
  const float* shift;
  const float *a, *b, *d;
  int64_t period, units, rest;
};

constexpr int64_t kNormBlock = 32;

}  // namespace simclr

// Adds s and q of the units begin..end-1 to sums, [2, period] doubles.
SIMCLR_DECLARE_ISAS(void, norm_sums,
                    (const ::simclr::NormTrain& p, int64_t begin, int64_t end, double* sums))
SIMCLR_DECLARE_ISAS(void, norm_gradient_sums,
                    (const ::simclr::NormTrain& p, int64_t begin, int64_t end, double* sums))
SIMCLR_DECLARE_ISAS(void, norm_gradient, (const ::simclr::NormTrain& p, int64_t begin, int64_t end))

// LARS: the arithmetic that the CPU and CUDA kernels share. No torch, no STL.
//
// With s = ±1 / grad_scale (minus to maximise), λ the weight decay and r the trust ratio:
//   d = s·g + λ·p                     just s·g if λ = 0, as 0·p is NaN for an infinite p
//   v = μ·v + into·d       into = (1 - dampening)·r, times lr when the momentum order is TF's
//   p = p - out·u          out = lr, or 1 in TF's order;  u = v, or into·d + μ·v with Nesterov
// Norms are sums of squares of p and g (or of d), accumulated in double on the CPU.
#pragma once

#include <math.h>
#include <stdint.h>

#include "isa.h"

#ifdef __CUDACC__
#define SIMCLR_HD __host__ __device__
#else
#define SIMCLR_HD
#endif

namespace simclr {

enum class LarsType : int32_t { f32, f64, f16, bf16 };

// Bits of LarsGroup::flags; simclr_fast/ops/lars.py has the same numbers.
enum LarsFlag : int32_t {
  lars_nesterov = 1,
  lars_maximize = 2,
  lars_adapt = 4,
  lars_clip = 8,
  lars_tf_order = 16,
  lars_joint_norm = 32,
  lars_decay_when_zero = 64,
};

struct LarsGroup {
  double lr, momentum, dampening, weight_decay, trust_coefficient, eps;
  int32_t flags;
};

// One parameter; v is null where its group has no momentum. n > 0.
struct LarsTensor {
  void* p;
  const void* g;
  void* v;
  int64_t n;
  LarsType type;
  int32_t group;
};

struct LarsFactors {
  double grad, decay, into, momentum, out;
};

// p_squares, g_squares: sums of squares of p and of the scaled g (of d when the norm is joint).
// static: a copy per object file, so that none compiled for AVX-512 is linked into the others.
SIMCLR_HD static inline LarsFactors lars_factors(const LarsGroup& group, double lr,
                                                 double inverse_scale, double p_squares,
                                                 double g_squares) {
  const bool joint = group.flags & lars_joint_norm;
  double decay = group.weight_decay;
  double ratio = 1.0;
  bool clip = group.flags & lars_clip;
  if (group.flags & lars_adapt) {
    const double w = sqrt(p_squares);
    const double g = joint ? sqrt(g_squares) : sqrt(g_squares) * fabs(inverse_scale);
    const bool skip = !joint && !(group.flags & lars_decay_when_zero);
    if (skip ? (w != 0.0 && g != 0.0) : (w > 0.0 && g > 0.0)) {
      ratio = group.trust_coefficient * w / (g + (joint ? 0.0 : decay * w) + group.eps);
    } else if (skip) {
      decay = 0.0;
      clip = false;
    }
    if (clip) {
      ratio /= lr;
      // A NaN stays.
      if (ratio > 1.0) ratio = 1.0;
    }
  }
  const bool tf_order = group.flags & lars_tf_order;
  const double sign = (group.flags & lars_maximize) ? -1.0 : 1.0;
  const double damped = group.momentum == 0.0 ? 1.0 : 1.0 - group.dampening;
  return {sign * inverse_scale, decay, damped * ratio * (tf_order ? lr : 1.0), group.momentum,
          tf_order ? 1.0 : lr};
}

}  // namespace simclr

// out = {Σp², Σg²}, or {Σp², Σ(grad·g + decay·p)²} when joint, over n elements.
SIMCLR_DECLARE_ISAS(void, lars_squares,
                    (::simclr::LarsType type, const void* p, const void* g, int64_t n, bool joint,
                     double grad, double decay, double out[2]))

// v may be null (no momentum). p, g and v are dense, of equal layout and any alignment.
SIMCLR_DECLARE_ISAS(void, lars_update,
                    (::simclr::LarsType type, void* p, const void* g, void* v, int64_t n,
                     const ::simclr::LarsFactors& factors, bool nesterov))

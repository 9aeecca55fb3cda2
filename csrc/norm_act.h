// A batch norm with known statistics, a residual and ReLU in one pass, on the CPU. No torch, no
// STL.
//
//   y = act((x - mean)·scale + shift + r),    r = 0, other, or (other - mean')·scale' + shift'
#pragma once

#include <stdint.h>

#include "isa.h"

namespace simclr {

enum class NormActType : int32_t { f32, f64, f16, bf16 };

// A batch norm: arrays of `period` values that repeat along memory, or of one value per channel.
// float, or double for f64. Null: no batch norm.
struct NormActChannels {
  const void *mean, *scale, *shift;
};

// x, other and y have the same dense layout of any alignment; other may be null, y may be x
// or other.
// channels_last: a unit is `period` values, a multiple of the number of channels, and values that
// are `period` apart have the same channel. Otherwise a unit is one channel of one row, `period`
// values of the channel `unit % channels`. The last unit ends at `count`.
struct NormAct {
  NormActType type;
  const void *x, *other;
  void* y;
  NormActChannels own, others;
  bool relu, channels_last;
  int64_t period, channels, count;
};

}  // namespace simclr

// Computes the units begin..end-1.
SIMCLR_DECLARE_ISAS(void, norm_act, (const ::simclr::NormAct& p, int64_t begin, int64_t end))

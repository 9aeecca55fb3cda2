// One pass of a batch norm, residual and ReLU: reads x and other once and writes y once.
//
// Half precision passes through float32 tiles in the first-level cache. Each value is computed
// alone and is rounded once, so the result does not depend on how the units are divided.
#include "half.h"
#include "norm_act.h"

namespace simclr {
namespace SIMCLR_ISA {
namespace {

constexpr int64_t kTile = 1024;

enum class Other { none, plain, norm };

// kLast: one value per element, otherwise one for all.
template <typename T, bool kLast>
struct Channels {
  const T *mean, *scale, *shift;

  Channels(const NormActChannels& from, int64_t offset)
      : mean(at(from.mean, offset)), scale(at(from.scale, offset)), shift(at(from.shift, offset)) {}

  static const T* at(const void* array, int64_t offset) {
    return array ? static_cast<const T*>(array) + offset : nullptr;
  }

  T apply(T x, int64_t i) const {
    const int64_t k = kLast ? i : 0;
    return (x - mean[k]) * scale[k] + shift[k];
  }
};

template <typename T, bool kLast, Other kOther, bool kRelu>
inline void compute(const T* x, const T* other, T* y, int64_t n, const Channels<T, kLast>& own,
                    const Channels<T, kLast>& others) {
  // y may be x: each element is read before it is written.
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T v = own.apply(x[i], i);
    if (kOther == Other::plain) v += other[i];
    if (kOther == Other::norm) v += others.apply(other[i], i);
    // A NaN stays.
    y[i] = kRelu && v < T(0) ? T(0) : v;
  }
}

template <typename T, bool kLast, Other kOther, bool kRelu>
struct Pass {
  static void run(const T* x, const T* other, T* y, int64_t n, const NormAct& p, int64_t channel) {
    compute<T, kLast, kOther, kRelu>(x, other, y, n, Channels<T, kLast>(p.own, channel),
                                     Channels<T, kLast>(p.others, channel));
  }
};

template <typename H, bool kLast, Other kOther, bool kRelu>
struct HalfPass {
  static void run(const H* x, const H* other, H* y, int64_t n, const NormAct& p, int64_t channel) {
    float x_tile[kTile], other_tile[kTile];
    for (int64_t i = 0; i < n; i += kTile) {
      const int64_t count = n - i < kTile ? n - i : kTile;
      widen(x + i, count, x_tile);
      if (kOther != Other::none) widen(other + i, count, other_tile);
      const int64_t first = kLast ? channel + i : channel;
      compute<float, kLast, kOther, kRelu>(x_tile, other_tile, x_tile, count,
                                           Channels<float, kLast>(p.own, first),
                                           Channels<float, kLast>(p.others, first));
      narrow(x_tile, count, y + i);
    }
  }
};

template <typename T, typename Way>
void units(const NormAct& p, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x);
  const T* other = static_cast<const T*>(p.other);
  T* y = static_cast<T*>(p.y);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t first = unit * p.period, rest = p.count - first;
    Way::run(x + first, other ? other + first : nullptr, y + first,
             rest < p.period ? rest : p.period, p, p.channels_last ? 0 : unit % p.channels);
  }
}

template <template <typename, bool, Other, bool> class Way, typename T, bool kLast, Other kOther>
void with_act(const NormAct& p, int64_t begin, int64_t end) {
  if (p.relu)
    units<T, Way<T, kLast, kOther, true>>(p, begin, end);
  else
    units<T, Way<T, kLast, kOther, false>>(p, begin, end);
}

template <template <typename, bool, Other, bool> class Way, typename T, bool kLast>
void with_other(const NormAct& p, int64_t begin, int64_t end) {
  if (!p.other)
    with_act<Way, T, kLast, Other::none>(p, begin, end);
  else if (!p.others.mean)
    with_act<Way, T, kLast, Other::plain>(p, begin, end);
  else
    with_act<Way, T, kLast, Other::norm>(p, begin, end);
}

template <template <typename, bool, Other, bool> class Way, typename T>
void with_layout(const NormAct& p, int64_t begin, int64_t end) {
  if (p.channels_last)
    with_other<Way, T, true>(p, begin, end);
  else
    with_other<Way, T, false>(p, begin, end);
}

}  // namespace

void norm_act(const NormAct& p, int64_t begin, int64_t end) {
  switch (p.type) {
    case NormActType::f32:
      return with_layout<Pass, float>(p, begin, end);
    case NormActType::f64:
      return with_layout<Pass, double>(p, begin, end);
    case NormActType::f16:
      return with_layout<HalfPass, Half>(p, begin, end);
    case NormActType::bf16:
      return with_layout<HalfPass, Bfloat16>(p, begin, end);
  }
}

}  // namespace SIMCLR_ISA
}  // namespace simclr

// The passes of a batch norm in training. norm_train.h says what they compute.
//
// A block is kNormBlock neighbouring values of a unit: its sums stay in registers over some units,
// in float32, and are then added to doubles. Half precision is widened block by block.
#include "half.h"
#include "norm_train.h"

namespace simclr {
namespace SIMCLR_ISA {
namespace {

constexpr int64_t kBlock = kNormBlock;
// Units whose float32 sums are added to a double at a time.
constexpr int64_t kRun = 64;

inline const float* block(const float* x, float*) { return x; }

template <typename H>
inline const float* block(const H* x, float* tile) {
  widen(x, kBlock, tile);
  return tile;
}

inline float value(const float* x) { return *x; }

template <typename H>
inline float value(const H* x) {
  return widen(*x);
}

inline void store(const float* from, float* to) {
  for (int64_t i = 0; i < kBlock; ++i) to[i] = from[i];
}

template <typename H>
inline void store(const float* from, H* to) {
  narrow(from, kBlock, to);
}

inline void store_one(float from, float* to) { *to = from; }

template <typename H>
inline void store_one(float from, H* to) {
  narrow(from, to);
}

// Calls way.block(unit's first value, first value in the unit) for whole units, in runs, and
// way.one(place, place in the unit) for the values of the last unit.
template <typename Way>
inline void sum(const NormTrain& p, int64_t begin, int64_t end, double* sums, const Way& way) {
  const int64_t whole = end < p.units ? end : p.units;
  for (int64_t first = begin; first < whole; first += kRun) {
    const int64_t last = first + kRun < whole ? first + kRun : whole;
    for (int64_t j = 0; j < p.period; j += kBlock) {
      float s[kBlock] = {}, q[kBlock] = {};
      for (int64_t unit = first; unit < last; ++unit) way.block(unit * p.period + j, j, s, q);
      for (int64_t i = 0; i < kBlock; ++i) {
        sums[j + i] += s[i];
        sums[p.period + j + i] += q[i];
      }
    }
  }
  if (end <= p.units) return;
  for (int64_t i = 0; i < p.rest; ++i) {
    float s = 0, q = 0;
    way.one(p.units * p.period + i, i, s, q);
    sums[i] += s;
    sums[p.period + i] += q;
  }
}

template <typename T>
struct Moments {
  const T* x;
  const float* shift;

  void block(int64_t at, int64_t j, float* s, float* q) const {
    float tile[kBlock];
    const float* v = SIMCLR_ISA::block(x + at, tile);
    for (int64_t i = 0; i < kBlock; ++i) {
      const float a = v[i] - shift[j + i];
      s[i] += a;
      q[i] += a * a;
    }
  }

  void one(int64_t at, int64_t i, float& s, float& q) const {
    const float a = value(x + at) - shift[i];
    s = a, q = a * a;
  }
};

template <typename T, bool kRelu, bool kKeep>
struct Gradients {
  const T *x, *dy, *y;
  T* g;
  const float* mean;

  void block(int64_t at, int64_t j, float* s, float* q) const {
    float x_tile[kBlock], dy_tile[kBlock], y_tile[kBlock], made[kBlock];
    const float* v = SIMCLR_ISA::block(x + at, x_tile);
    const float* d = SIMCLR_ISA::block(dy + at, dy_tile);
    const float* out = kRelu ? SIMCLR_ISA::block(y + at, y_tile) : d;
    for (int64_t i = 0; i < kBlock; ++i) {
      made[i] = kRelu && out[i] <= 0.0f ? 0.0f : d[i];
      s[i] += made[i];
      q[i] += made[i] * (v[i] - mean[j + i]);
    }
    if (kKeep) store(made, g + at);
  }

  void one(int64_t at, int64_t i, float& s, float& q) const {
    s = kRelu && value(y + at) <= 0.0f ? 0.0f : value(dy + at);
    q = s * (value(x + at) - mean[i]);
    if (kKeep) store_one(s, g + at);
  }
};

template <typename T, bool kRelu>
void gradient(const NormTrain& p, int64_t begin, int64_t end) {
  const T *x = static_cast<const T*>(p.x), *dy = static_cast<const T*>(p.dy);
  const T* y = static_cast<const T*>(p.y);
  T* dx = static_cast<T*>(p.dx);
  const int64_t whole = end < p.units ? end : p.units;
  for (int64_t unit = begin; unit < whole; ++unit) {
    for (int64_t j = 0; j < p.period; j += kBlock) {
      const int64_t at = unit * p.period + j;
      float x_tile[kBlock], dy_tile[kBlock], y_tile[kBlock], made[kBlock];
      const float* v = block(x + at, x_tile);
      const float* d = block(dy + at, dy_tile);
      const float* out = kRelu ? block(y + at, y_tile) : d;
      const float *a = p.a + j, *b = p.b + j, *c = p.d + j, *mean = p.shift + j;
      for (int64_t i = 0; i < kBlock; ++i) {
        const float g = kRelu && out[i] <= 0.0f ? 0.0f : d[i];
        made[i] = a[i] * g + (b[i] * (v[i] - mean[i]) + c[i]);
      }
      store(made, dx + at);
    }
  }
  if (end <= p.units) return;
  for (int64_t i = 0; i < p.rest; ++i) {
    const int64_t at = p.units * p.period + i;
    const float g = kRelu && value(y + at) <= 0.0f ? 0.0f : value(dy + at);
    store_one(p.a[i] * g + (p.b[i] * (value(x + at) - p.shift[i]) + p.d[i]), dx + at);
  }
}

template <typename T>
void moments(const NormTrain& p, int64_t begin, int64_t end, double* sums) {
  sum(p, begin, end, sums, Moments<T>{static_cast<const T*>(p.x), p.shift});
}

template <typename T, bool kRelu, bool kKeep>
void gradients(const NormTrain& p, int64_t begin, int64_t end, double* sums) {
  sum(p, begin, end, sums,
      Gradients<T, kRelu, kKeep>{static_cast<const T*>(p.x), static_cast<const T*>(p.dy),
                                 static_cast<const T*>(p.y), static_cast<T*>(p.g), p.shift});
}

template <typename T>
void gradients(const NormTrain& p, int64_t begin, int64_t end, double* sums) {
  if (!p.y) return gradients<T, false, false>(p, begin, end, sums);
  if (p.g) return gradients<T, true, true>(p, begin, end, sums);
  gradients<T, true, false>(p, begin, end, sums);
}

template <typename T>
void gradient(const NormTrain& p, int64_t begin, int64_t end) {
  if (p.y)
    gradient<T, true>(p, begin, end);
  else
    gradient<T, false>(p, begin, end);
}

}  // namespace

void norm_sums(const NormTrain& p, int64_t begin, int64_t end, double* sums) {
  switch (p.type) {
    case NormActType::f16:
      return moments<Half>(p, begin, end, sums);
    case NormActType::bf16:
      return moments<Bfloat16>(p, begin, end, sums);
    default:
      return moments<float>(p, begin, end, sums);
  }
}

void norm_gradient_sums(const NormTrain& p, int64_t begin, int64_t end, double* sums) {
  switch (p.type) {
    case NormActType::f16:
      return gradients<Half>(p, begin, end, sums);
    case NormActType::bf16:
      return gradients<Bfloat16>(p, begin, end, sums);
    default:
      return gradients<float>(p, begin, end, sums);
  }
}

void norm_gradient(const NormTrain& p, int64_t begin, int64_t end) {
  switch (p.type) {
    case NormActType::f16:
      return gradient<Half>(p, begin, end);
    case NormActType::bf16:
      return gradient<Bfloat16>(p, begin, end);
    default:
      return gradient<float>(p, begin, end);
  }
}

}  // namespace SIMCLR_ISA
}  // namespace simclr

// LARS on the CPU: sums of squares and the update of one piece of one tensor.
//
// Memory per element: the sums read p and g; the update reads p, g, v and writes p, v. One core
// reads faster from several places at once, so a piece is processed as four quarters side by side,
// and the cache lines of the next iterations are prefetched. Half precision passes through float32
// tiles in the first-level cache. Sums are taken in double, in which the square of a float32 is
// exact. So they do not depend on the instruction set.
#include "lars.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "half.h"

namespace simclr {
namespace SIMCLR_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kDoubles = kBytes / 8;
// Elements processed together. Element i of a quarter is added in lane i % kBlock.
constexpr int kBlock = 16;
constexpr int kRegisters = kBlock / kDoubles;
constexpr int kStreams = 4;
constexpr int64_t kTile = 1024;

typedef double Doubles __attribute__((vector_size(kBytes)));
typedef float HalfFloats __attribute__((vector_size(kBytes / 2)));
template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(kBytes)));
};

inline Doubles load(const double* x) {
  Doubles v;
  __builtin_memcpy(&v, x, sizeof(v));
  return v;
}

inline Doubles load(const float* x) {
  // gcc would convert two halves and join them, at half the speed.
#if defined(__AVX512F__)
  return _mm512_cvtps_pd(_mm256_loadu_ps(x));
#elif defined(__AVX__)
  return _mm256_cvtps_pd(_mm_loadu_ps(x));
#else
  HalfFloats v;
  __builtin_memcpy(&v, x, sizeof(v));
  return __builtin_convertvector(v, Doubles);
#endif
}

template <typename T>
inline void prefetch(const T* x) {
  constexpr int64_t kAhead = 2048 / sizeof(T);
  for (int64_t line = 0; line < kBlock; line += 64 / sizeof(T))
    __builtin_prefetch(x + kAhead + line);
}

struct Sums {
  double p = 0.0, g = 0.0;
};

inline double total(const Doubles* lanes) {
  double flat[kBlock];
  __builtin_memcpy(flat, lanes, sizeof(flat));
  for (int half = kBlock / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) flat[i] += flat[i + half];
  return flat[0];
}

struct Joint {
  bool use;
  double grad, decay;
};

template <bool kJoint, typename T>
inline void add_block(const T* p, const T* g, const Joint& joint, Doubles* p_lanes,
                      Doubles* g_lanes) {
#pragma GCC unroll 8
  for (int r = 0; r < kRegisters; ++r) {
    const Doubles x = load(p + r * kDoubles);
    Doubles y = load(g + r * kDoubles);
    if (kJoint) y = joint.grad * y + joint.decay * x;
    p_lanes[r] += x * x;
    g_lanes[r] += y * y;
  }
}

template <bool kJoint, typename T>
Sums squares_of(const T* p, const T* g, int64_t n, const Joint& joint) {
  Doubles p_lanes[kRegisters] = {}, g_lanes[kRegisters] = {};
  const int64_t quarter = n / (kStreams * kBlock) * kBlock;
  for (int64_t i = 0; i < quarter; i += kBlock)
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const int64_t k = s * quarter + i;
      prefetch(p + k);
      prefetch(g + k);
      add_block<kJoint>(p + k, g + k, joint, p_lanes, g_lanes);
    }
  int64_t i = kStreams * quarter;
  for (; i + kBlock <= n; i += kBlock) add_block<kJoint>(p + i, g + i, joint, p_lanes, g_lanes);
  if (i < n) {
    T p_tail[kBlock] = {}, g_tail[kBlock] = {};
    for (int64_t j = i; j < n; ++j) p_tail[j - i] = p[j], g_tail[j - i] = g[j];
    add_block<kJoint>(p_tail, g_tail, joint, p_lanes, g_lanes);
  }
  return {total(p_lanes), total(g_lanes)};
}

template <typename T>
Sums squares(const T* p, const T* g, int64_t n, const Joint& joint) {
  return joint.use ? squares_of<true>(p, g, n, joint) : squares_of<false>(p, g, n, joint);
}

template <typename T>
Sums squares_of_halves(const T* p, const T* g, int64_t n, const Joint& joint) {
  float p_tile[kTile], g_tile[kTile];
  Sums sums;
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t count = n - i < kTile ? n - i : kTile;
    widen(p + i, count, p_tile);
    widen(g + i, count, g_tile);
    const Sums tile = squares(p_tile, g_tile, count, joint);
    sums.p += tile.p;
    sums.g += tile.g;
  }
  return sums;
}

template <typename T>
struct Scalars {
  T grad, decay, into, momentum, out;
};

template <bool kDecay, bool kMomentum, bool kNesterov, typename T>
inline void update_block(T* p, const T* g, T* v, const Scalars<T>& f) {
  typedef typename Vector<T>::type V;
#pragma GCC unroll 8
  for (size_t i = 0; i < kBlock; i += kBytes / sizeof(T)) {
    V weight, grad, buffer;
    __builtin_memcpy(&weight, p + i, kBytes);
    __builtin_memcpy(&grad, g + i, kBytes);
    V d = f.grad * grad;
    // Without decay an infinite weight must not enter as 0·inf.
    if (kDecay) d += f.decay * weight;
    d *= f.into;
    V u = d;
    if (kMomentum) {
      __builtin_memcpy(&buffer, v + i, kBytes);
      buffer = f.momentum * buffer + d;
      __builtin_memcpy(v + i, &buffer, kBytes);
      u = kNesterov ? f.momentum * buffer + d : buffer;
    }
    weight -= f.out * u;
    __builtin_memcpy(p + i, &weight, kBytes);
  }
}

template <bool kDecay, bool kMomentum, bool kNesterov, typename T>
void update_with(T* p, const T* g, T* v, int64_t n, const LarsFactors& factors) {
  const Scalars<T> f = {static_cast<T>(factors.grad), static_cast<T>(factors.decay),
                        static_cast<T>(factors.into), static_cast<T>(factors.momentum),
                        static_cast<T>(factors.out)};
  const auto block = [&](int64_t i) {
    update_block<kDecay, kMomentum, kNesterov>(p + i, g + i, kMomentum ? v + i : v, f);
  };
  const int64_t quarter = n / (kStreams * kBlock) * kBlock;
  for (int64_t i = 0; i < quarter; i += kBlock)
#pragma GCC unroll 4
    for (int s = 0; s < kStreams; ++s) {
      const int64_t k = s * quarter + i;
      prefetch(p + k);
      prefetch(g + k);
      if (kMomentum) prefetch(v + k);
      block(k);
    }
  int64_t i = kStreams * quarter;
  for (; i + kBlock <= n; i += kBlock) block(i);
  if (i < n) {
    const int64_t rest = n - i;
    T p_tail[kBlock] = {}, g_tail[kBlock] = {}, v_tail[kBlock] = {};
    for (int64_t j = 0; j < rest; ++j) {
      p_tail[j] = p[i + j], g_tail[j] = g[i + j];
      if (kMomentum) v_tail[j] = v[i + j];
    }
    update_block<kDecay, kMomentum, kNesterov>(p_tail, g_tail, v_tail, f);
    for (int64_t j = 0; j < rest; ++j) {
      p[i + j] = p_tail[j];
      if (kMomentum) v[i + j] = v_tail[j];
    }
  }
}

template <bool kDecay, typename T>
void update_decayed(T* p, const T* g, T* v, int64_t n, const LarsFactors& f, bool nesterov) {
  if (!v)
    update_with<kDecay, false, false>(p, g, v, n, f);
  else if (nesterov)
    update_with<kDecay, true, true>(p, g, v, n, f);
  else
    update_with<kDecay, true, false>(p, g, v, n, f);
}

template <typename T>
void update(T* p, const T* g, T* v, int64_t n, const LarsFactors& f, bool nesterov) {
  if (f.decay != 0.0)
    update_decayed<true>(p, g, v, n, f, nesterov);
  else
    update_decayed<false>(p, g, v, n, f, nesterov);
}

template <typename T>
void update_halves(T* p, const T* g, T* v, int64_t n, const LarsFactors& f, bool nesterov) {
  float p_tile[kTile], g_tile[kTile], v_tile[kTile];
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t count = n - i < kTile ? n - i : kTile;
    widen(p + i, count, p_tile);
    widen(g + i, count, g_tile);
    if (v) widen(v + i, count, v_tile);
    update<float>(p_tile, g_tile, v ? v_tile : nullptr, count, f, nesterov);
    narrow(p_tile, count, p + i);
    if (v) narrow(v_tile, count, v + i);
  }
}

}  // namespace

void lars_squares(LarsType type, const void* p, const void* g, int64_t n, bool joint, double grad,
                  double decay, double out[2]) {
  const bool both = joint && decay != 0.0;
  const Joint how = {both, grad, decay};
  Sums sums;
#define SIMCLR_SQUARES(function, T) \
  sums = function(static_cast<const T*>(p), static_cast<const T*>(g), n, how)
  switch (type) {
    case LarsType::f32:
      SIMCLR_SQUARES(squares, float);
      break;
    case LarsType::f64:
      SIMCLR_SQUARES(squares, double);
      break;
    case LarsType::f16:
      SIMCLR_SQUARES(squares_of_halves, Half);
      break;
    case LarsType::bf16:
      SIMCLR_SQUARES(squares_of_halves, Bfloat16);
      break;
  }
#undef SIMCLR_SQUARES
  out[0] = sums.p;
  out[1] = joint && !both ? grad * grad * sums.g : sums.g;
}

void lars_update(LarsType type, void* p, const void* g, void* v, int64_t n,
                 const LarsFactors& factors, bool nesterov) {
#define SIMCLR_UPDATE(function, T) \
  function(static_cast<T*>(p), static_cast<const T*>(g), static_cast<T*>(v), n, factors, nesterov)
  switch (type) {
    case LarsType::f32:
      SIMCLR_UPDATE(update, float);
      break;
    case LarsType::f64:
      SIMCLR_UPDATE(update, double);
      break;
    case LarsType::f16:
      SIMCLR_UPDATE(update_halves, Half);
      break;
    case LarsType::bf16:
      SIMCLR_UPDATE(update_halves, Bfloat16);
      break;
  }
#undef SIMCLR_UPDATE
}

}  // namespace SIMCLR_ISA
}  // namespace simclr

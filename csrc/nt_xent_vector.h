// Vectors of one instruction set, the shapes of the register tiles, and 2^x.
#pragma once

#include <cstdint>

#if defined(__AVX512F__)
#define SIMCLR_VECTOR_BYTES 64
#elif defined(__AVX__)
#define SIMCLR_VECTOR_BYTES 32
#else
#define SIMCLR_VECTOR_BYTES 16
#endif
#define SIMCLR_INLINE inline __attribute__((always_inline))
// Vectors wider than a register are passed to inlined functions only.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace simclr::SIMCLR_ISA {
namespace {

template <class T>
struct Lanes;

template <>
struct Lanes<float> {
  using Bits = int32_t;
  typedef float Vec __attribute__((vector_size(SIMCLR_VECTOR_BYTES), aligned(4)));
  typedef int32_t IntVec __attribute__((vector_size(SIMCLR_VECTOR_BYTES), aligned(4)));
  typedef uint32_t UintVec __attribute__((vector_size(SIMCLR_VECTOR_BYTES), aligned(4)));
  static constexpr int mantissa_bits = 23;
  static constexpr float max_exponent = 126;
  // 2^r on [-1/2, 1/2], minimax, absolute error 8e-8.
  static constexpr int terms = 6;
  static constexpr float exp2[terms] = {1.00000007545489719f,  0.693147188026228781f,
                                        0.240221074853083375f, 0.0555035711421907782f,
                                        0.00967603191832205f,  0.00133908633646712344f};
};

template <>
struct Lanes<double> {
  using Bits = int64_t;
  typedef double Vec __attribute__((vector_size(SIMCLR_VECTOR_BYTES), aligned(8)));
  typedef int64_t IntVec __attribute__((vector_size(SIMCLR_VECTOR_BYTES), aligned(8)));
  typedef uint64_t UintVec __attribute__((vector_size(SIMCLR_VECTOR_BYTES), aligned(8)));
  static constexpr int mantissa_bits = 52;
  static constexpr double max_exponent = 1022;
  // Absolute error 3e-18.
  static constexpr int terms = 12;
  static constexpr double exp2[terms] = {
      0.999999999999999997,    0.693147180559945309,     0.240226506959101596,
      0.055504108664821627,    0.00961812910758725667,   0.00133335581464064707,
      0.000154035304637243542, 0.0000152527338415567726, 1.32154325359123762e-6,
      1.01780570877339411e-7,  7.07419429728852101e-9,   4.45581790833606449e-10};
};

template <class T>
using Vec = typename Lanes<T>::Vec;

template <class T>
constexpr int kLanes = SIMCLR_VECTOR_BYTES / sizeof(T);

// Register tiles. Similarities: kTileRows rows × kTileVecs vectors; products with W: kProductRows ×
// kProductVecs. The accumulators, one row of operands and a broadcast fit the registers, of which
// AVX-512 and arm64 have 32, the others 16.
#if defined(SIMCLR_AMX)
// Four tiles of 16 × 16, which come from memory.
template <class T>
constexpr int kTileRows = 32;
constexpr int kProductVecs = 256 / SIMCLR_VECTOR_BYTES;
#elif defined(__AVX512F__)
template <class T>
constexpr int kTileRows = 8;
constexpr int kProductVecs = 4;
#elif defined(__aarch64__)
template <class T>
constexpr int kTileRows = 6;
constexpr int kProductVecs = 4;
#else
template <class T>
constexpr int kTileRows = kLanes<T> > 2 ? 4 : 2;
constexpr int kProductVecs = 2;
#endif
#if defined(SIMCLR_AMX)
constexpr int kTileVecs = 128 / SIMCLR_VECTOR_BYTES;
#else
constexpr int kTileVecs = 3;
#endif
constexpr int kProductRows = 6;

// Rows that are packed together: the columns of a register tile.
template <class T>
constexpr int kPanel = kTileVecs * kLanes<T>;

template <class T>
SIMCLR_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}

template <class T>
SIMCLR_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}

template <class T>
SIMCLR_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

// Keeps the compiler from loading and broadcasting again for every use.
template <class T>
SIMCLR_INLINE Vec<T> in_register(Vec<T> v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

template <class T>
SIMCLR_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// 2^x for |x| <= max_exponent: adding 1.5·2^mantissa rounds x to an integer in the low bits.
template <class T>
SIMCLR_INLINE Vec<T> exp2_in_range(Vec<T> x) {
  using L = Lanes<T>;
  using Bits = typename L::UintVec;
  const T magic = T(int64_t(3) << (L::mantissa_bits - 1));
  const Vec<T> shifted = x + magic;
  const Vec<T> r = x - (shifted - magic);
  Vec<T> p = broadcast<T>(L::exp2[L::terms - 1]);
#pragma GCC unroll 12
  for (int k = L::terms - 2; k >= 0; --k) p = p * r + L::exp2[k];
  return (Vec<T>)((Bits)p + ((Bits)shifted << L::mantissa_bits));
}

// 2^x for x <= max_exponent, 0 where it would be subnormal.
template <class T>
SIMCLR_INLINE Vec<T> exp2_or_zero(Vec<T> x) {
  const Vec<T> lowest = broadcast<T>(-Lanes<T>::max_exponent);
  return x < lowest ? Vec<T>{} : exp2_in_range<T>(maximum<T>(x, lowest));
}

}  // namespace
}  // namespace simclr::SIMCLR_ISA

// float16 and bfloat16 as bits, and their conversion to float32 and back, which rounds to nearest
// even. For the kernels that SIMCLR_ISA names; no torch, no STL.
#pragma once

#include <stdint.h>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace simclr {
namespace SIMCLR_ISA {
namespace {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

inline float from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}

inline float widen(Bfloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

inline void narrow(float x, Bfloat16* out) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out->bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

// Shifting the exponent and mantissa into place and scaling by 2^112 is exact, subnormals included.
inline float widen(Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const float value = from_bits(magnitude) * 0x1p112f;
  // Infinity and NaN keep an exponent of all ones.
  const uint32_t special = value >= 65536.0f ? 0x7f800000u : 0u;
  return from_bits(to_bits(value) | special | sign);
}

// Round to nearest even: adding 2^13 times the exponent's unit drops the bits below the last place.
inline void narrow(float x, Half* out) {
  const uint32_t sign = to_bits(x) & 0x80000000u;
  const uint32_t magnitude = to_bits(x) ^ sign;
  uint32_t exponent = magnitude & 0x7f800000u;
  // The last place of every subnormal is that of the smallest normal, 2^-14.
  if (exponent < 0x38800000u) exponent = 0x38800000u;
  const float unit = from_bits(exponent + (13u << 23));
  const float rounded = (from_bits(magnitude) + unit) - unit;
  uint32_t bits = to_bits(rounded * 0x1p-112f) >> 13;
  if (magnitude >= 0x477ff000u) bits = 0x7c00;
  if (magnitude > 0x7f800000u) bits = 0x7e00;
  out->bits = static_cast<uint16_t>(bits | (sign >> 16));
}

template <typename T>
inline void widen(const T* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = widen(x[i]);
}

template <typename T>
inline void narrow(const float* x, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) narrow(x[i], out + i);
}

#ifdef __F16C__
template <>
inline void widen(const Half* x, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  for (; i < n; ++i) out[i] = widen(x[i]);
}

template <>
inline void narrow(const float* x, int64_t n, Half* out) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) narrow(x[i], out + i);
}
#endif

}  // namespace
}  // namespace SIMCLR_ISA
}  // namespace simclr

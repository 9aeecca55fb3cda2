// L floats as one vector of the instruction set being compiled for, by the compilers' vector
// extensions; intrinsics only where those compile badly (widening bytes, narrowing to 16 bits).
#pragma once

#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "isa.h"

namespace simclr::SIMCLR_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int L = 16;
#elif defined(__AVX2__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif
typedef float V __attribute__((vector_size(4 * L)));
typedef int32_t I __attribute__((vector_size(4 * L)));

inline V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }
inline V load_pixels(const float* p) { return load(p); }
inline V load_pixels(const uint8_t* p) {
#if defined(__AVX512F__)
  return (V)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (V)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return V{float(p[0]), float(p[1]), float(p[2]), float(p[3])};
#endif
}
inline V min(V a, V b) { return a < b ? a : b; }
inline V max(V a, V b) { return a > b ? a : b; }
inline V clip(V x) { return min(max(x, V{}), V{} + 1.0f); }
inline V luma(V r, V g, V b) { return 0.2989f * r + 0.587f * g + 0.114f * b; }
inline int64_t round_up(int64_t n) { return (n + 15) / 16 * 16; }

// ---- transpose of L vectors: log2(L) perfect shuffles of the L·L elements
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (I){__VA_ARGS__})
#endif
#if defined(__AVX512F__)
inline V low(V a, V b) {
  return SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}
inline V high(V a, V b) {
  return SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}
#elif defined(__AVX2__)
inline V low(V a, V b) { return SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
inline V high(V a, V b) { return SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
#else
inline V low(V a, V b) { return SHUFFLE(a, b, 0, 4, 1, 5); }
inline V high(V a, V b) { return SHUFFLE(a, b, 2, 6, 3, 7); }
#endif
inline void transpose(V* a) {
  V b[L];
#pragma GCC unroll 4
  for (int stage = 1; stage < L; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      b[2 * i] = low(a[i], a[i + L / 2]);
      b[2 * i + 1] = high(a[i], a[i + L / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) a[i] = b[i];
  }
}

// ---- 16-bit output
// Round to nearest even by integer arithmetic.
inline I bfloat16_bits(V x) {
  I bits;
  memcpy(&bits, &x, sizeof bits);
  return ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) & 0xffff;
}
#if !defined(__F16C__)
inline I float16_bits(V x) {
  I bits;
  memcpy(&bits, &x, sizeof bits);
  const I sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  // Adding 0.5 aligns a half-precision subnormal's last bit with a float's.
  V shifted;
  memcpy(&shifted, &magnitude, sizeof shifted);
  shifted = shifted + 0.5f;
  I subnormal;
  memcpy(&subnormal, &shifted, sizeof subnormal);
  subnormal -= 0x3f000000;
  const I normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const I half = magnitude < 0x38800000 ? subnormal : normal;
  return (half > 0x7c00 ? (I{} + 0x7c00) : half) | sign;
}
#endif
inline void store_low16(uint16_t* p, I bits) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)bits));
#elif defined(__AVX2__)
  const __m256i v = (__m256i)bits;
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storeu_si128((__m128i*)p, packed);
#else
  for (int i = 0; i < L; ++i) p[i] = uint16_t(bits[i]);
#endif
}
inline void store_bfloat16(uint16_t* p, V v) { store_low16(p, bfloat16_bits(v)); }
inline void store_float16(uint16_t* p, V v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  store_low16(p, float16_bits(v));
#endif
}

}  // namespace
}  // namespace simclr::SIMCLR_ISA

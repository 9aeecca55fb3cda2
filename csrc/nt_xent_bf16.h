// Operands of bfloat16 for NT-Xent on CPUs that multiply them in hardware, compiled with
// SIMCLR_BF16 defined; with SIMCLR_AMX for AMX, otherwise for AVX512_BF16.
//
// The inputs are bfloat16 themselves, so no similarity is rounded: a row z is multiplied by the
// power of two p for which its length is from 1 to 2, which is exact, and x_ij = <p_i z_i, p_j
// z_j>·s_i·s_j with s = sqrt(log2(e)/temperature) / |p z|. The weights W of the backward pass are
// rounded to bfloat16, after the s of the row that they multiply.
//
// Two neighbouring values fill the bits of one float ("pair"), the first in the lower half: the
// instructions multiply a pair by a pair and add both products.
#pragma once

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "nt_xent_schedule.h"

namespace simclr::SIMCLR_ISA {
namespace {

using Bits = Lanes<float>::UintVec;
constexpr int64_t kPairLanes = kLanes<float>;

#if defined(SIMCLR_AMX)
// Pairs of a tile's row: its depth is 2·16 values.
constexpr int64_t kDepthStep = 16;
#else
constexpr int64_t kDepthStep = 1;
#endif

// A pair in every lane.
SIMCLR_INLINE Vec<float> broadcast_operand(const float& pair) {
  uint32_t bits;
  __builtin_memcpy(&bits, &pair, sizeof(bits));
  return (Vec<float>)(Bits{} + bits);
}

// sum + the products of both halves.
template <class T>
SIMCLR_INLINE Vec<T> multiply_add(Vec<T> sum, Vec<T> a, Vec<T> b) {
#if defined(__AVX512BF16__)
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  const Bits upper = Bits{} + 0xffff0000u;
  sum += (Vec<float>)((Bits)a & upper) * (Vec<float>)((Bits)b & upper);
  return sum + (Vec<float>)((Bits)a << 16) * (Vec<float>)((Bits)b << 16);
#endif
}

// The bits of bfloat16 in the lower halves, rounded to the nearest, ties to even.
SIMCLR_INLINE Bits round_to_bf16(Vec<float> v) {
#if defined(__AVX512BF16__)
  return (Bits)_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return v == v ? rounded : (bits >> 16) | 0x40;
#endif
}

// Stores kLanes values rounded to bfloat16.
SIMCLR_INLINE void store_rounded(uint16_t* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  const Bits bits = round_to_bf16(v);
  for (int l = 0; l < kLanes<float>; ++l) p[l] = uint16_t(bits[l]);
#endif
}

// 2^exponent, a normal number.
inline float power_of_two(int exponent) {
  const uint32_t bits = uint32_t(exponent + 127) << 23;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

// Copies a row times `power` as pairs, with zeros up to `depth` pairs.
inline void scale_row(const Bf16* z, int64_t dim, float power, int64_t depth, float* out) {
  const Bits upper = Bits{} + 0xffff0000u;
  for (int64_t k = 0; k < depth; k += kPairLanes) {
    Bits pairs{};
    const int64_t values = smaller(2 * kPairLanes, dim - 2 * k);
    if (values == 2 * kPairLanes)
      __builtin_memcpy(&pairs, z + 2 * k, sizeof(pairs));
    else if (values > 0)
      __builtin_memcpy(&pairs, z + 2 * k, size_t(values) * sizeof(Bf16));
    const Vec<float> first = (Vec<float>)(pairs << 16) * power;
    const Vec<float> second = (Vec<float>)(pairs & upper) * power;
    const Bits scaled = ((Bits)first >> 16) | ((Bits)second & upper);
    if (depth - k >= kPairLanes)
      store(out + k, (Vec<float>)scaled);
    else
      __builtin_memcpy(out + k, &scaled, size_t(depth - k) * sizeof(float));
  }
}

inline int64_t pair_depth(int64_t dim) { return round_up((dim + 1) / 2, kDepthStep); }

inline Packed<float> allocate_views(int64_t total, int64_t dim, int64_t block,
                                    const Workspace& workspace) {
  const int64_t depth = pair_depth(dim), padded = round_up(total, kPanel<float>);
  Packed<float> packed = allocate_panels<float>(0, total, depth, block, 1, workspace);
  packed.by_row = allocate<float>(workspace, padded * depth);
  packed.scale = allocate<float>(workspace, padded);
  return packed;
}

// Packs z, whose rows are interleaved. finite becomes false if a row holds NaN or infinity.
inline void pack_views(Phase& phase, const Bf16* z1, const Bf16* z2, const float* inv_norm,
                       const Packed<float>& packed, int64_t dim, double temperature, bool* finite) {
  constexpr int64_t panel = kPanel<float>;
  const int64_t depth = packed.depth;
  const double unit = __builtin_sqrt(kLog2E / temperature);
  share(phase, packed.panel_count(), [&](int64_t p) {
    for (int64_t row = p * panel; row < (p + 1) * panel; ++row) {
      float* out = packed.by_row + row * depth;
      packed.scale[row] = 0;
      if (row >= packed.count) {
        __builtin_memset(out, 0, size_t(depth) * sizeof(float));
        continue;
      }
      if (!(inv_norm[row] - inv_norm[row] == 0)) __atomic_store_n(finite, false, __ATOMIC_RELAXED);
      const Bf16* z = (row % 2 ? z2 : z1) + row / 2 * dim;
      double inverse = double(inv_norm[row]);
      // Where float32 has few digits left.
      if (inverse < 1e-37) inverse = 1 / norm(z, dim);
      int exponent = 0;
      __builtin_frexp(inverse, &exponent);
      exponent = exponent < -126 ? -126 : exponent;
      packed.scale[row] = float(unit * inverse / double(power_of_two(exponent)));
      scale_row(z, dim, power_of_two(exponent), depth, out);
    }
    pack_panel(packed.by_row + p * panel * depth, panel, depth, packed.panels + p * panel * depth);
  });
}

#if defined(SIMCLR_AMX)

// The eight tile registers hold 16 rows of 64 bytes. Without the instructions, arrays stand for
// them.
#if defined(__AVX512BF16__)

template <int tile>
SIMCLR_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}

// stride: floats between rows.
template <int tile>
SIMCLR_INLINE void tile_load(const float* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride * 4), "i"(tile) : "memory");
}

template <int tile>
SIMCLR_INLINE void tile_store(float* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride * 4), "i"(tile) : "memory");
}

// sum[r][c] += the products of both halves of a[r][k] and b[k][c], over k.
template <int sum, int a, int b>
SIMCLR_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(a), "i"(b));
}

// The thread may use the tiles while this object lives.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  TileRegisters(const TileRegisters&) = delete;
  ~TileRegisters() { asm volatile("tilerelease"); }
};

#else

thread_local float emulated_tiles[8][16][16];

template <int tile>
void tile_zero() {
  __builtin_memset(emulated_tiles[tile], 0, sizeof(emulated_tiles[tile]));
}

template <int tile>
void tile_load(const float* from, int64_t stride) {
  for (int r = 0; r < 16; ++r) __builtin_memcpy(emulated_tiles[tile][r], from + r * stride, 64);
}

template <int tile>
void tile_store(float* to, int64_t stride) {
  for (int r = 0; r < 16; ++r) __builtin_memcpy(to + r * stride, emulated_tiles[tile][r], 64);
}

template <int sum, int a, int b>
void tile_multiply() {
  for (int r = 0; r < 16; ++r)
    for (int k = 0; k < 16; ++k)
      for (int c = 0; c < 16; c += kLanes<float>) {
        float* out = emulated_tiles[sum][r] + c;
        store(out, multiply_add<float>(load(out), broadcast_operand(emulated_tiles[a][r][k]),
                                       load(emulated_tiles[b][k] + c)));
      }
}

struct TileRegisters {
  TileRegisters() {}
};

#endif

// Adds to `rows` × 16·columns values of sum the product of a [16·rows, depth] and
// b [depth, 16·columns]; depth in pairs, rows and columns 1 or 2, strides in floats.
template <int rows, int columns>
SIMCLR_INLINE void multiply_tiles(const float* a, int64_t a_stride, const float* b,
                                  int64_t b_stride, int64_t depth) {
  for (int64_t k = 0; k < depth; k += kDepthStep) {
    tile_load<4>(a + k, a_stride);
    tile_load<6>(b + k * b_stride, b_stride);
    tile_multiply<0, 4, 6>();
    if constexpr (columns == 2) {
      tile_load<7>(b + k * b_stride + 16, b_stride);
      tile_multiply<1, 4, 7>();
    }
    if constexpr (rows == 2) {
      tile_load<5>(a + 16 * a_stride + k, a_stride);
      tile_multiply<2, 5, 6>();
      if constexpr (columns == 2) tile_multiply<3, 5, 7>();
    }
  }
}

template <int rows, int columns>
SIMCLR_INLINE void add_tiles(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                             int64_t depth, float* sum, int64_t stride) {
  tile_load<0>(sum, stride);
  if constexpr (columns == 2) tile_load<1>(sum + 16, stride);
  if constexpr (rows == 2) tile_load<2>(sum + 16 * stride, stride);
  if constexpr (rows == 2 && columns == 2) tile_load<3>(sum + 16 * stride + 16, stride);
  multiply_tiles<rows, columns>(a, a_stride, b, b_stride, depth);
  tile_store<0>(sum, stride);
  if constexpr (columns == 2) tile_store<1>(sum + 16, stride);
  if constexpr (rows == 2) tile_store<2>(sum + 16 * stride, stride);
  if constexpr (rows == 2 && columns == 2) tile_store<3>(sum + 16 * stride + 16, stride);
}

// sum [rows, columns] += a·b, rows and columns multiples of 16.
inline void add_matrix_product(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                               int64_t depth, float* sum, int64_t stride, int64_t rows,
                               int64_t columns) {
  for (int64_t c = 0; c < columns; c += 32)
    for (int64_t r = 0; r < rows; r += 32) {
      const float *a_part = a + r * a_stride, *b_part = b + c;
      float* part = sum + r * stride + c;
      const bool two_rows = rows - r > 16, two_columns = columns - c > 16;
      if (two_rows && two_columns)
        add_tiles<2, 2>(a_part, a_stride, b_part, b_stride, depth, part, stride);
      else if (two_rows)
        add_tiles<2, 1>(a_part, a_stride, b_part, b_stride, depth, part, stride);
      else if (two_columns)
        add_tiles<1, 2>(a_part, a_stride, b_part, b_stride, depth, part, stride);
      else
        add_tiles<1, 1>(a_part, a_stride, b_part, b_stride, depth, part, stride);
    }
}

#else

struct TileRegisters {
  TileRegisters() {}
};

#endif

// What stands in Packed is multiplied without its scale; this multiplies it in.
template <class T>
SIMCLR_INLINE void multiply_scales(const Block<T>& I, int64_t i, const Block<T>& J, int64_t j,
                                   Vec<T> (&x)[kTileRows<T>][kTileVecs]) {
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows<T>; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kTileVecs; ++v)
      x[r][v] *= I.scale[i + r] * load(J.scale + j + v * kLanes<T>);
}

#if defined(SIMCLR_AMX)
// The products of rows [i, i + kTileRows) of block I and the panel of block J that starts at j.
template <class T>
SIMCLR_INLINE void multiply_panel(const Block<T>& I, int64_t i, const Block<T>& J, int64_t j,
                                  Vec<T> (&x)[kTileRows<T>][kTileVecs]) {
  T* out = reinterpret_cast<T*>(x);
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  multiply_tiles<2, 2>(I.by_row + i * I.depth, I.depth, J.panels + j * J.depth, kPanel<T>, I.depth);
  tile_store<0>(out, kPanel<T>);
  tile_store<1>(out + 16, kPanel<T>);
  tile_store<2>(out + 16 * kPanel<T>, kPanel<T>);
  tile_store<3>(out + 16 * kPanel<T> + 16, kPanel<T>);
}
#endif

}  // namespace
}  // namespace simclr::SIMCLR_ISA

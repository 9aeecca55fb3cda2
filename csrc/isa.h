// Run-time choice of instruction set.
//
// A file csrc/<op>_kernel.cpp is compiled once per instruction set: SIMCLR_ISA = base | avx2 |
// avx512. arm64 has only base, which is NEON there. Kernels of bfloat16 inputs are compiled for
// avx512_bf16 and amx too. The file wraps everything in `namespace SIMCLR_ISA`. It includes neither
// torch nor the STL: the linker might choose an inline function compiled for AVX-512 for the whole
// extension. The caller picks an instruction set:
//
//   SIMCLR_DECLARE_ISAS(void, my_kernel, (const float* x, int64_t n))   // in <op>.h
//   SIMCLR_DISPATCH(my_kernel)(x, n);                                   // in <op>_cpu.cpp
#pragma once

#include <cstdint>

namespace simclr {

// Each has the instructions of those before it. avx512_bf16: dot products of bfloat16 pairs. amx:
// matrix products of bfloat16 tiles.
enum class Isa { base, avx2, avx512, avx512_bf16, amx };

// The fastest set that this CPU has, or the one that SIMCLR_FAST_ISA names;
// throws std::runtime_error if that name is unknown or the CPU lacks it. Read once per process.
Isa current_isa();

const char* isa_name(Isa isa);

}  // namespace simclr

#if defined(__x86_64__) || defined(_M_X64)
#define SIMCLR_DECLARE_ISAS(ret, name, args) \
  namespace simclr::base {                   \
  ret name args;                             \
  }                                          \
  namespace simclr::avx2 {                   \
  ret name args;                             \
  }                                          \
  namespace simclr::avx512 {                 \
  ret name args;                             \
  }
#define SIMCLR_DISPATCH(name)                                                \
  (::simclr::current_isa() >= ::simclr::Isa::avx512 ? ::simclr::avx512::name \
   : ::simclr::current_isa() == ::simclr::Isa::avx2 ? ::simclr::avx2::name   \
                                                    : ::simclr::base::name)
#else
#define SIMCLR_DECLARE_ISAS(ret, name, args) \
  namespace simclr::base {                   \
  ret name args;                             \
  }
#define SIMCLR_DISPATCH(name) (::simclr::base::name)
#endif

// Kernels that need bfloat16 instructions. setup.py defines SIMCLR_WITH_BF16 if the compiler knows
// them; SIMCLR_DISPATCH_BF16 may be used if has_bf16().
#if defined(SIMCLR_WITH_BF16)
#define SIMCLR_DECLARE_BF16(ret, name, args) \
  namespace simclr::avx512_bf16 {            \
  ret name args;                             \
  }                                          \
  namespace simclr::amx {                    \
  ret name args;                             \
  }
#define SIMCLR_DISPATCH_BF16(name)                                     \
  (::simclr::current_isa() == ::simclr::Isa::amx ? ::simclr::amx::name \
                                                 : ::simclr::avx512_bf16::name)
#endif

namespace simclr {

inline bool has_bf16() {
#if defined(SIMCLR_WITH_BF16)
  return current_isa() >= Isa::avx512_bf16;
#else
  return false;
#endif
}

}  // namespace simclr

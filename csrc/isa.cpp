#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(SIMCLR_WITH_BF16)
#include <cpuid.h>
#endif
#if defined(SIMCLR_WITH_BF16) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace simclr {
namespace {

constexpr Isa kAll[] = {Isa::base, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx};

#if defined(SIMCLR_WITH_BF16)
// Linux gives a process the registers of AMX, 8 KB for each thread, only on request.
bool request_amx() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

// By CPUID, because __builtin_cpu_supports knows these names only in recent compilers.
Isa best_bf16() {
  unsigned eax, ebx, ecx, edx, amx, unused;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax & (1u << 5))) return Isa::avx512;
  __cpuid_count(7, 0, unused, unused, unused, amx);
  constexpr unsigned tiles_and_bf16 = (1u << 24) | (1u << 22);
  if ((amx & tiles_and_bf16) == tiles_and_bf16 && request_amx()) return Isa::amx;
  return Isa::avx512_bf16;
}
#endif

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#if defined(SIMCLR_WITH_BF16)
    return best_bf16();
#else
    return Isa::avx512;
#endif
  }
  if (avx2) return Isa::avx2;
#endif
  return Isa::base;
}

// Intel's cores take four times as long for a dot product of AVX512_BF16 as for a multiply-add of
// AVX-512, which is more time per product; AMD's take the same time. AMX is several times faster.
bool slow_bf16() {
#if defined(SIMCLR_WITH_BF16)
  unsigned eax, vendor, ecx, edx;
  constexpr unsigned amd = 0x68747541;  // "Auth" of "AuthenticAMD"
  return !__get_cpuid(0, &eax, &vendor, &ecx, &edx) || vendor != amd;
#else
  return true;
#endif
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* variable = std::getenv("SIMCLR_FAST_ISA");
  const std::string wanted = variable ? variable : "";
  if (wanted.empty()) return best == Isa::avx512_bf16 && slow_bf16() ? Isa::avx512 : best;
  std::string names;
  for (const Isa isa : kAll) {
    if (wanted == isa_name(isa)) {
      if (isa > best)
        throw std::runtime_error("SIMCLR_FAST_ISA=" + wanted + ": this CPU has only " +
                                 isa_name(best));
      return isa;
    }
    names += std::string(isa == Isa::base ? "" : isa == Isa::amx ? " or " : ", ") + isa_name(isa);
  }
  throw std::runtime_error("SIMCLR_FAST_ISA must be " + names + ", got '" + wanted + "'");
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx:
      return "amx";
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "base";
  }
}

Isa current_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace simclr

#include "isa.h"

#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace simclr {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::base;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* variable = std::getenv("SIMCLR_FAST_ISA");
  const std::string wanted = variable ? variable : "";
  if (wanted.empty()) return best;
  for (const Isa isa : {Isa::base, Isa::avx2, Isa::avx512}) {
    if (wanted != isa_name(isa)) continue;
    if (isa > best)
      throw std::runtime_error("SIMCLR_FAST_ISA=" + wanted + ": this CPU has only " +
                               isa_name(best));
    return isa;
  }
  throw std::runtime_error("SIMCLR_FAST_ISA must be base, avx2 or avx512, got '" + wanted + "'");
}

}  // namespace

const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "base";
}

Isa current_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace simclr

#include "isa.h"

#include <cstdlib>
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
  const char* names[] = {"base", "avx2", "avx512"};
  for (int i = 0; i < 3; ++i) {
    if (wanted != names[i]) continue;
    if (i > static_cast<int>(best))
      throw std::runtime_error("SIMCLR_FAST_ISA=" + wanted + ": this CPU has only " +
                               names[static_cast<int>(best)]);
    return static_cast<Isa>(i);
  }
  throw std::runtime_error("SIMCLR_FAST_ISA must be base, avx2 or avx512, got '" + wanted + "'");
}

}  // namespace

Isa current_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace simclr

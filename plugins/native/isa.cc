#include "native/isa.h"

#include <cstdlib>

#include "native/op.h"
#include "native/target.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace vl2 {
namespace {

#if defined(__x86_64__)
bool leaf7_bit4_of_eax1() {  // AVX-VNNI, which older compilers' __builtin_cpu_supports does not know
  unsigned a = 7, b = 0, c = 1, d = 0;
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return (a & (1u << 4)) != 0;
}
#endif

std::vector<Isa> detect() {
  std::vector<Isa> found{Isa::scalar};
#if defined(__x86_64__)
  // __builtin_cpu_supports asks xgetbv too: registers that the system does not save are not reported
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2) found.push_back(Isa::avx2);
#if VL2_HAS_AVXVNNI
  if (avx2 && leaf7_bit4_of_eax1()) found.push_back(Isa::avxvnni);
#endif
  if (avx512) found.push_back(Isa::avx512);
  if (avx512 && __builtin_cpu_supports("avx512vnni")) found.push_back(Isa::avx512vnni);
#elif defined(__aarch64__)
  found.push_back(Isa::neon);
  constexpr unsigned long DOTPROD = 1ul << 20;  // HWCAP_ASIMDDP
  if (getauxval(AT_HWCAP) & DOTPROD) found.push_back(Isa::dotprod);
#endif
  return found;
}

}  // namespace

const char* name_of(Isa isa) {
  static const char* const names[] = {"scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "neon", "dotprod"};
  return names[int(isa)];
}

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> held = detect();
  return held;
}

Isa choose_isa() {
  const char* forced = std::getenv("VL2_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return available_isas().back();
  std::string names;
  for (Isa isa : available_isas()) {
    if (forced == std::string(name_of(isa))) return isa;
    names += std::string(names.empty() ? "" : ", ") + name_of(isa);
  }
  throw OpError("VL2_CPU_ISA is \"" + std::string(forced) + "\", this processor and build have " + names);
}

}  // namespace vl2

extern "C" {

// For vl2.operators: the ISA that sessions will use, "" where VL2_CPU_ISA asks for one that is not here.
__attribute__((visibility("default"))) const char* vl2_isa() {
  try {
    return vl2::name_of(vl2::choose_isa());
  } catch (const vl2::OpError&) {
    return "";
  }
}

// The ISAs that can be forced, separated by blanks.
__attribute__((visibility("default"))) const char* vl2_available_isas() {
  static const std::string held = [] {
    std::string names;
    for (vl2::Isa isa : vl2::available_isas()) names += std::string(names.empty() ? "" : " ") + vl2::name_of(isa);
    return names;
  }();
  return held.c_str();
}

}  // extern "C"

#include "native/isa.h"

#include <cstdlib>

#include "native/op.h"
#include "native/target.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vl2 {
namespace {

#if defined(__x86_64__)
struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

// Leaf 7 of cpuid, for what older compilers' __builtin_cpu_supports does not know; zeros where there is none.
Leaf leaf7(unsigned part) {
  Leaf leaf;
  if (!__get_cpuid_count(7, part, &leaf.a, &leaf.b, &leaf.c, &leaf.d)) return {};
  return leaf;
}

bool has_avxvnni() { return (leaf7(1).a & 1u << 4) != 0; }

// Bfloat16 in vectors, tiles, their products of bfloat16, registers that the system saves, and its permission: Linux gives
// the large registers to processes that ask (since 5.16), for all threads, present and to come.
bool has_amx() {
  constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24, ALL = BF16 | TILE;
  constexpr unsigned SAVED = 1u << 17 | 1u << 18;  // XTILECFG, XTILEDATA in XCR0
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
  constexpr unsigned AVX512_BF16 = 1u << 5;
  if ((leaf7(0).d & ALL) != ALL || (leaf7(1).a & AVX512_BF16) == 0) return false;
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & SAVED) == SAVED && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
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
  if (avx2 && has_avxvnni()) found.push_back(Isa::avxvnni);
#endif
  if (avx512) found.push_back(Isa::avx512);
  const bool avx512vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (avx512vnni) found.push_back(Isa::avx512vnni);
#if VL2_HAS_AMX
  if (avx512vnni && has_amx()) found.push_back(Isa::amx);
#endif
#elif defined(__aarch64__)
  found.push_back(Isa::neon);
  constexpr unsigned long DOTPROD = 1ul << 20;  // HWCAP_ASIMDDP
  if (getauxval(AT_HWCAP) & DOTPROD) found.push_back(Isa::dotprod);
#endif
  return found;
}

}  // namespace

const char* name_of(Isa isa) {
  static const char* const names[] = {"scalar", "avx2", "avxvnni", "avx512", "avx512vnni", "amx", "neon", "dotprod"};
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

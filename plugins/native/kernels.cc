#include "native/kernels.h"

#include "native/op.h"
#include "native/target.h"

namespace vl2 {

extern const Kernels kernels_scalar, kernels_avx2, kernels_avxvnni, kernels_avx512, kernels_avx512vnni, kernels_neon,
    kernels_dotprod;
extern const TileKernels tiles_amx;

#if defined(__x86_64__) && VL2_HAS_AMX
// Few rows and what stands between products as AVX512-VNNI, which every processor with AMX has.
static const Kernels& kernels_amx() {
  static const Kernels held = [] {
    Kernels kernels = kernels_avx512vnni;
    kernels.isa = Isa::amx, kernels.tiles = &tiles_amx;
    return kernels;
  }();
  return held;
}
#endif

const Kernels& kernels_for(Isa isa) {
  switch (isa) {
    case Isa::scalar: return kernels_scalar;
#if defined(__x86_64__)
    case Isa::avx2: return kernels_avx2;
    case Isa::avx512: return kernels_avx512;
    case Isa::avx512vnni: return kernels_avx512vnni;
#if VL2_HAS_AVXVNNI
    case Isa::avxvnni: return kernels_avxvnni;
#endif
#if VL2_HAS_AMX
    case Isa::amx: return kernels_amx();
#endif
#elif defined(__aarch64__)
    case Isa::neon: return kernels_neon;
    case Isa::dotprod: return kernels_dotprod;
#endif
    default: throw OpError(std::string("there are no kernels for ") + name_of(isa));
  }
}

}  // namespace vl2

#include "native/kernels.h"

#include "native/op.h"
#include "native/target.h"

namespace vl2 {

extern const Kernels kernels_scalar, kernels_avx2, kernels_avxvnni, kernels_avx512, kernels_avx512vnni, kernels_neon,
    kernels_dotprod;

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
#elif defined(__aarch64__)
    case Isa::neon: return kernels_neon;
    case Isa::dotprod: return kernels_dotprod;
#endif
    default: throw OpError(std::string("there are no kernels for ") + name_of(isa));
  }
}

}  // namespace vl2

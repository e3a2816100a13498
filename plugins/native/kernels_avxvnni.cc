#include "native/kernels.h"
#include "native/target.h"

#if VL2_HAS_AVXVNNI
#include <immintrin.h>

VL2_TARGET_AVXVNNI

namespace vl2 {
namespace {
#define VL2_VNNI 1
#include "native/simd_avx2.h"
#include "native/matmul.h"
#include "native/elementwise.h"
}  // namespace

extern const Kernels kernels_avxvnni;
const Kernels kernels_avxvnni{Isa::avxvnni, FAST_SCHEMES, exact, fast, quantize, split, split_rows, swiglu, accumulate};

}  // namespace vl2

VL2_TARGET_END
#endif

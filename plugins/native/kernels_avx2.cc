#include "native/kernels.h"
#include "native/target.h"

#if defined(__x86_64__)
#include <immintrin.h>

VL2_TARGET_AVX2

namespace vl2 {
namespace {
#define VL2_VNNI 0
#include "native/simd_avx2.h"
#include "native/matmul.h"
#include "native/elementwise.h"
}  // namespace

extern const Kernels kernels_avx2;
const Kernels kernels_avx2{Isa::avx2, FAST_SCHEMES, exact, fast, quantize, split, split_rows, swiglu, accumulate};

}  // namespace vl2

VL2_TARGET_END
#endif

#include "native/kernels.h"
#include "native/target.h"

#if defined(__x86_64__)
#include <immintrin.h>

VL2_TARGET_AVX512VNNI

namespace vl2 {
namespace {
#define VL2_VNNI 1
#include "native/simd_avx512.h"
#include "native/matmul.h"
#include "native/elementwise.h"
}  // namespace

extern const Kernels kernels_avx512vnni;
const Kernels kernels_avx512vnni{Isa::avx512vnni, FAST_SCHEMES, exact, fast, quantize, split, split_rows, swiglu, accumulate};

}  // namespace vl2

VL2_TARGET_END
#endif

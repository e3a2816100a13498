#include "native/kernels.h"
#include "native/target.h"

#if defined(__aarch64__)
#include <arm_neon.h>

VL2_TARGET_DOTPROD

namespace vl2 {
namespace {
#define VL2_DOTPROD 1
#include "native/simd_neon.h"
#include "native/matmul.h"
#include "native/elementwise.h"
}  // namespace

extern const Kernels kernels_dotprod;
const Kernels kernels_dotprod{Isa::dotprod, FAST_SCHEMES, exact, fast, quantize, split, split_rows, swiglu, accumulate};

}  // namespace vl2

VL2_TARGET_END
#endif

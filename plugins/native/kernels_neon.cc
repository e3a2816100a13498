#include "native/kernels.h"
#include "native/target.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace vl2 {
namespace {
#define VL2_DOTPROD 0
#include "native/simd_neon.h"
#include "native/matmul.h"
#include "native/elementwise.h"
}  // namespace

extern const Kernels kernels_neon;
const Kernels kernels_neon{Isa::neon, FAST_SCHEMES, exact, fast, quantize, split, split_rows, swiglu, accumulate};

}  // namespace vl2
#endif

#include "native/kernels.h"
#include "native/target.h"

namespace vl2 {
namespace {
#include "native/simd_scalar.h"
#include "native/matmul.h"
#include "native/elementwise.h"
}  // namespace

extern const Kernels kernels_scalar;
const Kernels kernels_scalar{Isa::scalar, FAST_SCHEMES, exact, fast, quantize, split, split_rows, swiglu, accumulate};

}  // namespace vl2

// Products of many rows in AMX's matrix registers; everything else of `amx` is avx512vnni's.
//
// Codes of INT4 and INT8 are exact in bfloat16, and so are the three terms of a float32 number: their products are exact in
// the float32 sums, so that a product is as precise as one of float32 numbers, for three times a bfloat16 product's work.
#include "native/kernels.h"
#include "native/target.h"
#include "native/tiles.h"

#if defined(__x86_64__) && VL2_HAS_AMX
#include <immintrin.h>

VL2_TARGET_AMX

namespace vl2 {
namespace {
#define VL2_VNNI 1
#include "native/simd_avx512.h"
#include "native/weights.h"
#include "native/tile_terms.h"
#include "native/tile_product.h"
}  // namespace

extern const TileKernels tiles_amx;
const TileKernels tiles_amx{pack, multiply};

}  // namespace vl2

VL2_TARGET_END
#endif

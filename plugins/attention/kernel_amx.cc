#include "native/target.h"
#if defined(__x86_64__) && VL2_HAS_AMX
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "attention/problem.h"
#include "attention/scratch.h"
#include "native/parallel.h"
#include "native/tiles.h"

VL2_TARGET_AVX512

namespace vl2 {
namespace attention {
namespace {

#include "attention/lanes_avx512.h"
#include "attention/kernel.h"
#include "attention/terms.h"
#include "attention/term_products.h"
#include "attention/term_stream.h"
#include "attention/term_blocks.h"

}  // namespace

bool attend_amx(const Problem& problem, const Parallel& parallel) { return attend(problem, parallel, attend_terms); }

}  // namespace attention
}  // namespace vl2

VL2_TARGET_END
#endif

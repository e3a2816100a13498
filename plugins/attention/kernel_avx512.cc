#if defined(__x86_64__)
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "attention/problem.h"
#include "attention/scratch.h"
#include "native/parallel.h"
#include "native/target.h"

VL2_TARGET_AVX512

namespace vl2 {
namespace attention {
namespace {

#include "attention/lanes_avx512.h"
#include "attention/kernel.h"

}  // namespace

bool attend_avx512(const Problem& problem, const Parallel& parallel) { return attend(problem, parallel); }

}  // namespace attention
}  // namespace vl2

VL2_TARGET_END
#endif

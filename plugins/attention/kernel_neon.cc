#if defined(__aarch64__)
#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

#include "attention/problem.h"
#include "attention/scratch.h"
#include "native/parallel.h"

namespace vl2 {
namespace attention {
namespace {

#include "attention/lanes_neon.h"
#include "attention/kernel.h"

}  // namespace

bool attend_neon(const Problem& problem, const Parallel& parallel) { return attend(problem, parallel); }

}  // namespace attention
}  // namespace vl2
#endif

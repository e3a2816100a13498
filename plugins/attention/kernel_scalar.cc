#include <cstddef>
#include <cstdint>

#include "attention/problem.h"
#include "attention/scratch.h"
#include "native/parallel.h"

namespace vl2 {
namespace attention {
namespace {

#include "attention/lanes_scalar.h"
#include "attention/kernel.h"

}  // namespace

bool attend_scalar(const Problem& problem, const Parallel& parallel) { return attend(problem, parallel); }

}  // namespace attention
}  // namespace vl2

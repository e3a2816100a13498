// The instruction sets that kernels are written for, and the choice among them when a session is made.
#pragma once
#include <string>
#include <vector>

namespace vl2 {

// In the order of preference of one architecture: a later one is faster where the processor has it.
enum class Isa { scalar, avx2, avxvnni, avx512, avx512vnni, amx, neon, dotprod };

const char* name_of(Isa isa);

// Those that this processor and this build have, scalar first, the fastest last.
const std::vector<Isa>& available_isas();

// The fastest one, or the one that the environment's VL2_CPU_ISA names. Throws OpError where that is not available.
// Read when a session is made, so that tests can force each path in one process.
Isa choose_isa();

}  // namespace vl2

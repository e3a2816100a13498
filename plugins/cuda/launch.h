// launch.py in C++, for hosts without Python: a plan is kernels with grids, shared memory and arguments by name.
// tests/plugins/tensorrt/test_host_plans.py holds every plan of these headers against Python's.
#pragma once
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace vl2 {

// A null pointer, the name of a buffer, an int32 or a float32.
using Argument = std::variant<std::monostate, std::string, int32_t, float>;
using Three = std::array<int64_t, 3>;

struct Launch {
  std::string kernel;
  Three grid, block;
  int64_t shared_bytes;
  std::vector<Argument> arguments;
};

// Launches in order on one stream, and bytes of each scratch buffer.
struct Plan {
  std::vector<Launch> launches;
  std::vector<std::pair<std::string, int64_t>> workspace;
};

// What a user is told, with the mend.
struct Refused : std::runtime_error {
  Refused(const std::string& what, std::string mend) : std::runtime_error(what), hint(std::move(mend)) {}
  std::string hint;
};

inline void require(bool condition, const std::string& what, const std::string& expected) {
  if (!condition)
    throw Refused("the CUDA kernels do not cover " + what, "expected " + expected + "; use the `portable` lowering");
}

inline std::string text(int64_t number) { return std::to_string(number); }

// How many tiles cover `size`.
inline int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// Where a scratch buffer of `size` bytes ends if it begins at an aligned place.
inline int64_t aligned(int64_t size) { return tiles(size, 256) * 256; }

inline int64_t workspace_bytes(const Plan& plan) {
  int64_t sum = 0;
  for (const auto& [name, size] : plan.workspace) sum += aligned(size);
  return sum;
}

inline Argument number(int64_t value) { return static_cast<int32_t>(value); }

}  // namespace vl2

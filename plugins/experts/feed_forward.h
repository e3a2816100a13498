// Several gated feed-forward parts over some of the tokens each, added up: y[t] = Σ weight · down(silu(gate(x[t])) ⊙ up(x[t])).
#pragma once
#include <vector>

#include "native/matrix.h"

namespace vl2 {

// gate_up: rows of gate and up by turns of 16, as layout.interleave gives them.
struct FeedForward {
  Matrix gate_up, down;
};

// A part, and the tokens it gets with their weights.
struct Unit {
  FeedForward part;
  std::vector<size_t> tokens;
  std::vector<float> weights;
};

struct Device {
  const Kernels& kernels;
  const Parallel& parallel;
  bool fast;  // rounded activations where the kernels take them
};

// x and y: [tokens, hidden] float32.
struct Tokens {
  const float* x;
  float* y;
  size_t count, hidden;
};

// Each weight is read once a block of ROW_BLOCK tokens, of a decode step once. The order of all sums is that of the units
// whatever the threads, so that their number does not change a result.
void run_feed_forward(const Device& device, const std::vector<Unit>& units, const Tokens& tokens);

}  // namespace vl2

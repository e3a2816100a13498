// The router of the family: which experts a token takes and with which weights, as vl2.model.moe.Router decides.
#pragma once
#include <cstdint>
#include <vector>

#include "native/op.h"

namespace vl2 {

enum class TopkMethod { greedy, group_limited_greedy, noaux_tc };

struct Routing {
  TopkMethod method;
  bool softmax;  // else sigmoid
  bool normalize;
  float factor;
  size_t experts, top_k, groups, groups_kept;
};

// Reads and checks the attributes; throws OpError.
Routing routing_from(const Attributes& attributes);

// Memory that `route` needs, for one thread.
struct RoutingScratch {
  explicit RoutingScratch(const Routing& r) : scores(r.experts), choice(r.experts), values(r.groups), taken(r.experts) {}
  std::vector<float> scores, choice, values;
  std::vector<char> taken;
};

// Chooses top_k different experts of one token. logits: [experts]; bias: [experts], for noaux_tc; of equal values the
// lower index is taken, as ONNX's TopK does; NaN is the largest, as in PyTorch.
void route(const Routing& routing, const float* logits, const float* bias, RoutingScratch& scratch, int32_t* experts,
           float* weights);

}  // namespace vl2

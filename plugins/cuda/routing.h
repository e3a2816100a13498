// routing.py in C++: the launches that choose experts and sort tokens by them.
#pragma once
#include <algorithm>

#include "launch.h"

namespace vl2 {

struct RoutingProblem {
  int64_t tokens, experts, top_k;
  std::string topk_method, scoring_func;
  int64_t n_group, topk_group;
  bool norm_topk_prob;
  float routed_scaling_factor;

  bool limited() const { return topk_method != "greedy" && n_group != topk_group; }

  void check() const {
    const bool method = topk_method == "greedy" || topk_method == "group_limited_greedy" || topk_method == "noaux_tc";
    require(method, "topk_method `" + topk_method + "`", "one of greedy, group_limited_greedy, noaux_tc");
    require(scoring_func == "softmax" || scoring_func == "sigmoid", "scoring_func `" + scoring_func + "`",
            "one of softmax, sigmoid");
    require(1 <= experts && experts <= 256, text(experts) + " experts", "1 to 256");
    require(1 <= top_k && top_k <= std::min<int64_t>(32, experts), text(top_k) + " chosen experts", "1 to 32");
    const int64_t size = n_group > 0 ? experts / n_group : 0;
    require(1 <= topk_group && topk_group <= n_group && n_group <= 32 && size * n_group == experts,
            text(topk_group) + " of " + text(n_group) + " groups of " + text(experts) + " experts",
            "equal groups, up to 32");
    require(size > 1 || !limited() || topk_method != "noaux_tc", "groups of one expert", "two or more");
  }
};

inline Launch route_launch(const RoutingProblem& p) {
  const bool biased = p.topk_method == "noaux_tc";
  const int64_t flags = (p.scoring_func == "sigmoid") | 2 * biased | 4 * p.norm_topk_prob;
  std::vector<Argument> arguments = {"logits", biased ? Argument("correction_bias") : Argument(), "idx", "weights"};
  const int64_t groups = p.limited() ? p.n_group : 1, kept = p.limited() ? p.topk_group : 1;
  for (int64_t value : {p.tokens, p.experts, p.top_k, groups, kept, flags})
    arguments.push_back(number(value));
  arguments.emplace_back(p.routed_scaling_factor);
  return {"vl2_route", {tiles(p.tokens, 4), 1, 1}, {32 * 4, 1, 1}, 4 * 2 * p.experts * 4, arguments};
}

inline Launch sort_launch(const RoutingProblem& p, int64_t slots) {
  return {"vl2_sort", {p.experts, 1, 1}, {256, 1, 1}, 256 * 4,
          {"idx", "source", "target", "offsets", number(p.tokens * p.top_k), number(p.top_k), number(slots)}};
}

}  // namespace vl2

// experts.py in C++: the launch plan of a MoE layer's feed-forward part.
#pragma once
#include "linear.h"
#include "routing.h"

namespace vl2 {

struct ExpertsProblem {
  RoutingProblem routing;
  int64_t hidden_size, inner_size, shared_size;
  Storage gate_up, down, shared_gate_up, shared_down;

  void check() const {
    gate_up.shift(hidden_size);
    down.shift(inner_size);
    require(routing.tokens > 0, text(routing.tokens) + " tokens", "one or more");
    if (shared_size == 0) return;
    shared_gate_up.shift(hidden_size);
    shared_down.shift(shared_size);
  }

  int64_t shared_parts() const {
    if (shared_size == 0) return 0;
    const int64_t parts = std::max<int64_t>(1, shared_size / inner_size);
    return shared_size % (parts * 32) == 0 ? parts : 1;
  }

  int64_t routed_columns() const { return routing.top_k * inner_size; }
};

// Which of routed and shared experts one launch does: both where they are stored alike.
struct Part {
  const Storage* storage;
  bool routed, shared;
};

inline std::vector<Part> parts_of(const Storage& routed, const Storage& shared, int64_t shared_size) {
  if (shared_size == 0) return {{&routed, true, false}};
  if (routed.scheme == shared.scheme) return {{&routed, true, true}};
  return {{&routed, true, false}, {&shared, false, true}};
}

inline Launch combine_launch(const ExpertsProblem& p, const std::string& form, int64_t parts) {
  return {"vl2_combine_" + form, {tiles(p.hidden_size, 256), p.routing.tokens, 1}, {256, 1, 1}, 0,
          {"partial", "weights", "y", number(p.hidden_size), number(p.routing.top_k), number(parts)}};
}

inline void gate_up_launches(std::vector<Launch>& launches, const ExpertsProblem& p) {
  const int64_t columns = p.hidden_size, top_k = p.routing.top_k;
  const int64_t shared_shift = p.shared_size ? p.shared_gate_up.shift(columns) : 0;
  const int64_t routed_blocks = top_k * tiles(p.inner_size, 16), shared_blocks = tiles(p.shared_size, 16);
  for (const Part& part : parts_of(p.gate_up, p.shared_gate_up, p.shared_size)) {
    std::vector<Argument> arguments;
    for (const char* name : {"gate", "up"}) p.gate_up.name(arguments, name, part.routed);
    for (const char* name : {"shared_gate", "shared_up"}) p.shared_gate_up.name(arguments, name, part.shared);
    for (const char* name : {"x", "idx", "hidden"}) arguments.emplace_back(std::string(name));
    for (int64_t value : {columns, p.inner_size, p.shared_size, top_k, p.gate_up.shift(columns), shared_shift,
                          part.routed ? 0 : routed_blocks})
      arguments.push_back(number(value));
    launches.push_back({"vl2_gate_up_" + part.storage->scheme,
                        {routed_blocks * part.routed + shared_blocks * part.shared, p.routing.tokens, 1},
                        {THREADS, 1, 1}, staged_bytes(columns), arguments});
  }
}

inline void down_launches(std::vector<Launch>& launches, const ExpertsProblem& p) {
  const int64_t inner = p.inner_size, shared = p.shared_size, top_k = p.routing.top_k, parts = p.shared_parts();
  const int64_t shared_shift = shared ? p.shared_down.shift(shared) : 0;
  const int64_t staged = staged_bytes(std::max(inner, shared / std::max<int64_t>(parts, 1)));
  for (const Part& part : parts_of(p.down, p.shared_down, shared)) {
    std::vector<Argument> arguments;
    p.down.name(arguments, "down", part.routed);
    p.shared_down.name(arguments, "shared_down", part.shared);
    for (const char* name : {"hidden", "idx", "partial"}) arguments.emplace_back(std::string(name));
    for (int64_t value : {p.hidden_size, inner, shared, top_k, parts, p.down.shift(inner), shared_shift,
                          part.routed ? 0 : top_k})
      arguments.push_back(number(value));
    launches.push_back({"vl2_down_" + part.storage->scheme,
                        {tiles(p.hidden_size, ROWS), top_k * part.routed + parts * part.shared, p.routing.tokens},
                        {THREADS, 1, 1}, staged, arguments});
  }
}

inline Plan decode_plan(const ExpertsProblem& p) {
  const int64_t tokens = p.routing.tokens, top_k = p.routing.top_k, slots = top_k + p.shared_parts();
  Plan plan{{route_launch(p.routing)},
            {{"idx", tokens * top_k * 4},
             {"weights", tokens * top_k * 4},
             {"hidden", tokens * (p.routed_columns() + p.shared_size) * 4},
             {"partial", tokens * slots * p.hidden_size * 4}}};
  gate_up_launches(plan.launches, p);
  down_launches(plan.launches, p);
  plan.launches.push_back(combine_launch(p, "float", p.shared_parts()));
  return plan;
}

// silu(gate x) ⊙ (up x) of the routed experts in the order of experts, or of the shared ones.
inline Launch gated_launch(const ExpertsProblem& p, bool shared) {
  const Storage& storage = shared ? p.shared_gate_up : p.gate_up;
  const std::string prefix = shared ? "shared_" : "";
  const LinearProblem size{p.routing.tokens * (shared ? 1 : p.routing.top_k), shared ? p.shared_size : p.inner_size,
                           p.hidden_size, storage};
  size.check();
  std::vector<Argument> arguments;
  for (const char* name : {"gate", "up"}) storage.name(arguments, prefix + name);
  arguments.emplace_back("x");
  for (const char* name : {"source", "offsets"}) arguments.push_back(shared ? Argument() : Argument(name));
  arguments.emplace_back(prefix + "hidden");
  for (int64_t value : {size.tokens, size.rows, size.columns, storage.shift(size.columns)})
    arguments.push_back(number(value));
  return {"vl2_gated_product_" + storage.scheme, product_grid(size, shared ? 1 : p.routing.experts), {THREADS, 1, 1},
          product_bytes(storage, 2), arguments};
}

inline Plan prefill_plan(const ExpertsProblem& p) {
  const RoutingProblem& routing = p.routing;
  const int64_t choices = routing.tokens * routing.top_k, slots = routing.top_k + (p.shared_size > 0);
  Plan plan{{route_launch(routing), sort_launch(routing, slots), gated_launch(p, false)}, {}};
  plan.launches.push_back(product_launch({choices, p.hidden_size, p.inner_size, p.down},
                                         {"down", "hidden", "partial", routing.experts, "", "target", "offsets"}));
  if (p.shared_size) {
    plan.launches.push_back(gated_launch(p, true));
    const ProductRows rows{"shared_down", "shared_hidden", "partial", 1, "", "", "", slots, routing.top_k};
    plan.launches.push_back(product_launch({routing.tokens, p.hidden_size, p.shared_size, p.shared_down}, rows));
  }
  for (const char* name : {"idx", "weights", "source", "target"}) plan.workspace.push_back({name, choices * 4});
  plan.workspace.push_back({"offsets", (routing.experts + 1) * 4});
  plan.workspace.push_back({"hidden", choices * p.inner_size * 2});
  if (p.shared_size) plan.workspace.push_back({"shared_hidden", routing.tokens * p.shared_size * 2});
  plan.workspace.push_back({"partial", routing.tokens * slots * p.hidden_size * 2});
  plan.launches.push_back(combine_launch(p, "half", slots - routing.top_k));
  return plan;
}

// The caller has checked p.routing and then p, in Python's order.
inline Plan experts_plan(const ExpertsProblem& p) {
  return p.routing.tokens <= GEMV_TOKENS ? decode_plan(p) : prefill_plan(p);
}

}  // namespace vl2

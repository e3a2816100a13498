// operators.py in C++: the four operators' fields, inputs, outputs, and the launch plan for given shapes.
// tests/plugins/tensorrt/test_host_plans.py holds all of it against Python's.
#pragma once
#include <functional>
#include <map>

#include "../../cuda/attention.h"
#include "../../cuda/experts.h"

namespace vl2 {

constexpr const char *NAMESPACE = "vl2", *VERSION = "1";
constexpr const char* EXPORT_AGAIN = "export the bundle again with this vl2 and --lowering trt";

// int32, float32 or text, as a field keeps it.
using Value = std::variant<int32_t, float, std::string>;
using Shape = std::vector<int64_t>;
using Shapes = std::map<std::string, Shape>;

struct Attributes {
  std::map<std::string, Value> values;
  int64_t integer(const std::string& name) const { return std::get<int32_t>(values.at(name)); }
  float real(const std::string& name) const { return std::get<float>(values.at(name)); }
  const std::string& word(const std::string& name) const { return std::get<std::string>(values.at(name)); }
};

enum class Type { float16, float32, int8, int64 };
inline const char* type_name(Type type) {
  static const char* names[] = {"float16", "float32", "int8", "int64"};
  return names[static_cast<int>(type)];
}

struct Tensor {
  std::string name;
  Type type = Type::float16;
};

// like: the input whose shape an output has; last: the attribute with its last side; in_place: it is that input.
struct Output {
  std::string name, like, last;
  bool in_place = false;
};

struct Operator {
  std::string name;
  std::vector<std::pair<std::string, Value>> fields;  // in the order they are serialized in, with empty values
  std::function<std::vector<Tensor>(const Attributes&)> inputs;
  std::vector<Output> outputs;
  std::function<Plan(const Attributes&, const Shapes&)> plan;

  void check_types(const Attributes& given, const std::vector<std::string>& types) const {
    const auto expected = inputs(given);
    std::string names;
    for (const Tensor& tensor : expected) names += (names.empty() ? "" : ", ") + tensor.name;
    if (types.size() != expected.size())
      throw Refused("vl2::" + name + " got " + text(types.size()) + " inputs, expected " + text(expected.size()) +
                    ": " + names, EXPORT_AGAIN);
    for (size_t i = 0; i < types.size(); i++)
      if (types[i] != type_name(expected[i].type))
        throw Refused("input " + text(i) + " of vl2::" + name + ", `" + expected[i].name + "`, is " + types[i] +
                      ", expected " + type_name(expected[i].type), EXPORT_AGAIN);
  }
};

// A float16 matrix is one input, a quantized one codes and scales.
inline void add_matrix(std::vector<Tensor>& tensors, const std::string& name, const std::string& scheme) {
  tensors.push_back({name, scheme == "fp16" ? Type::float16 : Type::int8});
  if (scheme != "fp16") tensors.push_back({name + "_scale"});
}

inline std::vector<Tensor> experts_inputs(const Attributes& given) {
  std::vector<Tensor> tensors = {{"x"}, {"logits", Type::float32}};
  for (const char* name : {"gate", "up"}) add_matrix(tensors, name, given.word("scheme"));
  add_matrix(tensors, "down", given.word("down_scheme"));
  if (given.word("topk_method") == "noaux_tc") tensors.push_back({"correction_bias", Type::float32});
  if (given.integer("shared_size") == 0) return tensors;
  for (const char* name : {"shared_gate", "shared_up"}) add_matrix(tensors, name, given.word("shared_scheme"));
  add_matrix(tensors, "shared_down", given.word("shared_down_scheme"));
  return tensors;
}

inline Storage storage_of(const Attributes& given, const std::string& prefix) {
  return {given.word(prefix + "scheme"), given.integer(prefix + "group_size")};
}

inline Plan plan_experts(const Attributes& given, const Shapes& shapes) {
  const RoutingProblem routing{shapes.at("x")[0], given.integer("experts"), given.integer("top_k"),
                               given.word("topk_method"), given.word("scoring_func"), given.integer("n_group"),
                               given.integer("topk_group"), given.integer("norm_topk_prob") != 0,
                               given.real("routed_scaling_factor")};
  routing.check();
  const ExpertsProblem problem{routing, given.integer("hidden_size"), given.integer("inner_size"),
                               given.integer("shared_size"), storage_of(given, ""), storage_of(given, "down_"),
                               storage_of(given, "shared_"), storage_of(given, "shared_down_")};
  problem.check();
  return experts_plan(problem);
}

inline Plan plan_linear(const Attributes& given, const Shapes& shapes) {
  const Shape& x = shapes.at("x");
  int64_t tokens = 1;
  for (size_t i = 0; i + 1 < x.size(); i++) tokens *= x[i];
  return linear_plan({tokens, given.integer("N"), given.integer("K"), storage_of(given, "")});
}

inline Plan plan_latent(const Attributes& given, const Shapes& shapes) {
  const Shape &query = shapes.at("query"), &cache = shapes.at("cache");
  return latent_plan({query[0], query[1], query[2], query[3], cache[2] - query[3], cache[1], given.real("scale")});
}

inline Plan plan_attention(const Attributes& given, const Shapes& shapes) {
  const Shape &query = shapes.at("query"), &cache = shapes.at("key_cache");
  const int64_t kv_heads = cache[2], size = cache[3];
  require(std::min(kv_heads, size) > 0, "a cache of " + text(kv_heads) + " heads of " + text(size), "one or more");
  return attention_plan({query[0], query[2] / size, kv_heads, query[1], size, cache[1], given.real("scale")});
}

inline const std::vector<Operator>& operators() {
  const Value whole = 0, real = 0.0f, word = std::string();
  static const std::vector<Operator> table = {
      {"Experts",
       {{"experts", whole}, {"top_k", whole}, {"topk_method", word}, {"scoring_func", word}, {"n_group", whole},
        {"topk_group", whole}, {"norm_topk_prob", whole}, {"routed_scaling_factor", real}, {"hidden_size", whole},
        {"inner_size", whole}, {"shared_size", whole}, {"scheme", word}, {"group_size", whole}, {"down_scheme", word},
        {"down_group_size", whole}, {"shared_scheme", word}, {"shared_group_size", whole}, {"shared_down_scheme", word},
        {"shared_down_group_size", whole}},
       experts_inputs, {{"y", "x", ""}}, plan_experts},
      {"Linear", {{"N", whole}, {"K", whole}, {"scheme", word}, {"group_size", whole}},
       [](const Attributes& given) {
         std::vector<Tensor> tensors = {{"x"}};
         add_matrix(tensors, "weight", given.word("scheme"));
         return tensors;
       },
       {{"y", "x", "N"}}, plan_linear},
      {"LatentAttention", {{"scale", real}},
       [](const Attributes&) {
         return std::vector<Tensor>{{"query"}, {"query_rope"}, {"latent"}, {"key_rope"}, {"cos", Type::float32},
                                    {"sin", Type::float32}, {"cache"}, {"past_length", Type::int64}};
       },
       {{"y", "query", ""}, {"written", "cache", "", true}}, plan_latent},
      {"Attention", {{"scale", real}},
       [](const Attributes&) {
         return std::vector<Tensor>{{"query"}, {"key"}, {"value"}, {"cos", Type::float32}, {"sin", Type::float32},
                                    {"key_cache"}, {"value_cache"}, {"past_length", Type::int64}};
       },
       {{"y", "query", ""}, {"written_key", "key_cache", "", true}, {"written_value", "value_cache", "", true}},
       plan_attention},
  };
  return table;
}

// Bytes that suffice for every plan between two shapes of each input, as plugin.py's `largest_workspace`: every number
// of tokens, each with whole caches.
inline int64_t largest_workspace(const Operator& made, const Attributes& given, const std::vector<Shape>& low,
                                 const std::vector<Shape>& high) {
  const auto tensors = made.inputs(given);
  const auto is_cache = [&](size_t i) {
    const std::string& name = tensors[i].name;
    return name.size() >= 5 && name.compare(name.size() - 5, 5, "cache") == 0;
  };
  int64_t least = INT64_MAX, most = 1;
  for (size_t i = 0; i < tensors.size(); i++)
    for (size_t side = 0; side < low[i].size(); side++)
      if (!is_cache(i) && low[i][side] != high[i][side])
        least = std::min(least, low[i][side]), most = std::max(most, high[i][side]);
  if (least == INT64_MAX) least = 1;
  int64_t bytes = 0;
  for (int64_t count = std::max<int64_t>(1, least); count <= most; count++) {
    Shapes shapes;
    for (size_t i = 0; i < tensors.size(); i++) {
      Shape sides = high[i];
      for (size_t side = 0; side < sides.size() && !is_cache(i); side++)
        sides[side] = std::min(sides[side], std::max(low[i][side], count));
      shapes[tensors[i].name] = sides;
    }
    bytes = std::max(bytes, workspace_bytes(made.plan(given, shapes)));
  }
  return bytes;
}

}  // namespace vl2

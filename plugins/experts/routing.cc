#include "experts/routing.h"

#include <algorithm>
#include <cmath>

namespace vl2 {
namespace {

constexpr int64_t MOST_EXPERTS = 4096;

TopkMethod method_named(const std::string& name) {
  if (name == "greedy") return TopkMethod::greedy;
  if (name == "group_limited_greedy") return TopkMethod::group_limited_greedy;
  if (name == "noaux_tc") return TopkMethod::noaux_tc;
  throw OpError("`topk_method` is \"" + name + "\", expected greedy, group_limited_greedy or noaux_tc");
}

size_t counted(const Attributes& attributes, const char* name, int64_t fallback, int64_t most) {
  const int64_t value = attributes.integer(name, fallback);
  require(value >= 1 && value <= most,
          std::string("`") + name + "` is " + std::to_string(value) + ", expected 1 to " + std::to_string(most));
  return size_t(value);
}

bool above(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

// The first index of the largest value that is not taken; takes it.
size_t take_largest(const float* values, size_t count, char* taken) {
  size_t best = count;
  for (size_t i = 0; i < count; ++i)
    if (!taken[i] && (best == count || above(values[i], values[best]))) best = i;
  taken[best] = 1;
  return best;
}

void score(const Routing& r, const float* logits, float* scores) {
  if (!r.softmax) {
    for (size_t e = 0; e < r.experts; ++e) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
    return;
  }
  float most = logits[0];
  for (size_t e = 1; e < r.experts; ++e) most = above(logits[e], most) ? logits[e] : most;
  float sum = 0;
  for (size_t e = 0; e < r.experts; ++e) sum += scores[e] = std::exp(logits[e] - most);
  for (size_t e = 0; e < r.experts; ++e) scores[e] /= sum;
}

// The largest value of a group, or for noaux_tc the sum of its two largest.
float value_of_group(const Routing& r, const float* choice, char* taken) {
  const size_t size = r.experts / r.groups;
  std::fill_n(taken, size, 0);
  const float first = choice[take_largest(choice, size, taken)];
  return r.method == TopkMethod::noaux_tc ? first + choice[take_largest(choice, size, taken)] : first;
}

// Experts of dropped groups get 0, not −∞, as in the original.
void drop_groups(const Routing& r, RoutingScratch& scratch) {
  const size_t size = r.experts / r.groups;
  for (size_t g = 0; g < r.groups; ++g)
    scratch.values[g] = value_of_group(r, scratch.choice.data() + g * size, scratch.taken.data());
  std::fill(scratch.taken.begin(), scratch.taken.end(), 0);
  for (size_t i = 0; i < r.groups_kept; ++i) take_largest(scratch.values.data(), r.groups, scratch.taken.data());
  for (size_t g = 0; g < r.groups; ++g)
    if (!scratch.taken[g]) std::fill_n(scratch.choice.begin() + std::ptrdiff_t(g * size), size, 0.0f);
}

}  // namespace

Routing routing_from(const Attributes& attributes) {
  Routing r{};
  r.method = method_named(attributes.text("topk_method", "greedy"));
  const std::string scoring = attributes.text("scoring_func", "softmax");
  require(scoring == "softmax" || scoring == "sigmoid",
          "`scoring_func` is \"" + scoring + "\", expected softmax or sigmoid");
  r.softmax = scoring == "softmax";
  const int64_t normalize = attributes.integer("norm_topk_prob", 0);
  require(normalize == 0 || normalize == 1, "`norm_topk_prob` is " + std::to_string(normalize) + ", expected 0 or 1");
  r.normalize = normalize == 1;
  r.factor = attributes.number("routed_scaling_factor", 1.0f);
  r.experts = counted(attributes, "experts", 0, MOST_EXPERTS);
  r.top_k = counted(attributes, "top_k", 0, int64_t(r.experts));
  r.groups = counted(attributes, "n_group", 1, int64_t(r.experts));
  r.groups_kept = counted(attributes, "topk_group", 1, int64_t(r.groups));
  require(r.experts % r.groups == 0, "`n_group` is " + std::to_string(r.groups) + ", which does not divide " +
                                         std::to_string(r.experts) + " experts");
  require(r.method != TopkMethod::noaux_tc || r.groups == r.groups_kept || r.experts / r.groups >= 2,
          "noaux_tc wants two experts or more a group");
  return r;
}

void route(const Routing& r, const float* logits, const float* bias, RoutingScratch& scratch, int32_t* experts,
           float* weights) {
  score(r, logits, scratch.scores.data());
  scratch.choice = scratch.scores;
  const bool noaux = r.method == TopkMethod::noaux_tc;
  if (noaux)
    for (size_t e = 0; e < r.experts; ++e) scratch.choice[e] += bias[e];
  if (r.method != TopkMethod::greedy && r.groups != r.groups_kept) drop_groups(r, scratch);
  std::fill(scratch.taken.begin(), scratch.taken.end(), 0);
  float sum = 0;
  for (size_t i = 0; i < r.top_k; ++i) {
    const size_t e = take_largest(scratch.choice.data(), r.experts, scratch.taken.data());
    experts[i] = int32_t(e);
    // the correction bias chooses but does not weight
    sum += weights[i] = noaux ? scratch.scores[e] : scratch.choice[e];
  }
  const float divisor = r.top_k > 1 && r.normalize ? sum + 1e-20f : 1.0f;
  for (size_t i = 0; i < r.top_k; ++i) weights[i] = weights[i] / divisor * r.factor;
}

}  // namespace vl2

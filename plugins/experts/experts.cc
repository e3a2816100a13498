// vl2::Experts: routing, the routed and the shared experts. plugins/native/README.md has inputs and attributes.
#include <algorithm>
#include <memory>
#include <numeric>

#include "experts/feed_forward.h"
#include "experts/routing.h"

namespace vl2 {
namespace {

// Tokens at once: bounds the memory between the two products, at k · I floats a token.
constexpr size_t TOKENS_AT_ONCE = 1024;
constexpr size_t ROUTED_A_TASK = 16;

constexpr MatrixNames ROUTED{"scheme", "group_size", "scale_dtype"};
constexpr MatrixNames ROUTED_DOWN{"down_scheme", "down_group_size", "down_scale_dtype"};
constexpr MatrixNames SHARED{"shared_scheme", "shared_group_size", "shared_scale_dtype"};
constexpr MatrixNames SHARED_DOWN{"shared_down_scheme", "shared_down_group_size", "shared_down_scale_dtype"};

int64_t filled(int64_t inner) { return (inner + int64_t(PANEL_ROWS) - 1) / int64_t(PANEL_ROWS) * int64_t(PANEL_ROWS); }

// The matrices of a gated feed-forward part without their data.
FeedForward feed_forward(const Attributes& a, Shape sizes, const MatrixNames& up, const MatrixNames& down,
                         const Matrix* fallback) {
  const auto& [inner, hidden] = sizes;
  require(inner > 0 && inner < 1 << 23, "an inner size is " + std::to_string(inner) + ", expected 1 to 8388607");
  const Matrix gate_up = matrix_from(a, up, {2 * filled(inner), hidden}, fallback);
  return {gate_up, matrix_from(a, down, {hidden, inner}, &gate_up)};
}

class Experts {
 public:
  static Signature signature() {
    return {"Experts",
            {{"x", Type::float32},
             {"logits", Type::float32},
             {"gate_up", Type::uint8},
             {"down", Type::uint8},
             {"correction_bias", Type::float32, true},
             {"shared_gate_up", Type::uint8, true},
             {"shared_down", Type::uint8, true}},
            {{"y", Type::float32}}};
  }

  explicit Experts(const Attributes& a)
      : kernels_(kernels_for(choose_isa())), routing_(routing_from(a)), hidden_(a.integer("hidden_size")), fast_(is_fast(a)) {
    routed_ = feed_forward(a, {a.integer("inner_size"), hidden_}, ROUTED, ROUTED_DOWN, nullptr);
    const int64_t shared = a.integer("shared_size", 0);
    require(shared >= 0, "`shared_size` is " + std::to_string(shared) + ", expected 0 or more");
    has_shared_ = shared > 0;
    if (has_shared_) shared_ = feed_forward(a, {shared, hidden_}, SHARED, SHARED_DOWN, &routed_.gate_up);
  }

  void compute(Call& call) const {
    const Tensor x = call.input(0), logits = call.input(1), bias = call.input(4);
    check_shapes(x, logits, bias);
    const FeedForward routed{with_data(routed_.gate_up, call.input(2), "gate_up", routing_.experts),
                             with_data(routed_.down, call.input(3), "down", routing_.experts)};
    FeedForward shared{};
    require(has_shared_ || (!call.input(5) && !call.input(6)), "there are shared experts, but `shared_size` is 0");
    if (has_shared_)
      shared = {with_data(shared_.gate_up, call.input(5), "shared_gate_up"), with_data(shared_.down, call.input(6), "shared_down")};
    const Tensor y = call.output(0, x.shape);
    const size_t tokens = x.count() / size_t(hidden_), hidden = size_t(hidden_);
    const Parallel parallel = call.parallel();
    for (size_t first = 0; first < tokens; first += TOKENS_AT_ONCE) {
      const size_t count = std::min(TOKENS_AT_ONCE, tokens - first);
      const Chosen chosen = choose(logits.as<const float>() + first * routing_.experts, bias, count, parallel);
      const std::vector<Unit> units = units_of(chosen, routed, shared, count);
      run_feed_forward({kernels_, parallel, fast_}, units,
                       {x.as<const float>() + first * hidden, y.as<float>() + first * hidden, count, hidden});
    }
  }

 private:
  // Slots: one for each choice of a token, in the order of the experts, each expert's in the order of the tokens.
  struct Chosen {
    std::vector<size_t> begin;  // [experts + 1]
    std::vector<size_t> token;  // [slots]
    std::vector<float> weight;  // [slots]
  };

  void check_shapes(const Tensor& x, const Tensor& logits, const Tensor& bias) const {
    require(!x.shape.empty() && x.shape.back() == hidden_,
            "`x` has the shape " + x.describe() + ", expected [..., " + std::to_string(hidden_) + "]");
    std::vector<int64_t> expected = x.shape;
    expected.back() = int64_t(routing_.experts);
    require(logits.shape == expected,
            "`logits` has the shape " + logits.describe() + ", expected " + Tensor{Type::any, expected, nullptr}.describe());
    const bool noaux = routing_.method == TopkMethod::noaux_tc;
    require(noaux == bool(bias), noaux ? "noaux_tc wants `correction_bias`" : "only noaux_tc takes `correction_bias`");
    require(!bias || (bias.shape.size() == 1 && size_t(bias.shape[0]) == routing_.experts),
            "`correction_bias` has the shape " + bias.describe() + ", expected [" + std::to_string(routing_.experts) + "]");
  }

  Chosen choose(const float* logits, const Tensor& bias, size_t tokens, const Parallel& parallel) const {
    const size_t k = routing_.top_k;
    std::vector<int32_t> experts(tokens * k);
    std::vector<float> weights(tokens * k);
    const size_t tasks = (tokens + ROUTED_A_TASK - 1) / ROUTED_A_TASK;
    std::vector<RoutingScratch> scratch(tasks, RoutingScratch(routing_));
    parallel_for(parallel, tasks, [&](size_t task) {
      const size_t end = std::min(tokens, (task + 1) * ROUTED_A_TASK);
      for (size_t t = task * ROUTED_A_TASK; t < end; ++t)
        route(routing_, logits + t * routing_.experts, bias.as<const float>(), scratch[task], &experts[t * k], &weights[t * k]);
    });
    Chosen chosen{std::vector<size_t>(routing_.experts + 1), std::vector<size_t>(tokens * k), std::vector<float>(tokens * k)};
    for (int32_t e : experts) ++chosen.begin[size_t(e) + 1];
    std::partial_sum(chosen.begin.begin(), chosen.begin.end(), chosen.begin.begin());
    std::vector<size_t> next = chosen.begin;
    for (size_t i = 0; i < tokens * k; ++i) {
      const size_t slot = next[size_t(experts[i])]++;
      chosen.token[slot] = i / k;
      chosen.weight[slot] = weights[i];
    }
    return chosen;
  }

  // The experts that have tokens, then the shared ones with all tokens.
  std::vector<Unit> units_of(const Chosen& chosen, const FeedForward& routed, const FeedForward& shared, size_t tokens) const {
    std::vector<Unit> units;
    for (size_t e = 0; e < routing_.experts; ++e) {
      const size_t begin = chosen.begin[e], count = chosen.begin[e + 1] - begin;
      if (count == 0) continue;
      FeedForward expert = routed;
      expert.gate_up.data += e * size_bytes(routed.gate_up);
      expert.down.data += e * size_bytes(routed.down);
      const auto at = chosen.token.begin() + std::ptrdiff_t(begin);
      const auto weight = chosen.weight.begin() + std::ptrdiff_t(begin);
      units.push_back({expert, {at, at + std::ptrdiff_t(count)}, {weight, weight + std::ptrdiff_t(count)}});
    }
    if (has_shared_) {
      std::vector<size_t> all(tokens);
      std::iota(all.begin(), all.end(), 0);
      units.push_back({shared, all, std::vector<float>(tokens, 1.0f)});
    }
    return units;
  }

  const Kernels& kernels_;
  Routing routing_;
  int64_t hidden_;
  bool fast_, has_shared_ = false;
  FeedForward routed_, shared_{};
};

const Registration<Experts> experts_registration;

}  // namespace
}  // namespace vl2

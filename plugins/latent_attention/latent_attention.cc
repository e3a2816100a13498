// vl2::LatentAttention; README.md has its signature.
#include "attention/shapes.h"

namespace vl2 {
namespace attention {
namespace {

enum Input { kQuery, kQueryRope, kLatent, kKeyRope, kCos, kSin, kCache, kPast, kScale, kRow };

struct LatentAttention {
  Isa isa;
  float scale;

  explicit LatentAttention(const Attributes& attributes) : isa(choose_isa()), scale(attributes.number("scale")) {}

  static Signature signature() {
    return {"LatentAttention",
            {{"query", Type::float32}, {"query_rope", Type::float32}, {"latent", Type::float32},
             {"key_rope", Type::float32}, {"cos", Type::float32}, {"sin", Type::float32}, {"cache", Type::any},
             {"past_length", Type::int64}, {"cache_scale", Type::float32, true},
             {"cache_row", Type::int64, true}},
            {{"y", Type::float32}}};
  }

  void compute(Call& call) const {
    const Tensor query = call.input(kQuery), cache = call.input(kCache), rope = call.input(kKeyRope);
    Problem p{};
    p.batch = side(query, "query", 4, 0);
    p.heads = side(query, "query", 4, 1);
    p.tokens = side(query, "query", 4, 2);
    const int64_t rank = side(query, "query", 4, 3), rotary = side(rope, "key_rope", 3, 2);
    require(p.heads > 0 && rank > 0, "query has the shape " + query.describe() + ", expected heads and rank above 0");
    require(rotary > 0 && rotary % 2 == 0, "key_rope has " + std::to_string(rotary) + " columns, expected an even number");
    p.kv_heads = p.token_rows = 1;
    p.causal = true;
    p.capacity = side(cache, "cache", 3, 1);
    const int64_t slots = call.input(kRow) ? cache.shape[0] : p.batch;
    check_shape(cache, "cache", {slots, p.capacity, rank + rotary});
    p.keys = make_cache(cache, call.input(kScale), "cache", {slots, p.capacity, 2});
    p.keys.plain_width = p.value_width = rank;
    p.keys.rotary_width = rotary;
    const std::vector<int64_t> past = past_lengths(call.input(kPast), p.batch, p.tokens, p.capacity);
    const std::vector<int64_t> rows = cache_rows(call.input(kRow), p.batch, slots);
    p.past = past.data();
    p.slot = rows.data();
    p.scale = scale;
    take_rows(call, p, rank, rotary);
    p.output = call.output(0, query.shape).as<float>();
    p.output_strides = p.query.plain_strides;
    run(p, isa, call.parallel());
  }

  // The new rows and their angles.
  static void take_rows(const Call& call, Problem& p, int64_t rank, int64_t rotary) {
    const auto rows = [&](Input input, const char* name, const std::vector<int64_t>& shape) {
      const Tensor tensor = call.input(input);
      check_shape(tensor, name, shape);
      return tensor.as<float>();
    };
    const int64_t tokens = p.tokens, heads = p.heads;
    p.query = {rows(kQuery, "query", {p.batch, heads, tokens, rank}), rank,
               {heads * tokens * rank, rank, tokens * rank},
               rows(kQueryRope, "query_rope", {p.batch, tokens, heads, rotary}), rotary,
               {tokens * heads * rotary, heads * rotary, rotary}, true};
    p.new_keys = {rows(kLatent, "latent", {p.batch, tokens, rank}), rank, {tokens * rank, rank, 0},
                  rows(kKeyRope, "key_rope", {p.batch, tokens, rotary}), rotary, {tokens * rotary, rotary, 0}, true};
    p.cos = rows(kCos, "cos", {p.batch, tokens, rotary});
    p.sin = rows(kSin, "sin", {p.batch, tokens, rotary});
  }
};

const Registration<LatentAttention> registration;

}  // namespace
}  // namespace attention
}  // namespace vl2

// vl2::Attention; README.md has its signature.
#include "attention/shapes.h"

namespace vl2 {
namespace attention {
namespace {

enum Input { kQuery, kKey, kValue, kCos, kSin, kKeyCache, kValueCache, kPast, kKeyScale, kValueScale, kRow };

struct Attention {
  Isa isa;
  float scale;

  explicit Attention(const Attributes& attributes) : isa(choose_isa()), scale(attributes.number("scale")) {}

  static Signature signature() {
    return {"Attention",
            {{"query", Type::float32}, {"key", Type::float32}, {"value", Type::float32}, {"cos", Type::float32},
             {"sin", Type::float32}, {"key_cache", Type::any}, {"value_cache", Type::any}, {"past_length", Type::int64},
             {"key_scale", Type::float32, true}, {"value_scale", Type::float32, true}, {"cache_row", Type::int64, true}},
            {{"y", Type::float32}}};
  }

  void compute(Call& call) const {
    const Tensor query = call.input(kQuery), keys = call.input(kKeyCache), values = call.input(kValueCache);
    Problem p{};
    p.batch = side(query, "query", 3, 0);
    p.tokens = side(query, "query", 3, 1);
    p.capacity = side(keys, "key_cache", 4, 1);
    p.kv_heads = p.token_rows = side(keys, "key_cache", 4, 2);
    p.causal = true;
    const int64_t size = side(keys, "key_cache", 4, 3), width = query.shape[2];
    require(size > 0 && size % 2 == 0, "the head size is " + std::to_string(size) + ", expected an even number");
    require(p.kv_heads > 0 && width > 0 && width % (size * p.kv_heads) == 0,
            "query has " + std::to_string(width) + " columns, expected a multiple of key_cache's " +
                std::to_string(p.kv_heads) + " heads of " + std::to_string(size));
    p.heads = width / size;
    const int64_t slots = call.input(kRow) ? keys.shape[0] : p.batch;
    check_shape(keys, "key_cache", {slots, p.capacity, p.kv_heads, size});
    check_shape(values, "value_cache", keys.shape);
    require(values.type == keys.type, "value_cache and key_cache differ in element type");
    p.keys = make_cache(keys, call.input(kKeyScale), "key_cache", {slots, p.capacity, p.kv_heads});
    p.values = make_cache(values, call.input(kValueScale), "value_cache", {slots, p.capacity, p.kv_heads});
    p.keys.rotary_width = p.values.plain_width = p.value_width = size;
    const std::vector<int64_t> past = past_lengths(call.input(kPast), p.batch, p.tokens, p.capacity);
    const std::vector<int64_t> rows = cache_rows(call.input(kRow), p.batch, slots);
    p.past = past.data();
    p.slot = rows.data();
    p.scale = scale;
    take_rows(call, p, size);
    p.output = call.output(0, query.shape).as<float>();
    p.output_strides = {p.tokens * width, width, size};
    run(p, isa, call.parallel());
  }

  // The new rows and their angles.
  static void take_rows(const Call& call, Problem& p, int64_t size) {
    const auto rows = [&](Input input, const char* name, int64_t heads) {
      const Tensor tensor = call.input(input);
      check_shape(tensor, name, {p.batch, p.tokens, heads * size});
      return std::pair<const float*, Strides>(tensor.as<float>(), {p.tokens * heads * size, heads * size, size});
    };
    const auto query = rows(kQuery, "query", p.heads), key = rows(kKey, "key", p.kv_heads);
    const auto value = rows(kValue, "value", p.kv_heads);
    p.query = {nullptr, 0, {}, query.first, size, query.second, false};
    p.new_keys = {nullptr, 0, {}, key.first, size, key.second, false};
    p.new_values = {value.first, size, value.second, nullptr, 0, {}, false};
    p.cos = rows(kCos, "cos", 1).first;
    p.sin = rows(kSin, "sin", 1).first;
  }
};

const Registration<Attention> registration;

}  // namespace
}  // namespace attention
}  // namespace vl2

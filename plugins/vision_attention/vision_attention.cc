// vl2::VisionAttention; README.md has its signature.
#include <numeric>

#include "attention/shapes.h"

namespace vl2 {
namespace attention {
namespace {

struct VisionAttention {
  Isa isa;
  int64_t heads;
  float scale;

  explicit VisionAttention(const Attributes& attributes)
      : isa(choose_isa()), heads(attributes.integer("heads")), scale(attributes.number("scale")) {
    require(heads > 0, "heads is " + std::to_string(heads) + ", expected a number above 0");
  }

  static Signature signature() { return {"VisionAttention", {{"qkv", Type::float32}}, {{"y", Type::float32}}}; }

  void compute(Call& call) const {
    const Tensor qkv = call.input(0);
    Problem p{};
    p.batch = side(qkv, "qkv", 3, 0);
    p.tokens = p.capacity = side(qkv, "qkv", 3, 1);
    const int64_t columns = side(qkv, "qkv", 3, 2), size = columns / (3 * heads), width = heads * size;
    require(size > 0 && columns == 3 * width, "qkv has " + std::to_string(columns) +
                                                  " columns, expected a multiple of 3 * " + std::to_string(heads));
    p.heads = p.kv_heads = heads;
    p.token_rows = 3 * heads;
    p.scale = scale;
    const std::vector<int64_t> past(static_cast<size_t>(p.batch));
    std::vector<int64_t> slots(static_cast<size_t>(p.batch));
    std::iota(slots.begin(), slots.end(), 0);
    p.past = past.data();
    p.slot = slots.data();
    float* rows = qkv.as<float>();
    p.query = {rows, size, {p.tokens * columns, columns, size}, nullptr, 0, {}, false};
    p.keys = {rows + width, nullptr, CacheType::kFloat, size, 0};
    p.values = {rows + 2 * width, nullptr, CacheType::kFloat, size, 0};
    p.value_width = size;
    p.output = call.output(0, {p.batch, p.tokens, width}).as<float>();
    p.output_strides = {p.tokens * width, width, size};
    run(p, isa, call.parallel());
  }
};

const Registration<VisionAttention> registration;

}  // namespace
}  // namespace attention
}  // namespace vl2

#include "attention/shapes.h"

namespace vl2 {
namespace attention {

bool attend_scalar(const Problem& problem, const Parallel& parallel);
bool attend_avx2(const Problem& problem, const Parallel& parallel);
bool attend_avx512(const Problem& problem, const Parallel& parallel);
bool attend_neon(const Problem& problem, const Parallel& parallel);

void check_shape(const Tensor& tensor, const char* name, const std::vector<int64_t>& wanted) {
  require(bool(tensor), std::string(name) + " is missing");
  Tensor expected;
  expected.shape = wanted;
  require(tensor.shape == wanted, std::string(name) + " has the shape " + tensor.describe() + ", expected " +
                                      expected.describe());
}

int64_t side(const Tensor& tensor, const char* name, size_t rank, size_t index) {
  require(bool(tensor), std::string(name) + " is missing");
  require(tensor.shape.size() == rank, std::string(name) + " has the shape " + tensor.describe() + ", expected " +
                                           std::to_string(rank) + " sides");
  return tensor.shape[index];
}

Cache make_cache(const Tensor& data, const Tensor& scale, const char* name, const std::vector<int64_t>& scale_shape) {
  Cache cache{};
  cache.data = data.data;
  const std::string scale_name = std::string(name) + "'s scale";
  if (data.type == Type::int8) {
    require(scale.type == Type::float32 || !scale, scale_name + " is not float32");
    check_shape(scale, scale_name.c_str(), scale_shape);
    cache.type = CacheType::kInt8;
    cache.scales = scale.as<float>();
    return cache;
  }
  require(data.type == Type::float32 || data.type == Type::float16,
          std::string(name) + " has the element type " + std::to_string(int(data.type)) +
              ", expected float32, float16 or int8");
  require(!scale, scale_name + " is given, but only int8 has one");
  cache.type = data.type == Type::float32 ? CacheType::kFloat : CacheType::kHalf;
  return cache;
}

std::vector<int64_t> past_lengths(const Tensor& past, int64_t batch, int64_t tokens, int64_t capacity) {
  require(bool(past), "past_length is missing");
  const bool shared = past.shape.empty() || past.shape == std::vector<int64_t>{1};
  if (!shared) check_shape(past, "past_length", {batch});
  std::vector<int64_t> lengths(static_cast<size_t>(batch));
  for (size_t b = 0; b < lengths.size(); ++b) {
    lengths[b] = past.as<int64_t>()[shared ? 0 : b];
    require(lengths[b] >= 0 && lengths[b] <= capacity - tokens,
            "past_length is " + std::to_string(lengths[b]) + " with " + std::to_string(tokens) +
                " new tokens, but the cache has room for " + std::to_string(capacity));
  }
  return lengths;
}

void run(const Problem& problem, Isa isa, const Parallel& parallel) {
  bool (*attend)(const Problem&, const Parallel&) = attend_scalar;
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
    case Isa::avxvnni: attend = attend_avx2; break;
    case Isa::avx512:
    case Isa::avx512vnni: attend = attend_avx512; break;
#elif defined(__aarch64__)
    case Isa::neon:
    case Isa::dotprod: attend = attend_neon; break;
#endif
    default: break;
  }
  require(attend(problem, parallel), "out of memory");
}

}  // namespace attention
}  // namespace vl2

#include "attention/shapes.h"

#include <numeric>

#include "native/target.h"

namespace vl2 {
namespace attention {

bool attend_scalar(const Problem& problem, const Parallel& parallel);
bool attend_avx2(const Problem& problem, const Parallel& parallel);
bool attend_avx512(const Problem& problem, const Parallel& parallel);
bool attend_amx(const Problem& problem, const Parallel& parallel);
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

std::vector<int64_t> cache_rows(const Tensor& rows, int64_t batch, int64_t slots) {
  std::vector<int64_t> found(static_cast<size_t>(batch));
  std::iota(found.begin(), found.end(), 0);
  if (!rows) return found;
  check_shape(rows, "cache_row", {batch});
  std::vector<char> taken(static_cast<size_t>(slots));
  for (size_t b = 0; b < found.size(); ++b) {
    found[b] = rows.as<int64_t>()[b];
    require(found[b] >= 0 && found[b] < slots, "cache_row is " + std::to_string(found[b]) + ", but the cache has " +
                                                   std::to_string(slots) + " rows");
    require(!taken[static_cast<size_t>(found[b])]++, "cache_row has " + std::to_string(found[b]) + " twice");
  }
  return found;
}

namespace {

void shift(Rows& rows, int64_t b) {
  if (rows.plain) rows.plain += b * rows.plain_strides.batch;
  if (rows.rotary) rows.rotary += b * rows.rotary_strides.batch;
}

void shift(Cache& cache, int64_t rows) {
  if (!cache.data) return;
  cache.data = static_cast<char*>(cache.data) + rows * cache.width() * cache.element_size();
  if (cache.scales) cache.scales += rows * cache.parts();
}

// Batch entry b as a problem of its own.
Problem entry_of(const Problem& whole, int64_t b) {
  Problem p = whole;
  p.batch = 1;
  for (Rows* rows : {&p.query, &p.new_keys, &p.new_values}) shift(*rows, b);
  for (Cache* cache : {&p.keys, &p.values}) shift(*cache, whole.slot[b] * p.capacity * p.token_rows);
  p.cos += b * p.tokens * p.query.rotary_width;
  p.sin += b * p.tokens * p.query.rotary_width;
  p.past += b;
  p.slot += b;
  p.output += b * p.output_strides.batch;
  return p;
}

}  // namespace

void run(const Problem& problem, Isa isa, const Parallel& parallel) {
  bool (*attend)(const Problem&, const Parallel&) = attend_scalar;
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx2:
    case Isa::avxvnni: attend = attend_avx2; break;
    case Isa::avx512:
    case Isa::avx512vnni: attend = attend_avx512; break;
#if VL2_HAS_AMX
    case Isa::amx: attend = attend_amx; break;
#endif
#elif defined(__aarch64__)
    case Isa::neon:
    case Isa::dotprod: attend = attend_neon; break;
#endif
    default: break;
  }
  for (int64_t b = 0; b < problem.batch; ++b) require(attend(entry_of(problem, b), parallel), "out of memory");
}

}  // namespace attention
}  // namespace vl2

// Runs the attention kernels on every instruction set that the processor has and compares them with loops in float64.
// Compiled with sanitizers, or for another processor and run in an emulator. Buffers are exactly as large as the tensors.
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "attention/shapes.h"

using namespace vl2;
using namespace vl2::attention;

namespace {

std::mt19937 source(7);

std::unique_ptr<float[]> random_floats(int64_t count) {
  std::unique_ptr<float[]> made(new float[size_t(count)]);
  for (int64_t i = 0; i < count; ++i) made[size_t(i)] = std::uniform_real_distribution<float>(-1, 1)(source);
  return made;
}

// Sizes of one case: latent where rank is above 0, else rotary is the head size.
struct Case {
  int64_t tokens, past, heads, kv_heads, rank, rotary;
  int64_t width() const { return rank + rotary; }
};

// One cache of a case, and its rows below `past + tokens` as numbers, read back after the kernel wrote the new ones.
struct Held {
  std::unique_ptr<char[]> data;
  std::unique_ptr<float[]> scales;
  Cache cache;

  Held(const Case& c, CacheType type, int64_t plain, int64_t rotary) : cache{nullptr, nullptr, type, plain, rotary} {
    const int64_t rows = (c.past + c.tokens) * c.kv_heads, count = rows * (plain + rotary);
    data.reset(new char[size_t(count * cache.element_size())]);
    scales.reset(new float[size_t(rows * cache.parts())]);
    for (int64_t i = 0; i < rows * cache.parts(); ++i) scales[size_t(i)] = 0.01f;
    for (int64_t i = 0; i < count; ++i) {
      const float x = std::uniform_real_distribution<float>(-1, 1)(source);
      if (type == CacheType::kFloat) reinterpret_cast<float*>(data.get())[i] = x;
      if (type == CacheType::kHalf) reinterpret_cast<uint16_t*>(data.get())[i] = uint16_t(0x3800 + source() % 1024);
      if (type == CacheType::kInt8) data[size_t(i)] = char(int(x * 100));
    }
    cache.data = data.get();
    cache.scales = type == CacheType::kInt8 ? scales.get() : nullptr;
  }

  double number(int64_t row, int64_t column) const {
    const int64_t at = row * cache.width() + column;
    if (cache.type == CacheType::kFloat) return reinterpret_cast<const float*>(data.get())[at];
    const int64_t part = cache.parts() > 1 && column >= cache.plain_width;
    if (cache.type == CacheType::kInt8) return double(int8_t(data[size_t(at)])) * scales[size_t(row * cache.parts() + part)];
    const uint16_t half = reinterpret_cast<const uint16_t*>(data.get())[at];
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const double size = exponent ? std::ldexp(1 + fraction / 1024.0, exponent - 15) : std::ldexp(fraction, -24);
    return half & 0x8000 ? -size : size;
  }
};

void inline_run(void*, void (*task)(void*, size_t), size_t count, void* data) {
  for (size_t i = count; i-- > 0;) task(data, i);
}

// The rotated query of (t, h), times the scale.
std::vector<double> query_of(const Problem& p, const Case& c, int64_t t, int64_t h) {
  std::vector<double> q;
  for (int64_t i = 0; i < c.rank; ++i) q.push_back(p.query.plain[(h * c.tokens + t) * c.rank + i] * double(p.scale));
  const float* x = p.query.rotary + (t * c.heads + h) * c.rotary;
  const int64_t half = c.rotary / 2;
  for (int64_t i = 0; i < c.rotary; ++i) {
    const int64_t j = i % half, a = c.rank ? 2 * j : j, b = c.rank ? 2 * j + 1 : j + half;
    const double turned = i < half ? -double(x[b]) : double(x[a]), kept = i < half ? x[a] : x[b];
    q.push_back((kept * p.cos[t * c.rotary + i] + turned * p.sin[t * c.rotary + i]) * double(p.scale));
  }
  return q;
}

double largest_error(const Problem& p, const Case& c, const Held& keys, const Held& values) {
  double worst = 0;
  for (int64_t t = 0; t < c.tokens; ++t)
    for (int64_t h = 0; h < c.heads; ++h) {
      const std::vector<double> q = query_of(p, c, t, h);
      std::vector<double> sums(size_t(p.value_width));
      double total = 0;
      for (int64_t j = 0; j <= c.past + t; ++j) {
        const int64_t row = j * c.kv_heads + h / (c.heads / c.kv_heads);
        double score = 0;
        for (int64_t i = 0; i < c.width(); ++i) score += q[size_t(i)] * keys.number(row, i);
        total += std::exp(score);
        for (int64_t i = 0; i < p.value_width; ++i) sums[size_t(i)] += std::exp(score) * values.number(row, i);
      }
      const float* y = p.output + t * p.output_strides.token + h * p.output_strides.head;
      for (int64_t i = 0; i < p.value_width; ++i)
        worst = std::fmax(worst, std::isfinite(y[i]) ? std::fabs(y[i] - sums[size_t(i)] / total) : 1e9);
    }
  return worst;
}

double try_case(const Case& c, CacheType type, Isa isa) {
  const auto q = random_floats(c.tokens * c.heads * c.width()), rope = random_floats(c.tokens * c.heads * c.rotary);
  const auto k = random_floats(c.tokens * c.kv_heads * c.width()), v = random_floats(c.tokens * c.kv_heads * c.width());
  const auto cos = random_floats(c.tokens * c.rotary), sin = random_floats(c.tokens * c.rotary);
  const auto y = random_floats(c.tokens * c.heads * c.width());
  const bool latent = c.rank > 0;
  Held keys(c, type, c.rank, c.rotary), values(c, type, c.rotary, 0);
  const int64_t slot = 0;
  Problem p{};
  p.batch = 1, p.tokens = c.tokens, p.heads = c.heads, p.kv_heads = p.token_rows = c.kv_heads;
  p.capacity = c.past + c.tokens, p.causal = true;
  p.query = {q.get(), c.rank, {0, c.rank, c.tokens * c.rank}, rope.get(), c.rotary, {0, c.heads * c.rotary, c.rotary}, latent};
  p.new_keys = {k.get(), c.rank, {0, c.rank, 0}, v.get(), c.rotary, {0, c.kv_heads * c.rotary, c.rotary}, latent};
  p.new_values = {v.get(), c.rotary, {0, c.kv_heads * c.rotary, c.rotary}, nullptr, 0, {}, false};
  p.keys = keys.cache, p.value_width = latent ? c.rank : c.rotary;
  if (!latent) p.values = values.cache;
  p.cos = cos.get(), p.sin = sin.get(), p.past = &c.past, p.slot = &slot, p.scale = 0.3f, p.output = y.get();
  p.output_strides = latent ? p.query.plain_strides : p.query.rotary_strides;
  run(p, isa, {nullptr, inline_run});
  return largest_error(p, c, keys, latent ? keys : values);
}

}  // namespace

int main() {
  const Case cases[] = {{1, 0, 3, 3, 0, 10}, {1, 77, 4, 2, 0, 64}, {1, 150, 6, 1, 0, 18}, {40, 30, 2, 2, 0, 34},
                        {0, 5, 2, 2, 0, 8}, {1, 200, 5, 1, 33, 10}, {7, 20, 4, 1, 300, 16}, {3, 0, 16, 1, 64, 8}};
  int failures = 0;
  for (Isa isa : available_isas()) {
    for (const Case& c : cases)
      for (CacheType type : {CacheType::kFloat, CacheType::kHalf, CacheType::kInt8}) {
        const double error = try_case(c, type, isa);
        if (error <= 2e-5) continue;
        std::printf("%s: %ld tokens behind %ld, %ld heads of %ld + %ld, type %d: error %g\n", name_of(isa), long(c.tokens),
                    long(c.past), long(c.heads), long(c.rank), long(c.rotary), int(type), error);
        ++failures;
      }
    std::printf("%s done\n", name_of(isa));
  }
  return failures == 0 ? 0 : 1;
}

// One new token whose query heads are few to a kv head: keys and values are read once, in the order in which they lie, and
// head dimensions are the lanes. A part of kernel.h.
#pragma once

struct Stream {
  const Problem& p;
  int64_t chunk, chunks;  // tokens of a task, tasks of a batch entry
  float *q, *states;      // [batch, heads, width], [batch, chunks, state_floats()]

  // Of each head: summed values, largest score, sum of weights.
  int64_t state_floats() const { return p.heads * (p.value_width + 2); }
};

inline bool streams(const Problem& p) {
  return p.tokens == 1 && p.group() <= 4 && p.causal && !p.shared_values();
}

template <typename T>
inline float dot(const float* q, const T* key, int64_t width) {
  constexpr int kStep = 4 * Lanes::kLanes;
  Lanes::Reg sums[4] = {Lanes::zero(), Lanes::zero(), Lanes::zero(), Lanes::zero()};
  int64_t i = 0;
  for (; i + kStep <= width; i += kStep)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      sums[j] = Lanes::fma(load_lanes(key + i + j * Lanes::kLanes), Lanes::load(q + i + j * Lanes::kLanes), sums[j]);
  for (; i + Lanes::kLanes <= width; i += Lanes::kLanes)
    sums[0] = Lanes::fma(load_lanes(key + i), Lanes::load(q + i), sums[0]);
  float rest = 0.0f;
  for (; i < width; ++i) rest += load_one(key + i) * q[i];
  return Lanes::sum(Lanes::add(Lanes::add(sums[0], sums[1]), Lanes::add(sums[2], sums[3]))) + rest;
}

// o [width] += Σ over kTokens of weights[t] · value + t · stride.
template <int kTokens, typename T>
inline void add_values(const float* weights, const T* value, int64_t stride, int64_t width, float* o) {
  int64_t i = 0;
  for (; i + Lanes::kLanes <= width; i += Lanes::kLanes) {
    auto sum = Lanes::load(o + i);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
      sum = Lanes::fma(load_lanes(value + t * stride + i), Lanes::set1(weights[t]), sum);
    Lanes::store(o + i, sum);
  }
  for (; i < width; ++i)
    for (int t = 0; t < kTokens; ++t) o[i] += load_one(value + t * stride + i) * weights[t];
}

// Scores of every head [heads][padded] for n tokens of the cache from row `row` on.
template <typename T>
inline void stream_keys(const Problem& p, const float* q, int64_t row, int64_t n, int64_t padded, float* s) {
  constexpr int64_t kAhead = 4096;  // bytes
  const int64_t width = p.keys.width(), row_bytes = width * static_cast<int64_t>(sizeof(T));
  const T* key = static_cast<const T*>(p.keys.data) + row * width;
  for (int64_t t = 0; t < n; ++t)
    for (int64_t g = 0; g < p.kv_heads; ++g, key += width) {
      fetch(reinterpret_cast<const char*>(key) + kAhead, row_bytes);
      const float scale = p.keys.type == CacheType::kInt8 ? p.keys.scales[row + t * p.kv_heads + g] : 1.0f;
      for (int64_t h = g * p.group(); h < (g + 1) * p.group(); ++h)
        s[h * padded + t] = dot(q + h * width, key, width) * scale;
    }
}

template <typename T>
inline void stream_values(const Problem& p, const float* weights, int64_t row, int64_t n, int64_t padded, float* o) {
  const int64_t width = p.value_width, stride = p.kv_heads * width;
  const T* value = static_cast<const T*>(p.values.data) + row * width;
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T));
  int64_t t = 0;
  for (; t + 8 <= n; t += 8)
    for (int64_t h = 0; h < p.heads; ++h) {
      const T* first = value + t * stride + h / p.group() * width;
      if (h % p.group() == 0)
        for (int64_t i = 8; i < 16; ++i) fetch(first + i * stride, row_bytes);
      add_values<8>(weights + h * padded + t, first, stride, width, o + h * width);
    }
  for (; t < n; ++t)
    for (int64_t h = 0; h < p.heads; ++h)
      add_values<1>(weights + h * padded + t, value + t * stride + h / p.group() * width, stride, width, o + h * width);
}

// Scores s [padded] of n tokens become weights; largest and sum of one head.
inline void stream_softmax(float* s, int64_t n, int64_t padded, float* largest, float* sum) {
  for (int64_t t = n; t < padded; ++t) s[t] = -__builtin_inff();
  float top = -__builtin_inff();
  for (int64_t t = 0; t < n; ++t) top = s[t] > top ? s[t] : top;
  const auto base = finite_base(Lanes::set1(top));
  auto total = Lanes::zero();
  for (int64_t t = 0; t < padded; t += Lanes::kLanes) {
    const auto weight = exp_lanes(Lanes::sub(Lanes::load(s + t), base));
    total = Lanes::add(total, weight);
    Lanes::store(s + t, weight);
  }
  *largest = top;
  *sum = Lanes::sum(total);
}

template <typename T>
inline bool stream_chunk(const Stream& stream, int64_t index) {
  const Problem& p = stream.p;
  const int64_t b = index / stream.chunks, begin = index % stream.chunks * stream.chunk;
  const int64_t n = most(least(stream.chunk, p.past[b] + 1 - begin), 0);
  const int64_t padded = quotient_up(stream.chunk, Lanes::kLanes) * Lanes::kLanes;
  float* s = scratch(Scratch::own, static_cast<size_t>(p.heads * padded));
  if (!s) return false;
  float* o = stream.states + index * stream.state_floats();
  float *largest = o + p.heads * p.value_width, *sum = largest + p.heads;
  __builtin_memset(o, 0, static_cast<size_t>(p.heads * p.value_width) * sizeof(float));
  const int64_t row = (b * p.capacity + begin) * p.kv_heads;
  stream_keys<T>(p, stream.q + b * p.heads * p.query.width(), row, n, padded, s);
  for (int64_t h = 0; h < p.heads; ++h) {
    stream_softmax(s + h * padded, n, padded, largest + h, sum + h);
    if (p.values.type != CacheType::kInt8) continue;
    for (int64_t t = 0; t < n; ++t) s[h * padded + t] *= p.values.scales[row + t * p.kv_heads + h / p.group()];
  }
  stream_values<T>(p, s, row, n, padded, o);
  return true;
}

// Output of one head of one batch entry from its chunks.
inline void stream_merge(const Stream& stream, int64_t index) {
  const Problem& p = stream.p;
  const int64_t b = index / p.heads, h = index % p.heads, width = p.value_width;
  const float* states = stream.states + b * stream.chunks * stream.state_floats();
  float* out = p.output + b * p.output_strides.batch + h * p.output_strides.head;
  float top = -__builtin_inff(), sum = 0.0f;
  for (int64_t c = 0; c < stream.chunks; ++c) {
    const float largest = states[c * stream.state_floats() + p.heads * width + h];
    top = largest > top ? largest : top;
  }
  const auto base = finite_base(Lanes::set1(top));
  __builtin_memset(out, 0, static_cast<size_t>(width) * sizeof(float));
  for (int64_t c = 0; c < stream.chunks; ++c) {
    const float* state = states + c * stream.state_floats();
    float factors[Lanes::kLanes];
    Lanes::store(factors, exp_lanes(Lanes::sub(Lanes::set1(state[p.heads * width + h]), base)));
    sum += factors[0] * state[p.heads * (width + 1) + h];
    add_values<1>(factors, state + h * width, 0, width, out);
  }
  const float factor = 1.0f / sum;
  for (int64_t i = 0; i < width; ++i) out[i] *= factor;
}

template <typename T>
inline bool attend_streaming(const Problem& p, const Parallel& parallel) {
  constexpr int64_t kTasks = 16, kUnit = 16, kShortest = 32, kLongest = 512;
  const int64_t total = longest_past(p) + 1, width = p.query.width();
  const int64_t chunk = least(most(quotient_up(quotient_up(total, kTasks), kUnit) * kUnit, kShortest), kLongest);
  Stream stream{p, chunk, quotient_up(total, chunk), nullptr, nullptr};
  const int64_t states = p.batch * stream.chunks * stream.state_floats();
  stream.states = scratch(Scratch::shared, static_cast<size_t>(states + p.batch * p.heads * width));
  if (!stream.states) return false;
  stream.q = stream.states + states;
  for (int64_t i = 0; i < p.batch * p.heads; ++i) {
    gather_row(p.query, p, i / p.heads, 0, i % p.heads, stream.q + i * width);
    for (int64_t j = 0; j < width; ++j) stream.q[i * width + j] *= p.scale;
  }
  int failed = 0;
  each(parallel, p.batch * stream.chunks, true, [&](size_t i) {
    if (!stream_chunk<T>(stream, static_cast<int64_t>(i))) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
  });
  if (failed) return false;
  const bool much = p.batch * p.heads * stream.chunks * p.value_width > 65536;
  each(parallel, p.batch * p.heads, much, [&](size_t i) { stream_merge(stream, static_cast<int64_t>(i)); });
  return true;
}

// Rows of queries, keys and values: rotation, and the cache's types. A part of kernel.h.
#pragma once

inline Lanes::Reg load_lanes(const float* p) { return Lanes::load(p); }
inline Lanes::Reg load_lanes(const uint16_t* p) { return Lanes::load_half(p); }
inline Lanes::Reg load_lanes(const int8_t* p) { return Lanes::load_int8(p); }
inline float load_one(const float* p) { return *p; }
inline float load_one(const uint16_t* p) { return half_to_float(*p); }
inline float load_one(const int8_t* p) { return static_cast<float>(*p); }

inline float alone(float x) {
  __asm__("" : VL2_FLOAT_REGISTER(x));
  return x;
}

// out[i] = a·cos[i] − b·sin[i], out[i + half] = b·cos[i + half] + a·sin[i + half] for the pair (a, b) of i; products are
// rounded before the sum, as PyTorch does it, so that cached keys have the reference's bits.
inline void rotate_pair(float a, float b, const float* cos, const float* sin, int64_t i, int64_t half, float* out) {
  out[i] = alone(a * cos[i]) - alone(b * sin[i]);
  out[i + half] = alone(b * cos[i + half]) + alone(a * sin[i + half]);
}

inline void rotate(const float* x, const float* cos, const float* sin, int64_t width, bool interleaved, float* out) {
  const int64_t half = width / 2;
  int64_t i = 0;
  if (interleaved) {
    for (; i < half; ++i) rotate_pair(x[2 * i], x[2 * i + 1], cos, sin, i, half, out);
    return;
  }
  for (; i + Lanes::kLanes <= half; i += Lanes::kLanes) {
    const auto a = Lanes::load(x + i), b = Lanes::load(x + i + half);
    const auto ac = Lanes::alone(Lanes::mul(a, Lanes::load(cos + i)));
    const auto bs = Lanes::alone(Lanes::mul(b, Lanes::load(sin + i)));
    const auto bc = Lanes::alone(Lanes::mul(b, Lanes::load(cos + i + half)));
    const auto as = Lanes::alone(Lanes::mul(a, Lanes::load(sin + i + half)));
    Lanes::store(out + i, Lanes::sub(ac, bs));
    Lanes::store(out + i + half, Lanes::add(bc, as));
  }
  for (; i < half; ++i) rotate_pair(x[i], x[i + half], cos, sin, i, half, out);
}

// The row of (b, t, h), rotated, in out [rows.width()].
inline void gather_row(const Rows& rows, const Problem& p, int64_t b, int64_t t, int64_t h, float* out) {
  const Strides& plain = rows.plain_strides;
  if (rows.plain_width)
    __builtin_memcpy(out, rows.plain + b * plain.batch + t * plain.token + h * plain.head,
                     static_cast<size_t>(rows.plain_width) * sizeof(float));
  if (!rows.rotary_width) return;
  const Strides& rotary = rows.rotary_strides;
  const int64_t angle = (b * p.tokens + t) * rows.rotary_width;
  rotate(rows.rotary + b * rotary.batch + t * rotary.token + h * rotary.head, p.cos + angle, p.sin + angle,
         rows.rotary_width, rows.interleaved, out + rows.plain_width);
}

inline void store_half_row(const float* x, int64_t width, uint16_t* to) {
  int64_t i = 0;
  for (; i + Lanes::kLanes <= width; i += Lanes::kLanes) Lanes::store_half(to + i, Lanes::load(x + i));
  for (; i < width; ++i) to[i] = float_to_half(x[i]);
}

// Codes round(x / scale) with scale = max |x| / 127. A row with NaN or infinity becomes NaN as a whole; one whose scale
// is below the smallest normal float becomes zero.
inline float store_int8_row(const float* x, int64_t width, int8_t* to) {
  float largest = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < width; ++i) {
    const float magnitude = __builtin_fabsf(x[i]);
    largest = magnitude > largest ? magnitude : largest;
    finite &= magnitude <= 3.402823466e38f;
  }
  const float scale = largest / 127.0f;
  if (!finite || scale < 1.17549435e-38f) {
    for (int64_t i = 0; i < width; ++i) to[i] = 0;
    return finite ? 0.0f : __builtin_nanf("");
  }
  for (int64_t i = 0; i < width; ++i) to[i] = static_cast<int8_t>(__builtin_nearbyintf(x[i] / scale));
  return scale;
}

// Puts x [cache.width()] into row `row` of the cache.
inline void store_row(const Cache& cache, int64_t row, const float* x) {
  const int64_t width = cache.width(), start = row * width;
  if (cache.type == CacheType::kFloat) {
    __builtin_memcpy(static_cast<float*>(cache.data) + start, x, static_cast<size_t>(width) * sizeof(float));
  } else if (cache.type == CacheType::kHalf) {
    store_half_row(x, width, static_cast<uint16_t*>(cache.data) + start);
  } else {
    float* scale = cache.scales + row * cache.parts();
    int8_t* codes = static_cast<int8_t*>(cache.data) + start;
    if (cache.plain_width) *scale++ = store_int8_row(x, cache.plain_width, codes);
    if (cache.rotary_width) *scale = store_int8_row(x + cache.plain_width, cache.rotary_width, codes + cache.plain_width);
  }
}

template <typename T>
inline void expand(const T* from, int64_t width, float* to) {
  int64_t i = 0;
  for (; i + Lanes::kLanes <= width; i += Lanes::kLanes) Lanes::store(to + i, load_lanes(from + i));
  for (; i < width; ++i) to[i] = load_one(from + i);
}

inline void expand_codes(const int8_t* from, int64_t width, float scale, float* to) {
  const auto factor = Lanes::set1(scale);
  int64_t i = 0;
  for (; i + Lanes::kLanes <= width; i += Lanes::kLanes)
    Lanes::store(to + i, Lanes::mul(load_lanes(from + i), factor));
  for (; i < width; ++i) to[i] = load_one(from + i) * scale;
}

// Asks for `bytes` bytes from `at` on; hardware does not see through the order of the rows.
inline void fetch(const void* at, int64_t bytes) {
  constexpr int64_t kLine = 64;
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(at) + i);
}

// Columns [begin, end) of row `row` of the cache as floats.
__attribute__((always_inline)) inline void load_columns(const Cache& cache, int64_t row, int64_t begin, int64_t end, float* to) {
  const int64_t start = row * cache.width() + begin, split = cache.plain_width, width = end - begin;
  if (cache.type == CacheType::kFloat) {
    expand(static_cast<const float*>(cache.data) + start, width, to);
  } else if (cache.type == CacheType::kHalf) {
    expand(static_cast<const uint16_t*>(cache.data) + start, width, to);
  } else {
    const float* scales = cache.scales + row * cache.parts();
    const int8_t* codes = static_cast<const int8_t*>(cache.data) + start;
    const int64_t plain = begin < split ? (end < split ? end : split) - begin : 0;
    expand_codes(codes, plain, scales[0], to);
    expand_codes(codes + plain, width - plain, scales[cache.parts() - 1], to + plain);
  }
}

// 16 rows at once in plain C++: the reference of the other simd_*.h, which offer the same names.
//
// Floats: 16 numbers. Codes: 16 rows by 4 bytes. Dots: 16 sums of products of INT8. `code_at` gives column C of 8 (int4) or
// 4 (int8) as floats, `quads` four columns as bytes for `dot`; `low` and `high` are columns 0 … 3 and 4 … 7 of int4.
// `first_dots` begins a sum and `finish` ends it: one of them adds the offset.
constexpr int TILE_ROWS = 4, TILE_PANELS = 1, FAST_ROWS = 4, FAST_PANELS = 1;
constexpr unsigned FAST_SCHEMES = 1u << int(Scheme::int4) | 1u << int(Scheme::int8);
constexpr bool SIGNED_CODES = true;

struct Floats { float v[16]; };
struct Codes { uint8_t v[64]; };
struct Dots { int32_t v[16]; };

template <typename Function>
Floats each(const Function& function) {
  Floats result;
  for (int i = 0; i < 16; ++i) result.v[i] = function(i);
  return result;
}

float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3FF;
  uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
  if (exponent == 31) bits = sign | 0x7F800000 | fraction << 13;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  // subnormal halves are whole multiples of 2^-24
  if (exponent == 0) value = (sign ? -1.0f : 1.0f) * float(fraction) * 5.9604644775390625e-8f;
  return value;
}

Floats zero() { return Floats{}; }
Floats load(const float* p) { return each([&](int i) { return p[i]; }); }
void store(float* p, Floats a) { for (int i = 0; i < 16; ++i) p[i] = a.v[i]; }
Floats broadcast(float x) { return each([&](int) { return x; }); }
Floats add(Floats a, Floats b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
Floats mul(Floats a, Floats b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
Floats div(Floats a, Floats b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
Floats fma(Floats a, Floats b, Floats c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
Floats clamp(Floats a, float low, float high) {
  return each([&](int i) { return a.v[i] < low ? low : a.v[i] > high ? high : a.v[i]; });
}
Floats round(Floats a) { return each([&](int i) { return __builtin_nearbyintf(a.v[i]); }); }
// a · 2^n for whole n in −150 … 150.
Floats scale_by_power(Floats a, Floats n) {
  return each([&](int i) { return n.v[i] == n.v[i] ? __builtin_ldexpf(a.v[i], int(n.v[i])) : n.v[i]; });
}
Floats load_halves(const uint8_t* p) {
  uint16_t v[16];
  __builtin_memcpy(v, p, 32);
  return each([&](int i) { return half_to_float(v[i]); });
}
Floats load_bfloats(const uint8_t* p) {
  uint16_t v[16];
  __builtin_memcpy(v, p, 32);
  return each([&](int i) {
    const uint32_t bits = uint32_t(v[i]) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  });
}

Codes load_codes(const uint8_t* p) {
  Codes codes;
  __builtin_memcpy(codes.v, p, 64);
  return codes;
}
template <int C>
Floats int4_at(Codes codes) {
  return each([&](int i) { return float((codes.v[4 * i + C % 4] >> (C / 4 * 4) & 15) - 8); });
}
template <int C>
Floats int8_at(Codes codes) {
  return each([&](int i) { return float(int8_t(codes.v[4 * i + C])); });
}

Codes low(Codes codes) {
  for (uint8_t& byte : codes.v) byte &= 15;
  return codes;
}
Codes high(Codes codes) {
  for (uint8_t& byte : codes.v) byte >>= 4;
  return codes;
}
Codes bytes(Codes codes) { return codes; }
Dots first_dots(int32_t) { return Dots{}; }
// Adds four products a row; x: four INT8 codes.
Dots dot(Dots sum, Codes codes, const int8_t* x) {
  for (int i = 0; i < 16; ++i)
    for (int c = 0; c < 4; ++c) sum.v[i] += int8_t(codes.v[4 * i + c]) * x[c];
  return sum;
}
Floats finish(Dots sum, int32_t offset) { return each([&](int i) { return float(sum.v[i] + offset); }); }
// max |x| of 16 floats that are no NaN, and their nearest INT8 codes.
float largest(Floats a) {
  float most = 0;
  for (float x : a.v) most = __builtin_fabsf(x) > most ? __builtin_fabsf(x) : most;
  return most;
}
void store_rounded(int8_t* p, Floats a) {
  for (int i = 0; i < 16; ++i) p[i] = int8_t(__builtin_nearbyintf(a.v[i]));
}
bool has_nan(Floats a) {
  for (float x : a.v)
    if (x != x) return true;
  return false;
}

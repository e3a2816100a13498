// 16 rows at once with NEON, and its dot products where VL2_DOTPROD is 1. Names as in simd_scalar.h.
constexpr int TILE_ROWS = 6, TILE_PANELS = 1, FAST_ROWS = 4, FAST_PANELS = 1;
constexpr unsigned FAST_SCHEMES = VL2_DOTPROD ? 1u << int(Scheme::int4) | 1u << int(Scheme::int8) : 0;
constexpr bool SIGNED_CODES = true;

struct Floats { float32x4_t v[4]; };
struct Codes { uint8x16_t v[4]; };
struct Dots { int32x4_t v[4]; };

template <typename Function>
inline Floats each(const Function& f) { return {f(0), f(1), f(2), f(3)}; }

inline Floats broadcast(float x) { return each([&](int) { return vdupq_n_f32(x); }); }
inline Floats zero() { return broadcast(0); }
inline Floats load(const float* p) { return each([&](int i) { return vld1q_f32(p + 4 * i); }); }
inline void store(float* p, Floats a) { for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]); }
inline Floats add(Floats a, Floats b) { return each([&](int i) { return vaddq_f32(a.v[i], b.v[i]); }); }
inline Floats mul(Floats a, Floats b) { return each([&](int i) { return vmulq_f32(a.v[i], b.v[i]); }); }
inline Floats div(Floats a, Floats b) { return each([&](int i) { return vdivq_f32(a.v[i], b.v[i]); }); }
inline Floats fma(Floats a, Floats b, Floats c) { return each([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); }); }
// vminq and vmaxq give NaN where either side is
inline Floats clamp(Floats a, float low, float high) {
  return each([&](int i) { return vminq_f32(vdupq_n_f32(high), vmaxq_f32(vdupq_n_f32(low), a.v[i])); });
}
inline Floats round(Floats a) { return each([&](int i) { return vrndnq_f32(a.v[i]); }); }
inline Floats scale_by_power(Floats a, Floats n) {
  return each([&](int i) {
    // in two steps: 2^n itself may lie outside the floats
    const int32x4_t whole = vcvtnq_s32_f32(n.v[i]), half = vshrq_n_s32(whole, 1), bias = vdupq_n_s32(127);
    const float32x4_t first = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(half, bias), 23));
    const int32x4_t rest = vsubq_s32(whole, half);
    return vmulq_f32(vmulq_f32(a.v[i], first), vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(rest, bias), 23)));
  });
}
inline uint16x4_t four_halves(const uint8_t* p) { return vreinterpret_u16_u8(vld1_u8(p)); }
inline Floats load_halves(const uint8_t* p) {
  return each([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(four_halves(p + 8 * i))); });
}
inline Floats load_bfloats(const uint8_t* p) {
  return each([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(four_halves(p + 8 * i), 16)); });
}

inline Codes load_codes(const uint8_t* p) { return {vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}; }
// The top bits of each lane as a signed number: the conversion divides by 2^(32 − Bits).
template <int Shift, int Bits>
inline float32x4_t signed_field(uint8x16_t x) {
  const uint32x4_t raised = vshlq_n_u32(vreinterpretq_u32_u8(x), 32 - Bits - Shift);
  const uint32x4_t top = vandq_u32(raised, vdupq_n_u32(~0u << (32 - Bits)));
  return vcvtq_n_f32_s32(vreinterpretq_s32_u32(top), 32 - Bits);
}
template <int C>
inline Floats int4_at(Codes codes) {
  // q + 8 with its top bit flipped is q in two's complement
  const uint8x16_t flip = vdupq_n_u8(0x88);
  return each([&](int i) { return signed_field<C % 4 * 8 + C / 4 * 4, 4>(veorq_u8(codes.v[i], flip)); });
}
template <int C>
inline Floats int8_at(Codes codes) { return each([&](int i) { return signed_field<8 * C, 8>(codes.v[i]); }); }

inline Codes low(Codes codes) {
  for (uint8x16_t& part : codes.v) part = vandq_u8(part, vdupq_n_u8(15));
  return codes;
}
inline Codes high(Codes codes) {
  for (uint8x16_t& part : codes.v) part = vshrq_n_u8(part, 4);
  return codes;
}
inline Codes bytes(Codes codes) { return codes; }
inline Dots first_dots(int32_t) {
  const int32x4_t none = vdupq_n_s32(0);
  return {none, none, none, none};
}
inline Dots dot(Dots sum, Codes codes, const int8_t* x) {
#if VL2_DOTPROD
  int32_t word;
  __builtin_memcpy(&word, x, 4);
  const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(word));
  for (int i = 0; i < 4; ++i) sum.v[i] = vdotq_s32(sum.v[i], vreinterpretq_s8_u8(codes.v[i]), four);
#else
  (void)codes, (void)x;  // FAST_SCHEMES is empty
#endif
  return sum;
}
inline Floats finish(Dots sum, int32_t offset) {
  return each([&](int i) { return vcvtq_f32_s32(vaddq_s32(sum.v[i], vdupq_n_s32(offset))); });
}
inline float largest(Floats a) {
  float most = 0;
  for (float32x4_t part : a.v) most = vmaxvq_f32(vmaxq_f32(vabsq_f32(part), vdupq_n_f32(most)));
  return most;
}
inline void store_rounded(int8_t* p, Floats a) {
  int16x4_t words[4];
  for (int i = 0; i < 4; ++i) words[i] = vqmovn_s32(vcvtnq_s32_f32(a.v[i]));
  vst1_s8(p, vqmovn_s16(vcombine_s16(words[0], words[1])));
  vst1_s8(p + 8, vqmovn_s16(vcombine_s16(words[2], words[3])));
}
inline bool has_nan(Floats a) {
  for (float32x4_t part : a.v)
    if (vminvq_u32(vceqq_f32(part, part)) == 0) return true;
  return false;
}

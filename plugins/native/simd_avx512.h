// 16 rows at once with AVX-512 (F, BW, VL, DQ), and VNNI where VL2_VNNI is 1. Names as in simd_scalar.h.
constexpr int TILE_ROWS = 12, TILE_PANELS = 2, FAST_ROWS = 8, FAST_PANELS = 2;
constexpr unsigned FAST_SCHEMES = 1u << int(Scheme::int4) | unsigned(VL2_VNNI) << int(Scheme::int8);
constexpr bool SIGNED_CODES = false;

struct Floats { __m512 v; };
struct Codes { __m512i v; };
struct Dots { __m512i v; };

inline Floats zero() { return {_mm512_setzero_ps()}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
inline Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats div(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// the constant first: NaN in the second operand stays
inline Floats clamp(Floats a, float low, float high) {
  return {_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), a.v))};
}
inline Floats round(Floats a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Floats scale_by_power(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Floats load_halves(const uint8_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Floats load_bfloats(const uint8_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}

inline Codes load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
template <int C>
inline Floats int4_at(Codes codes) {
  // the permutation reads the low four bits of each lane, so that they need no mask
  const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(codes.v, C % 4 * 8 + C / 4 * 4), table)};
}
template <int C>
inline Floats int8_at(Codes codes) {
  return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(codes.v, 24 - 8 * C), 24))};
}

inline Codes low(Codes codes) { return {_mm512_and_si512(codes.v, _mm512_set1_epi8(15))}; }
inline Codes high(Codes codes) { return low({_mm512_srli_epi32(codes.v, 4)}); }
inline Codes bytes(Codes codes) { return {_mm512_xor_si512(codes.v, _mm512_set1_epi8(-128))}; }
inline __m512i four(const int8_t* x) {
  int32_t word;
  __builtin_memcpy(&word, x, 4);
  return _mm512_set1_epi32(word);
}
#if VL2_VNNI
// sums begin with the offset, which saves an addition
inline Dots first_dots(int32_t offset) { return {_mm512_set1_epi32(offset)}; }
inline Dots dot(Dots sum, Codes codes, const int8_t* x) { return {_mm512_dpbusd_epi32(sum.v, codes.v, four(x))}; }
inline Floats finish(Dots sum, int32_t) { return {_mm512_cvtepi32_ps(sum.v)}; }
#else
inline Dots first_dots(int32_t) { return {_mm512_setzero_si512()}; }
// 16-bit sums: a chunk of int4 adds 8 times two products of at most 15 · 127, 30,480 in all
inline Dots dot(Dots sum, Codes codes, const int8_t* x) {
  return {_mm512_add_epi16(sum.v, _mm512_maddubs_epi16(codes.v, four(x)))};
}
inline Floats finish(Dots sum, int32_t offset) {
  const __m512i wide = _mm512_madd_epi16(sum.v, _mm512_set1_epi16(1));
  return {_mm512_cvtepi32_ps(_mm512_add_epi32(wide, _mm512_set1_epi32(offset)))};
}
#endif
inline float largest(Floats a) { return _mm512_reduce_max_ps(_mm512_abs_ps(a.v)); }
inline void store_rounded(int8_t* p, Floats a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
inline bool has_nan(Floats a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }

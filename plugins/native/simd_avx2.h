// 16 rows at once with AVX2, FMA and F16C, and AVX-VNNI where VL2_VNNI is 1. Names as in simd_scalar.h.
constexpr int TILE_ROWS = 6, TILE_PANELS = 1, FAST_ROWS = 2, FAST_PANELS = 1;
constexpr unsigned FAST_SCHEMES = 1u << int(Scheme::int4) | unsigned(VL2_VNNI) << int(Scheme::int8);
constexpr bool SIGNED_CODES = false;

struct Floats { __m256 a, b; };
struct Codes { __m256i a, b; };
struct Dots { __m256i a, b; };

inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline Floats broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats div(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats fma(Floats x, Floats y, Floats z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline __m256 clamp8(__m256 x, float low, float high) {
  // the constant first: NaN in the second operand stays
  return _mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), x));
}
inline Floats clamp(Floats x, float low, float high) { return {clamp8(x.a, low, high), clamp8(x.b, low, high)}; }
inline Floats round(Floats x) {
  constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, NEAREST), _mm256_round_ps(x.b, NEAREST)};
}
inline __m256 scale8(__m256 x, __m256 n) {
  // in two steps: 2^n itself may lie outside the floats
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
  const __m256i rest = _mm256_sub_epi32(whole, half);
  const __m256 first = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 second = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(rest, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(x, first), second);
}
inline Floats scale_by_power(Floats x, Floats n) { return {scale8(x.a, n.a), scale8(x.b, n.b)}; }
inline __m128i half_line(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline Floats load_halves(const uint8_t* p) {
  return {_mm256_cvtph_ps(half_line(p)), _mm256_cvtph_ps(half_line(p + 16))};
}
inline __m256 widen_bfloats(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline Floats load_bfloats(const uint8_t* p) { return {widen_bfloats(half_line(p)), widen_bfloats(half_line(p + 16))}; }

inline Codes load_codes(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
template <int Shift, int Bits>
inline __m256 signed_field(__m256i x) {
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 32 - Bits - Shift), 32 - Bits));
}
template <int C>
inline Floats int4_at(Codes codes) {
  // q + 8 with its top bit flipped is q in two's complement
  const __m256i flip = _mm256_set1_epi8(char(0x88));
  constexpr int shift = C % 4 * 8 + C / 4 * 4;
  return {signed_field<shift, 4>(_mm256_xor_si256(codes.a, flip)), signed_field<shift, 4>(_mm256_xor_si256(codes.b, flip))};
}
template <int C>
inline Floats int8_at(Codes codes) { return {signed_field<8 * C, 8>(codes.a), signed_field<8 * C, 8>(codes.b)}; }

inline Codes low(Codes codes) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(codes.a, mask), _mm256_and_si256(codes.b, mask)};
}
inline Codes high(Codes codes) { return low({_mm256_srli_epi32(codes.a, 4), _mm256_srli_epi32(codes.b, 4)}); }
inline Codes bytes(Codes codes) {
  const __m256i flip = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(codes.a, flip), _mm256_xor_si256(codes.b, flip)};
}
inline Dots first_dots(int32_t) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline __m256i four(const int8_t* x) {
  int32_t word;
  __builtin_memcpy(&word, x, 4);
  return _mm256_set1_epi32(word);
}
#if VL2_VNNI
inline Dots dot(Dots sum, Codes codes, const int8_t* x) {
  const __m256i words = four(x);
  return {_mm256_dpbusd_avx_epi32(sum.a, codes.a, words), _mm256_dpbusd_avx_epi32(sum.b, codes.b, words)};
}
inline __m256 finish8(__m256i sum, int32_t offset) {
  return _mm256_cvtepi32_ps(_mm256_add_epi32(sum, _mm256_set1_epi32(offset)));
}
#else
// 16-bit sums: a chunk of int4 adds 8 times two products of at most 15 · 127, 30,480 in all
inline Dots dot(Dots sum, Codes codes, const int8_t* x) {
  const __m256i words = four(x);
  return {_mm256_add_epi16(sum.a, _mm256_maddubs_epi16(codes.a, words)),
          _mm256_add_epi16(sum.b, _mm256_maddubs_epi16(codes.b, words))};
}
inline __m256 finish8(__m256i sum, int32_t offset) {
  const __m256i wide = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
  return _mm256_cvtepi32_ps(_mm256_add_epi32(wide, _mm256_set1_epi32(offset)));
}
#endif
inline Floats finish(Dots sum, int32_t offset) { return {finish8(sum.a, offset), finish8(sum.b, offset)}; }
inline float largest(Floats x) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
  const __m256 eight = _mm256_max_ps(_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask));
  __m128 most = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  return _mm_cvtss_f32(_mm_max_ss(most, _mm_shuffle_ps(most, most, 1)));
}
inline void store_rounded(int8_t* p, Floats x) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8);
  const __m128i low = _mm256_castsi256_si128(ordered), high = _mm256_extracti128_si256(ordered, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(low, high));
}
inline bool has_nan(Floats x) { 
  return _mm256_movemask_ps(_mm256_cmp_ps(x.a, x.b, _CMP_UNORD_Q)) != 0;
}

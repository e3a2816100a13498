// 16 lanes: AVX512F. A part of kernel.h.
#pragma once

#include "attention/numbers.h"

struct Lanes {
  static constexpr int kLanes = 16;
  static constexpr int kTokens = 8;
  using Reg = __m512;

  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set1(float x) { return _mm512_set1_ps(x); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Reg x) { _mm512_storeu_ps(p, x); }
  static Reg load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static void store_half(uint16_t* p, Reg x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static Reg load_int8(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg where_less(Reg a, Reg b, Reg yes, Reg no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }
  static Reg round(Reg x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Reg pow2(Reg n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
  }
  // Keeps the compiler from fusing a product into a sum.
  static Reg alone(Reg x) {
    __asm__("" : "+v"(x));
    return x;
  }
  // Rows of a 16 × 16 matrix become its columns.
  static void transpose(Reg* x) {
    Reg y[16];
    for (int i = 0; i < 16; i += 2) {
      y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
      y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
      for (int j = 0; j < 4; ++j) {
        const __m512d a = _mm512_castps_pd(y[i + j / 2]), b = _mm512_castps_pd(y[i + j / 2 + 2]);
        x[i + j] = _mm512_castpd_ps(j % 2 ? _mm512_unpackhi_pd(a, b) : _mm512_unpacklo_pd(a, b));
      }
    // now the 128-bit parts of x[i + j] are rows i to i + 3 of the columns j, j + 4, j + 8, j + 12
    for (int j = 0; j < 4; ++j) {
      const Reg a = _mm512_shuffle_f32x4(x[j], x[j + 4], 0x44), b = _mm512_shuffle_f32x4(x[j + 8], x[j + 12], 0x44);
      const Reg c = _mm512_shuffle_f32x4(x[j], x[j + 4], 0xee), d = _mm512_shuffle_f32x4(x[j + 8], x[j + 12], 0xee);
      x[j] = _mm512_shuffle_f32x4(a, b, 0x88);
      x[j + 4] = _mm512_shuffle_f32x4(a, b, 0xdd);
      x[j + 8] = _mm512_shuffle_f32x4(c, d, 0x88);
      x[j + 12] = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
  }
  static float sum(Reg x) { return _mm512_reduce_add_ps(x); }
};


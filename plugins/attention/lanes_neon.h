// 4 lanes: NEON of AArch64. A part of kernel.h.
#pragma once

#include "attention/numbers.h"

struct Lanes {
  static constexpr int kLanes = 4;
  static constexpr int kTokens = 8;
  using Reg = float32x4_t;

  static Reg zero() { return vdupq_n_f32(0.0f); }
  static Reg set1(float x) { return vdupq_n_f32(x); }
  static Reg load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, Reg x) { vst1q_f32(p, x); }
  static Reg load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static void store_half(uint16_t* p, Reg x) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }
  static Reg load_int8(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    const int8x8_t codes = vreinterpret_s8_s32(vdup_n_s32(four));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(codes))));
  }
  static Reg add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static Reg sub(Reg a, Reg b) { return vsubq_f32(a, b); }
  static Reg mul(Reg a, Reg b) { return vmulq_f32(a, b); }
  static Reg div(Reg a, Reg b) { return vdivq_f32(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  static Reg max(Reg a, Reg b) { return vmaxq_f32(a, b); }
  static Reg where_less(Reg a, Reg b, Reg yes, Reg no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
  static Reg round(Reg x) { return vrndnq_f32(x); }
  static Reg pow2(Reg n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23));
  }
  // Keeps the compiler from fusing a product into a sum.
  static Reg alone(Reg x) {
    __asm__("" : "+w"(x));
    return x;
  }
  // Rows of a 4 × 4 matrix become its columns.
  static void transpose(Reg* x) {
    const Reg a = vtrn1q_f32(x[0], x[1]), b = vtrn2q_f32(x[0], x[1]);
    const Reg c = vtrn1q_f32(x[2], x[3]), d = vtrn2q_f32(x[2], x[3]);
    x[0] = vcombine_f32(vget_low_f32(a), vget_low_f32(c));
    x[1] = vcombine_f32(vget_low_f32(b), vget_low_f32(d));
    x[2] = vcombine_f32(vget_high_f32(a), vget_high_f32(c));
    x[3] = vcombine_f32(vget_high_f32(b), vget_high_f32(d));
  }
  static float sum(Reg x) { return vaddvq_f32(x); }
};


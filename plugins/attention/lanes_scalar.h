// One lane: the reference of the other instruction sets. A part of kernel.h.
#pragma once

#include "attention/numbers.h"

struct Lanes {
  static constexpr int kLanes = 1;
  static constexpr int kTokens = 8;  // tokens of one step of the tile kernels
  using Reg = float;

  static Reg zero() { return 0.0f; }
  static Reg set1(float x) { return x; }
  static Reg load(const float* p) { return *p; }
  static void store(float* p, Reg x) { *p = x; }
  static Reg load_half(const uint16_t* p) { return half_to_float(*p); }
  static void store_half(uint16_t* p, Reg x) { *p = float_to_half(x); }
  static Reg load_int8(const int8_t* p) { return static_cast<float>(*p); }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }  // b where either is NaN
  static Reg where_less(Reg a, Reg b, Reg yes, Reg no) { return a < b ? yes : no; }
  static Reg round(Reg x) { return __builtin_nearbyintf(x); }
  static Reg pow2(Reg n) {
    return n >= -126.0f ? bits_to_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23) : 0.0f;
  }
  // Keeps the compiler from fusing a product into a sum.
  static Reg alone(Reg x) {
    __asm__("" : VL2_FLOAT_REGISTER(x));
    return x;
  }
  static void transpose(Reg*) {}
  static float sum(Reg x) { return x; }
};


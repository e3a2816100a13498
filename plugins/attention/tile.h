// The two products of a tile: query rows lie in the lanes of kRegs registers, keys and values are broadcast, so that any
// head size works without remainders. A part of kernel.h.
#pragma once

// Columns that lie together: the distance of tokens is a constant, so that one address register serves a step's tokens.
constexpr int64_t kSegment = 64;

// Keys or values of n tokens in segments [width / kSegment][tokens][kSegment]. ahead: bytes to fetch meanwhile,
// `ahead_step` for every dimension of a step of tokens; null for none.
struct Tile {
  const float* segments;
  int64_t tokens, n;
  const char* ahead;
  int64_t ahead_step;
};

constexpr int64_t segmented(int64_t width) { return (width + kSegment - 1) / kSegment * kSegment; }

// s [kTokens][kRegs · kLanes] = q [width][kRegs · kLanes] · keys of kTokens neighbouring tokens.
template <int kRegs, int kTokens>
inline void score_tokens(const float* q, int64_t width, const Tile& tile, int64_t first, float* s) {
  constexpr int kRow = kRegs * Lanes::kLanes;
  const char* ahead = tile.ahead ? tile.ahead + first / kTokens * width * tile.ahead_step : nullptr;
  Lanes::Reg sums[kTokens][kRegs];
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 2
    for (int r = 0; r < kRegs; ++r) sums[t][r] = Lanes::zero();
  for (int64_t begin = 0; begin < width; begin += kSegment) {
    const float* key = tile.segments + begin * tile.tokens + first * kSegment;
    const int64_t columns = width - begin < kSegment ? width - begin : kSegment;
    for (int64_t i = 0; i < columns; ++i, q += kRow) {
      if (ahead) __builtin_prefetch(ahead + (begin + i) * tile.ahead_step);
      Lanes::Reg query[kRegs];
#pragma GCC unroll 2
      for (int r = 0; r < kRegs; ++r) query[r] = Lanes::load(q + r * Lanes::kLanes);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        const auto x = Lanes::set1(key[t * kSegment + i]);
#pragma GCC unroll 2
        for (int r = 0; r < kRegs; ++r) sums[t][r] = Lanes::fma(x, query[r], sums[t][r]);
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 2
    for (int r = 0; r < kRegs; ++r) Lanes::store(s + t * kRow + r * Lanes::kLanes, sums[t][r]);
}

// Tokens of one step: all registers of sums that the instruction set has.
template <int kRegs>
constexpr int tokens_per_step() { return kRegs == 1 ? 2 * Lanes::kTokens : Lanes::kTokens; }

// s [tile.n][kRegs · kLanes].
template <int kRegs>
inline void score_tile(const float* q, int64_t width, const Tile& tile, float* s) {
  constexpr int kRow = kRegs * Lanes::kLanes, kStep = tokens_per_step<kRegs>();
  int64_t t = 0;
  for (; t + kStep <= tile.n; t += kStep) score_tokens<kRegs, kStep>(q, width, tile, t, s + t * kRow);
  for (; t + 4 <= tile.n; t += 4) score_tokens<kRegs, 4>(q, width, tile, t, s + t * kRow);
  for (; t < tile.n; ++t) score_tokens<kRegs, 1>(q, width, tile, t, s + t * kRow);
}

// o [kColumns][kRegs · kLanes] = o · keep + Σ over tokens of weights · values of kColumns neighbouring columns.
template <int kRegs, int kColumns>
inline void value_columns(const float* weights, const Lanes::Reg* keep, const Tile& tile, int64_t first, float* o) {
  constexpr int kRow = kRegs * Lanes::kLanes;
  const float* value = tile.segments + first / kSegment * kSegment * tile.tokens + first % kSegment;
  Lanes::Reg sums[kColumns][kRegs];
#pragma GCC unroll 16
  for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 2
    for (int r = 0; r < kRegs; ++r)
      sums[c][r] = Lanes::mul(Lanes::load(o + c * kRow + r * Lanes::kLanes), keep[r]);
  for (int64_t t = 0; t < tile.n; ++t) {
    Lanes::Reg weight[kRegs];
#pragma GCC unroll 2
    for (int r = 0; r < kRegs; ++r) weight[r] = Lanes::load(weights + t * kRow + r * Lanes::kLanes);
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) {
      const auto x = Lanes::set1(value[t * kSegment + c]);
#pragma GCC unroll 2
      for (int r = 0; r < kRegs; ++r) sums[c][r] = Lanes::fma(x, weight[r], sums[c][r]);
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 2
    for (int r = 0; r < kRegs; ++r) Lanes::store(o + c * kRow + r * Lanes::kLanes, sums[c][r]);
}

// o [width][kRegs · kLanes].
template <int kRegs>
inline void value_tile(const float* weights, const Lanes::Reg* keep, const Tile& tile, int64_t width, float* o) {
  constexpr int kRow = kRegs * Lanes::kLanes, kStep = tokens_per_step<kRegs>();
  for (int64_t begin = 0; begin < width; begin += kSegment) {
    const int64_t end = width - begin < kSegment ? width : begin + kSegment;
    int64_t c = begin;
    for (; c + kStep <= end; c += kStep) value_columns<kRegs, kStep>(weights, keep, tile, c, o + c * kRow);
    for (; c + 4 <= end; c += 4) value_columns<kRegs, 4>(weights, keep, tile, c, o + c * kRow);
    for (; c < end; ++c) value_columns<kRegs, 1>(weights, keep, tile, c, o + c * kRow);
  }
}

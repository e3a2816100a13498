// Few query rows over a cache: keys and values become terms in the first-level cache while the chunk before is
// multiplied. A part of kernel_amx.cc.
#pragma once

// A chunk of the keys of 8 tokens from column c on; what lies kAhead tokens further is asked for.
inline void pack_eight_keys(const FloatRows& keys, int64_t c, int64_t first, int64_t n, uint16_t* to) {
  constexpr int64_t kAhead = 64;
  const __mmask16 low = lanes_below(keys.width - c), high = lanes_below(keys.width - c - kRows);
  const float* from = keys.data + first * keys.stride + c;
  to += first / kRows * kTermed + first % kRows * kPairs;
  for (int64_t i = first; i < least(n, first + 8); ++i, from += keys.stride, to += kPairs) {
    __builtin_prefetch(from + kAhead * keys.stride, 0, 2);
    __builtin_prefetch(from + kAhead * keys.stride + kRows, 0, 2);
    store_terms(_mm512_maskz_loadu_ps(low, from), _mm512_maskz_loadu_ps(high, from + kRows), to);
  }
}

// Scores s [32][16] of n <= 32 tokens; q: their terms; space: 4 · kTermed numbers for two chunks; rest: space like s.
inline void stream_scores(const uint16_t* q, const FloatRows& keys, int64_t n, uint16_t* space, float* s, float* rest) {
  clear_scores();
  uint16_t *now = space, *before = space + 2 * kTermed;
  const int64_t chunks = quotient_up(keys.width, kPairs);
  for (int64_t k = 0; k < chunks; ++k) {
    const int64_t c = k * kPairs;
    pack_eight_keys(keys, c, 0, n, now);
    if (k) add_score_quarter<0>(q, before, before + kTermed);
    pack_eight_keys(keys, c, 8, n, now);
    if (k) add_score_quarter<1>(q, before, before + kTermed);
    pack_eight_keys(keys, c, 16, n, now);
    if (k) add_score_quarter<2>(q, before, before + kTermed);
    pack_eight_keys(keys, c, 24, n, now);
    if (k) add_score_quarter<3>(q, before, before + kTermed), q += kTermed;
    uint16_t* swap = now;
    now = before, before = swap;
  }
  add_score_chunk(q, before, before + kTermed);
  store_scores(s, rest);
}

// 16 columns of o [16][stride], or of zeros where `fresh`, += weights in tiles 2, 3, 4 (and 5, 6, 7 with two steps)
// · values.
template <int STEPS>
inline void add_streamed_values(const uint16_t* values, bool fresh, float* o, int64_t stride) {
  const size_t bytes = static_cast<size_t>(stride) * sizeof(float);
  if (fresh) tile_zero<0>();
  else tile_load<0>(o, bytes);
  tile_load<1>(values), tile_dot_bf16<0, 2, 1>(), tile_dot_bf16<0, 3, 1>(), tile_dot_bf16<0, 4, 1>();
  tile_load<1>(values + kTile), tile_dot_bf16<0, 2, 1>(), tile_dot_bf16<0, 3, 1>();
  tile_load<1>(values + 2 * kTile), tile_dot_bf16<0, 2, 1>();
  if constexpr (STEPS == 2) {
    values += kTermed;
    tile_load<1>(values), tile_dot_bf16<0, 5, 1>(), tile_dot_bf16<0, 6, 1>(), tile_dot_bf16<0, 7, 1>();
    tile_load<1>(values + kTile), tile_dot_bf16<0, 5, 1>(), tile_dot_bf16<0, 6, 1>();
    tile_load<1>(values + 2 * kTile), tile_dot_bf16<0, 5, 1>();
  }
  tile_store<0>(o, bytes);
}

// o [16][stride], or zeros where `fresh`, += weights · values of n <= 32 · STEPS tokens; weights: their terms; space as
// in stream_scores.
template <int STEPS>
inline void stream_term_values(const uint16_t* weights, const FloatRows& values, int64_t n, bool fresh, uint16_t* space,
                               float* o, int64_t stride) {
  tile_load<2>(weights), tile_load<3>(weights + kTile), tile_load<4>(weights + 2 * kTile);
  if constexpr (STEPS == 2)
    tile_load<5>(weights + kTermed), tile_load<6>(weights + kTermed + kTile),
        tile_load<7>(weights + kTermed + 2 * kTile);
  uint16_t *now = space, *before = space + 2 * kTermed;
  for (int64_t c = 0; c < values.width; c += kRows) {
    for (int64_t step = 0; step < STEPS; ++step) pack_value_tile(values, step * kPairs, n, c, now + step * kTermed);
    if (c) add_streamed_values<STEPS>(before, fresh, o + c - kRows, stride);
    uint16_t* swap = now;
    now = before, before = swap;
  }
  add_streamed_values<STEPS>(before, fresh, o + (quotient_up(values.width, kRows) - 1) * kRows, stride);
}

// The two products of a tile of tokens by AMX. A part of kernel_amx.cc.
#pragma once

// A quarter of the products of one chunk of columns: tiles 0 and 1 are scores of two blocks of 16 tokens, `keys` and
// `other`, 2 and 3 their smaller pairs of terms; 4, 5, 6 hold the queries' terms from the first quarter on.
template <int QUARTER>
inline void add_score_quarter(const uint16_t* q, const uint16_t* keys, const uint16_t* other) {
  if constexpr (QUARTER == 0) {
    tile_load<4>(q), tile_load<5>(q + kTile), tile_load<6>(q + 2 * kTile), tile_load<7>(keys);
    tile_dot_bf16<0, 7, 4>(), tile_dot_bf16<2, 7, 6>(), tile_dot_bf16<0, 7, 5>();
  } else if constexpr (QUARTER == 1) {
    tile_load<7>(other);
    tile_dot_bf16<1, 7, 4>(), tile_dot_bf16<3, 7, 6>(), tile_dot_bf16<1, 7, 5>();
  } else if constexpr (QUARTER == 2) {
    tile_load<7>(keys + kTile), tile_dot_bf16<0, 7, 4>(), tile_dot_bf16<2, 7, 5>();
    tile_load<7>(other + kTile), tile_dot_bf16<1, 7, 4>(), tile_dot_bf16<3, 7, 5>();
  } else {
    tile_load<7>(keys + 2 * kTile), tile_dot_bf16<2, 7, 4>();
    tile_load<7>(other + 2 * kTile), tile_dot_bf16<3, 7, 4>();
  }
}

inline void add_score_chunk(const uint16_t* q, const uint16_t* keys, const uint16_t* other) {
  add_score_quarter<0>(q, keys, other), add_score_quarter<1>(q, keys, other);
  add_score_quarter<2>(q, keys, other), add_score_quarter<3>(q, keys, other);
}

inline void clear_scores() { tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>(); }

// s [32 tokens][16 rows]; rest: space like s.
inline void store_scores(float* s, float* rest) {
  tile_store<0>(s), tile_store<1>(s + kRows * kRows);
  tile_store<2>(rest), tile_store<3>(rest + kRows * kRows);
  for (int64_t i = 0; i < kPairs * kRows; i += kRows)
    _mm512_storeu_ps(s + i, _mm512_add_ps(_mm512_loadu_ps(s + i), _mm512_loadu_ps(rest + i)));
}

// Scores of one step; keys: its two blocks of tokens, `chunks` chunks each.
inline void score_step(const uint16_t* q, const uint16_t* keys, int64_t chunks, float* s, float* rest) {
  clear_scores();
  for (int64_t k = 0; k < chunks * kTermed; k += kTermed) add_score_chunk(q + k, keys + k, keys + chunks * kTermed + k);
  store_scores(s, rest);
}

// Tile `SUM`, 16 columns of sums, += weights in tiles 4, 5, 6 · values.
template <int SUM>
inline void add_value_tile(const uint16_t* values) {
  tile_load<7>(values);
  tile_dot_bf16<SUM, 4, 7>(), tile_dot_bf16<SUM, 5, 7>(), tile_dot_bf16<SUM, 6, 7>();
  tile_load<7>(values + kTile);
  tile_dot_bf16<SUM, 4, 7>(), tile_dot_bf16<SUM, 5, 7>();
  tile_load<7>(values + 2 * kTile);
  tile_dot_bf16<SUM, 4, 7>();
}

// o [16 rows][stride] += weights · values of COUNT times 16 columns; values: of the first step, `columns` tiles a step.
template <int COUNT>
inline void add_value_columns(const uint16_t* weights, const uint16_t* values, int64_t steps, int64_t columns, float* o,
                              int64_t stride) {
  const size_t bytes = static_cast<size_t>(stride) * sizeof(float);
  tile_load<0>(o, bytes);
  if constexpr (COUNT > 1) tile_load<1>(o + kRows, bytes);
  if constexpr (COUNT > 2) tile_load<2>(o + 2 * kRows, bytes);
  if constexpr (COUNT > 3) tile_load<3>(o + 3 * kRows, bytes);
  for (int64_t step = 0; step < steps; ++step, weights += kTermed, values += columns * kTermed) {
    tile_load<4>(weights), tile_load<5>(weights + kTile), tile_load<6>(weights + 2 * kTile);
    add_value_tile<0>(values);
    if constexpr (COUNT > 1) add_value_tile<1>(values + kTermed);
    if constexpr (COUNT > 2) add_value_tile<2>(values + 2 * kTermed);
    if constexpr (COUNT > 3) add_value_tile<3>(values + 3 * kTermed);
  }
  tile_store<0>(o, bytes);
  if constexpr (COUNT > 1) tile_store<1>(o + kRows, bytes);
  if constexpr (COUNT > 2) tile_store<2>(o + 2 * kRows, bytes);
  if constexpr (COUNT > 3) tile_store<3>(o + 3 * kRows, bytes);
}

// o [16 rows][stride] += weights · values.
inline void add_values(const uint16_t* weights, const uint16_t* values, int64_t steps, int64_t columns, float* o,
                       int64_t stride) {
  int64_t c = 0;
  for (; c + 4 <= columns && columns - c != 5; c += 4)
    add_value_columns<4>(weights, values + c * kTermed, steps, columns, o + c * kRows, stride);
  for (; c + 3 <= columns; c += 3)
    add_value_columns<3>(weights, values + c * kTermed, steps, columns, o + c * kRows, stride);
  if (columns - c == 2) add_value_columns<2>(weights, values + c * kTermed, steps, columns, o + c * kRows, stride);
  if (columns - c == 1) add_value_columns<1>(weights, values + c * kTermed, steps, columns, o + c * kRows, stride);
}

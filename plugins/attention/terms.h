// Numbers as sums of three of bfloat16, in the tiles that AMX multiplies. A part of kernel_amx.cc.
//
// Cutting a float's significand of 24 bits behind the 8th and 16th gives three terms that are exact. Of a product's
// nine pairs of terms the six largest are taken: what is left out is below 2^-22 of the product. NaN and infinity give
// NaN, subnormal terms (of numbers below 2^-110) count as 0.
#pragma once

constexpr int kTerms = 3;
constexpr int64_t kRows = 16, kPairs = 32;       // rows of a tile; numbers of its rows, the pairs (i, i + 16) of 32
constexpr int64_t kTile = kRows * kPairs;        // numbers of a tile
constexpr int64_t kTermed = kTerms * kTile;      // of a tile's terms, one behind the other

// Upper halves of a beside those of b, in the lower and the upper halves.
inline __m512i upper_halves(__m512 a, __m512 b) {
  const __m512i down = _mm512_broadcast_i32x4(_mm_setr_epi8(2, 3, 0, 0, 6, 7, 0, 0, 10, 11, 0, 0, 14, 15, 0, 0));
  return _mm512_mask_shuffle_epi8(_mm512_castps_si512(b), 0x3333333333333333, _mm512_castps_si512(a), down);
}

inline __m512 without_upper_half(__m512 x) {
  return _mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(-65536))));
}

// Row of a tile whose pairs are (a[i], b[i]); its terms lie kTile apart.
inline void store_terms(__m512 a, __m512 b, uint16_t* to) {
  _mm512_storeu_si512(to, upper_halves(a, b));
  a = without_upper_half(a), b = without_upper_half(b);
  _mm512_storeu_si512(to + kTile, upper_halves(a, b));
  a = without_upper_half(a), b = without_upper_half(b);
  _mm512_storeu_si512(to + 2 * kTile, upper_halves(a, b));
}

// Rows of keys or values: row i at data + i · stride.
struct FloatRows {
  const float* data;
  int64_t stride, width;
};

inline __mmask16 lanes_below(int64_t count) {
  return count >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << most(count, 0)) - 1);
}

// Keys of n tokens as the left factor: [blocks of 16 tokens][width / 32][terms] tiles, a token a row. What lies in rows
// of no token is left there: a row of a product depends on its own row only. Tile by tile: a token's rows of all tiles
// are apart by a power of two and would fall into few sets of the first-level cache.
inline void pack_keys(const FloatRows& keys, int64_t n, uint16_t* to) {
  for (int64_t t = 0; t < n; t += kRows)
    for (int64_t c = 0; c < keys.width; c += kPairs, to += kTermed) {
      const __mmask16 low = lanes_below(keys.width - c), high = lanes_below(keys.width - c - kRows);
      const float* from = keys.data + t * keys.stride + c;
      for (int64_t i = 0; i < least(n - t, kRows); ++i, from += keys.stride)
        store_terms(_mm512_maskz_loadu_ps(low, from), _mm512_maskz_loadu_ps(high, from + kRows), to + i * kPairs);
    }
}

// The terms of 16 columns from c on of the values of tokens t … t + 32; row i holds tokens t + i and t + i + 16, zeros
// from token n on.
inline void pack_value_tile(const FloatRows& values, int64_t t, int64_t n, int64_t c, uint16_t* to) {
  const __mmask16 there = lanes_below(values.width - c);
  const float* from = values.data + t * values.stride + c;
  for (int64_t i = t; i < t + kRows; ++i, from += values.stride, to += kPairs)
    store_terms(_mm512_maskz_loadu_ps(i < n ? there : 0, from),
                _mm512_maskz_loadu_ps(i + kRows < n ? there : 0, from + kRows * values.stride), to);
}

// Values of n tokens as the right factor: [tokens / 32][width / 16][terms] tiles.
inline void pack_values(const FloatRows& values, int64_t n, uint16_t* to) {
  for (int64_t t = 0; t < n; t += kPairs)
    for (int64_t c = 0; c < values.width; c += kRows, to += kTermed) pack_value_tile(values, t, n, c, to);
}

// Queries [width][16] as the right factor: [width / 32][terms] tiles; row i holds columns i and i + 16 of 32.
inline void pack_queries(const float* q, int64_t width, uint16_t* to) {
  for (int64_t begin = 0; begin < width; begin += kPairs, to += kTermed)
    for (int64_t i = begin; i < begin + kRows; ++i) {
      const __m512 first = i < width ? _mm512_loadu_ps(q + i * kRows) : _mm512_setzero_ps();
      const __m512 second = i + kRows < width ? _mm512_loadu_ps(q + (i + kRows) * kRows) : _mm512_setzero_ps();
      store_terms(first, second, to + (i - begin) * kPairs);
    }
}

// Weights [steps · 32 tokens][16 rows] as the left factor: [steps][terms] tiles, a row of queries a row.
inline void pack_weights(const float* weights, int64_t steps, uint16_t* to) {
  for (int64_t step = 0; step < steps; ++step, weights += kPairs * kRows, to += kTermed) {
    __m512 first[kRows], second[kRows];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) first[i] = _mm512_loadu_ps(weights + i * kRows);
    Lanes::transpose(first);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) second[i] = _mm512_loadu_ps(weights + (kRows + i) * kRows);
    Lanes::transpose(second);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) store_terms(first[i], second[i], to + i * kPairs);
  }
}

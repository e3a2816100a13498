// Numbers as tiles of bfloat16: rows of activations as terms, weights as pairs of columns.

constexpr size_t TILE_NUMBERS = TILE_BYTES / 2;
constexpr int EXACT_TERMS = 3;

struct Words {
  uint16_t at[32];
};
// Indices of 16-bit numbers for permutations, begin + i · step + (i is odd) · odd.
constexpr Words words(int begin, int halves, int step, int odd) {
  Words made{};
  for (int i = 0; i < 32; ++i) made.at[i] = uint16_t(begin + i / halves * step + i % 2 * odd);
  return made;
}
alignas(64) constexpr Words UPPER_HALVES = words(1, 1, 2, 0);  // of 32 floats
alignas(64) constexpr Words BY_TURNS = words(0, 2, 1, 16);      // 16 numbers and 16 others

// The upper half of each number, 8 bits of its significand; NaN stays one whatever bits say so.
inline __m512i truncated(__m512 x) {
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(-65536)), nan,
                               _mm512_set1_epi32(0x7FC00000));
}

// What `truncated` leaves of a number: 0 of infinity.
inline __m512 rest_of(__m512 x, __m512i upper) {
  const __mmask16 infinite = _mm512_fpclass_ps_mask(x, 0x18);
  return _mm512_mask_sub_ps(_mm512_setzero_ps(), __mmask16(~infinite), x, _mm512_castsi512_ps(upper));
}

// 32 columns of a row, its terms TILE_NUMBERS apart.
inline void pack_terms(__m512 first, __m512 second, int terms, uint16_t* to) {
  if (terms == 1) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    return;
  }
  const __m512i upper_halves = _mm512_load_si512(&UPPER_HALVES);
  for (int term = 0; term < terms; ++term, to += TILE_NUMBERS) {
    const __m512i a = truncated(first), b = truncated(second);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, upper_halves, b));
    first = rest_of(first, a), second = rest_of(second, b);
  }
}

inline __mmask16 first_lanes(size_t count) { return count >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << count) - 1); }

void pack(const float* x, size_t stride, size_t rows, size_t columns, int terms, uint16_t* to) {
  for (size_t k = 0; k < columns; k += CHUNK, to += size_t(terms) * TILE_NUMBERS) {
    const size_t left = columns - k;
    const __mmask16 low = first_lanes(left), high = left > 16 ? first_lanes(left - 16) : __mmask16(0);
    for (size_t row = 0; row < TILE_ROWS_MOST; ++row) {
      const bool there = row < rows;
      const float* from = there ? x + row * stride + k : x;
      const __m512 first = _mm512_maskz_loadu_ps(there ? low : __mmask16(0), from);
      const __m512 second = _mm512_maskz_loadu_ps(there ? high : __mmask16(0), from + 16);
      pack_terms(first, second, terms, to + row * CHUNK);
    }
  }
}

// Two columns of 16 rows of weights as a row of a tile: pairs, rounded to bfloat16.
inline __m512i pairs(__m512 even, __m512 odd) {
  return _mm512_permutexvar_epi16(_mm512_load_si512(&BY_TURNS), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// Eight columns of INT4 codes as four rows of a tile, by a table of bfloat16 that is there twice: the permutation reads five
// bits, the fifth of them the next code's.
inline void int4_pairs(const uint8_t* codes, uint8_t* to) {
  const __m512i table = _mm512_broadcast_i64x4(_mm256_setr_epi16(
      short(0xC100), short(0xC0E0), short(0xC0C0), short(0xC0A0), short(0xC080), short(0xC040), short(0xC000), short(0xBF80), 0,
      0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0));
  const __m512i raw = _mm512_loadu_si512(codes);
  const __m512i bytes01 = _mm512_broadcast_i32x4(_mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1));
  const __m512i bytes23 = _mm512_broadcast_i32x4(_mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1));
  const __m512i first = _mm512_shuffle_epi8(raw, bytes01), second = _mm512_shuffle_epi8(raw, bytes23);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(first, table));
  _mm512_storeu_si512(to + 64, _mm512_permutexvar_epi16(second, table));
  _mm512_storeu_si512(to + 128, _mm512_permutexvar_epi16(_mm512_srli_epi16(first, 4), table));
  _mm512_storeu_si512(to + 192, _mm512_permutexvar_epi16(_mm512_srli_epi16(second, 4), table));
}

// How a tile holds weights: their codes or bfloat16 as they are; rounded to bfloat16 with their scale; as two terms.
enum class Form { plain, rounded, terms };

// 32 columns of a panel from column k on as one tile, or two of Form::terms, the second TILE_BYTES · PANELS behind.
template <Scheme S, Form F>
inline void expand_tile(const Matrix& m, size_t panel, size_t k, uint8_t* to, size_t second) {
  const uint8_t* codes = m.panel(panel) + m.scale_bytes + k / 8 * bytes_of_eight(S);
  for (const size_t end = k + CHUNK; k < end; k += 8, codes += bytes_of_eight(S), to += 4 * TILE_ROW_BYTES) {
    if constexpr (S == Scheme::int4 && F == Form::plain) {
      int4_pairs(codes, to);
      continue;
    }
    Floats w[8];
    eight<S>(codes, w);
    if constexpr (F == Form::rounded && quantized(S)) {
      const size_t group = k / m.group_columns;
      const Floats scale = scale_of(m, panel, group < m.groups ? group : m.groups - 1);
      for (Floats& column : w) column = mul(column, scale);
    }
    for (int i = 0; i < 8; i += 2) {
      uint8_t* row = to + i / 2 * TILE_ROW_BYTES;
      __m512 even = w[i].v, odd = w[i + 1].v;
      if constexpr (F == Form::terms) {
        const __m512i a = truncated(even), b = truncated(odd);
        _mm512_storeu_si512(row, pairs(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
        row += second, even = rest_of(even, a), odd = rest_of(odd, b);
      }
      _mm512_storeu_si512(row, pairs(even, odd));
    }
  }
}

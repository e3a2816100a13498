// Matrix products with weights in the layout of layout.py: one table of functions an instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

#include "native/isa.h"

namespace vl2 {

enum class Scheme { int4, int8, fp16, bf16 };

constexpr size_t PANEL_ROWS = 16;
// K is filled to a multiple of this; activations are rounded to INT8 in as many.
constexpr size_t CHUNK = 32;
// Rounded rows that together are one row of floats.
constexpr int SPLIT_ROWS = 3;
// Up to so many rows each is computed as if it were alone, with the same bits: the rows of a decode step do not depend on
// who else is in the batch.
constexpr size_t FEW_ROWS = 8;

// A matrix [rows, columns] as it lies; layout.py describes the bytes.
struct Matrix {
  const uint8_t* data;
  Scheme scheme;
  bool wide_scales;  // float32 instead of float16
  size_t rows, columns, padded_columns, panels;
  size_t groups, group_columns;  // the last group goes on to padded_columns
  size_t scale_bytes, panel_bytes;

  const uint8_t* panel(size_t index) const { return data + index * panel_bytes; }
};

// Rows rounded to INT8: x ≈ scales · codes, a scale a chunk. Offsets are −8 and −128 times a chunk's sum of codes: what
// makes a product with unsigned weight codes one with signed ones. A chunk with NaN or infinity has the scale NaN.
struct Activations {
  int8_t* codes;      // [rows, columns]
  float* scales;      // [rows, chunks]
  int32_t* offset4;   // [rows, chunks]
  int32_t* offset8;   // [rows, chunks]
  size_t columns;     // filled to a multiple of CHUNK
  size_t chunks;
};

// Where a product goes: panel p's 16 columns at data + 16 · (p − first panel), a row every `stride` floats.
struct Output {
  float* data;
  size_t stride;
};

struct Panels {
  size_t first, count;
};

// A number as a type: how generic lambdas get constants.
template <int N>
struct Constant {
  static constexpr int value = N;
};

// Rows as tiles of 16 rows by 32 columns of bfloat16, [row tiles, blocks, terms, 16, 32]: a number is the sum of its terms,
// three (float32's 24 bits) or one (rounded to 8 bits).
struct TileRows {
  const uint16_t* data;
  size_t blocks;  // of 32 columns
  int terms;
};

// Products in the matrix registers of AMX, for many rows.
struct TileKernels {
  // Writes one tile of rows, `terms` of each block, zeros behind `rows` (at most 16) and `columns`.
  void (*pack)(const float* x, size_t stride, size_t rows, size_t columns, int terms, uint16_t* to);
  // out = x · Wᵀ for at most TILE_BLOCK rows from the row `first_row` on, a multiple of 16. With three terms groups are
  // multiples of CHUNK columns; with one weights are rounded to bfloat16 where they have several scales a row.
  void (*multiply)(const Matrix&, Panels, const TileRows&, size_t first_row, size_t rows, Output);
};

struct Kernels {
  Isa isa;
  // Schemes, as bits 1 << scheme, that `fast` takes where scales cover multiples of CHUNK columns.
  unsigned fast_schemes;
  // out = x · Wᵀ with float32 activations; x: [rows, padded_columns], zero behind `columns`, a row every `stride`.
  void (*exact)(const Matrix&, Panels, const float* x, size_t stride, size_t rows, Output);
  // The same with rounded activations, beginning at their row `first_row`.
  void (*fast)(const Matrix&, Panels, const Activations&, size_t first_row, size_t rows, Output);
  // Rounds a row of `columns` floats into row `row`.
  void (*quantize)(const float* x, size_t columns, const Activations&, size_t row);
  // Writes row `row` as the sum of three rounded ones, from SPLIT_ROWS · row on: each rounds what the one before left, in
  // all to 2⁻²⁴ of a chunk's largest number, the precision of float32.
  void (*split)(const float* x, size_t columns, const Activations&, size_t row);
  // out = x · Wᵀ for rows that `split` wrote, beginning at the row `first_row`.
  void (*split_rows)(const Matrix&, Panels, const Activations&, size_t first_row, size_t rows, Output);
  // out[i] = silu(gate[i]) · up[i] for panels of 16 gates, 16 ups; pairs: [rows, 32 · pairs], a row every `stride`.
  void (*swiglu)(const float* pairs, size_t stride, size_t rows, size_t pair_count, Output);
  // y += weight · x over `count` floats, a multiple of 16.
  void (*accumulate)(float* y, const float* x, float weight, size_t count);
  const TileKernels* tiles = nullptr;
};

// Rows that a call of `exact` or `fast` should get at most: their activations stay in the second-level cache.
constexpr size_t ROW_BLOCK = 96;
// The same of TileKernels::multiply, a multiple of 32: over so many rows one expansion of weights is shared.
constexpr size_t TILE_BLOCK = 256;
// Panels that the kernels take at once, of floats and of tiles.
constexpr size_t WIDE_PANELS = 2, TILE_PANELS_WIDE = 4;

const Kernels& kernels_for(Isa isa);

}  // namespace vl2

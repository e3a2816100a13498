// Products of many rows of activations with codes, on tensor cores: tiles of 64 tokens × 64 weight rows, 64 columns a step.
// Codes stay packed up to the fragment; there code · scale is rounded to a half, as a dequantized float16 model has it.
#pragma once
#include "device.cuh"
#include "gemv.cuh"

static constexpr int GEMM_THREADS = 128, TILE = 64, STEP = 64, A_STRIDE = 144;  // bytes; strides meet every bank once

template <int BITS> struct Packed {
  static constexpr int STAGES = BITS == 4 ? 3 : 2;
  static constexpr int ROW_BYTES = STEP * BITS / 8, STRIDE = ROW_BYTES + 16, CHUNKS = ROW_BYTES / 16;
};
template <int BITS, int STREAMS> DEVICE int stage_bytes() { return TILE * (A_STRIDE + STREAMS * Packed<BITS>::STRIDE); }

// Activations x [.., columns]; row i of the tile is row source[i] (null: i), rows from `count` on are zeros.
struct Tokens {
  const half_t* x;
  const int* source;
  int count, columns;
};

DEVICE const half_t* row_of(const Tokens& tokens, int row) {
  return tokens.x + static_cast<long long>(tokens.source ? tokens.source[row] : row) * tokens.columns;
}

// Two neighbouring codes of a row as halves; p: the bytes of columns k … of the row, pair: which two, b: 0 or 1 (8 further).
template <int BITS> DEVICE half2_t load_pair(const unsigned char* p, int pair, int b) {
  if (BITS == 4) {
    const unsigned v = p[b * 4 + pair];
    return add2((v & 0xfu) | (v & 0xf0u) << 12 | 0x64006400u, 0xe408e408u);
  }
  if (BITS == 8) {
    const unsigned v = *reinterpret_cast<const half_t*>(p + b * 8 + pair * 2) ^ 0x8080u;
    return add2(permute_bytes(v, 0x64646464u, 0x4140u), 0xe480e480u);
  }
  return *reinterpret_cast<const half2_t*>(p + b * 16 + pair * 4);
}

DEVICE void copy_chunk(unsigned char* to, const unsigned char* row, int offset, int row_bytes, bool exists, bool wide) {
  const int left = exists ? row_bytes - offset : 0;
  if (wide) {
    copy_async16(to, left > 0 ? row + offset : row, left > 0 ? 16 : 0);
    return;
  }
#pragma unroll
  for (int i = 0; i < 16; i += 4) copy_async4(to + i, left > i ? row + offset + i : row, left > i ? 4 : 0);
}

// Begins the copies of one step: activations [64, 64] and STREAMS tiles of codes.
template <int BITS, int STREAMS>
DEVICE void copy_step(unsigned char* stage, const half_t* const (&from)[TILE / 16], int exists, const Matrix (&m)[STREAMS],
                      long long place, int row, int rows, int k) {
  const int columns = m[0].columns, row_bytes = columns * BITS / 8;
#pragma unroll
  for (int i = 0; i < TILE / 16; i++) {
    const int r = i * 16 + threadIdx.x / 8, chunk = threadIdx.x % 8;
    copy_chunk(stage + r * A_STRIDE + chunk * 16, reinterpret_cast<const unsigned char*>(from[i]), k * 2 + chunk * 16,
               columns * 2, exists >> i & 1, true);
  }
  stage += TILE * A_STRIDE;
#pragma unroll
  for (int s = 0; s < STREAMS; s++, stage += TILE * Packed<BITS>::STRIDE)
#pragma unroll
    for (int i = threadIdx.x; i < TILE * Packed<BITS>::CHUNKS; i += GEMM_THREADS) {
      const int r = i / Packed<BITS>::CHUNKS, chunk = i % Packed<BITS>::CHUNKS;
      const bool exists = row + r < rows;
      copy_chunk(stage + r * Packed<BITS>::STRIDE + chunk * 16, m[s].codes + (place + (exists ? row + r : 0)) * row_bytes,
                 k * BITS / 8 + chunk * 16, row_bytes, exists, row_bytes % 16 == 0);
    }
}

// The scales of a warp's four times eight rows at a column, each twice; they are waited for together with the copies.
template <int BITS, int STREAMS>
DEVICE void load_scales(const Matrix (&m)[STREAMS], long long place, int row, int rows, int k, half2_t (&scales)[STREAMS][4]) {
  if (BITS == 16) return;
  const int column = k < m[0].columns ? k : m[0].columns - 1;
#pragma unroll
  for (int s = 0; s < STREAMS; s++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int n = row + threadIdx.x / 32 % 2 * 32 + j * 8 + threadIdx.x % 32 / 4;
      const half_t scale = m[s].scales[(place + (n < rows ? n : rows - 1)) * groups_of<BITS>(m[s]) + (column >> m[s].shift)];
      scales[s][j] = scale | static_cast<half2_t>(scale) << 16;
    }
}

// sums += one step; warp w does tokens 32 (w / 2) … and rows 32 (w % 2) …, as two by four fragments of 16 × 8.
template <int BITS, int STREAMS>
DEVICE void multiply_step(const unsigned char* stage, const Matrix (&m)[STREAMS], long long place, int row, int rows, int k,
                          half2_t (&scales)[STREAMS][4], float (&sums)[STREAMS][2][4][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const unsigned char* activations = stage + (warp / 2 * 32 + g) * A_STRIDE + t * 4;
#pragma unroll
  for (int kk = 0; kk < STEP; kk += 16) {
    if (BITS < 16 && kk && m[0].shift < 6) load_scales<BITS, STREAMS>(m, place, row, rows, k + kk, scales);
    half2_t a[2][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        a[i][j] = *reinterpret_cast<const half2_t*>(activations + (i * 16 + j % 2 * 8) * A_STRIDE + kk * 2 + j / 2 * 16);
    const unsigned char* codes = stage + TILE * A_STRIDE + (warp % 2 * 32 + g) * Packed<BITS>::STRIDE + kk * BITS / 8;
#pragma unroll
    for (int s = 0; s < STREAMS; s++, codes += TILE * Packed<BITS>::STRIDE)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        half2_t b[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          b[i] = load_pair<BITS>(codes + j * 8 * Packed<BITS>::STRIDE, t, i);
          if (BITS < 16) b[i] = mul2(b[i], scales[s][j]);
        }
        mma(sums[s][0][j], a[0], b);
        mma(sums[s][1][j], a[1], b);
      }
  }
}

// One tile: sums of STREAMS matrices' rows [place + row, …) with the tokens, over all columns.
template <int BITS, int STREAMS>
DEVICE void multiply_tile(unsigned char* memory, const Tokens& tokens, const Matrix (&m)[STREAMS], long long place, int row,
                          int rows, float (&sums)[STREAMS][2][4][4]) {
  const int stages = Packed<BITS>::STAGES, bytes = stage_bytes<BITS, STREAMS>(), steps = (m[0].columns + STEP - 1) / STEP;
#pragma unroll
  for (int i = 0; i < STREAMS * 32; i++) (&sums[0][0][0][0])[i] = 0.0f;
  const half_t* from[TILE / 16];
  int exists = 0;
#pragma unroll
  for (int i = 0; i < TILE / 16; i++) {
    const int r = i * 16 + threadIdx.x / 8;
    from[i] = row_of(tokens, r < tokens.count ? r : 0);
    exists |= (r < tokens.count) << i;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < stages - 1; i++) {
    if (i < steps) copy_step<BITS, STREAMS>(memory + i * bytes, from, exists, m, place, row, rows, i * STEP);
    copy_commit();
  }
  for (int i = 0; i < steps; i++) {
    half2_t scales[STREAMS][4];
    load_scales<BITS, STREAMS>(m, place, row, rows, i * STEP, scales);
    copy_wait<stages - 2>();
    __syncthreads();
    const int next = i + stages - 1;
    if (next < steps) copy_step<BITS, STREAMS>(memory + next % stages * bytes, from, exists, m, place, row, rows, next * STEP);
    copy_commit();
    multiply_step<BITS, STREAMS>(memory + i % stages * bytes, m, place, row, rows, i * STEP, scales, sums);
  }
  copy_wait<0>();
}

// Calls emit(token of the tile, row of the tile, fragment i, j, index of the value) for the pairs this thread holds.
template <class Emit> DEVICE void for_each_pair(Emit emit) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int upper = 0; upper < 2; upper++)
        emit(warp / 2 * 32 + i * 16 + upper * 8 + lane / 4, warp % 2 * 32 + j * 8 + lane % 4 * 2, i, j, upper * 2);
}

DEVICE void store_pair(half_t* y, int column, int columns, float low, float high) {
  if (columns % 2 == 0) {
    if (column < columns) *reinterpret_cast<half2_t*>(y + column) = pack_halves(low, high);
    return;
  }
  if (column < columns) y[column] = to_half(low);
  if (column + 1 < columns) y[column + 1] = to_half(high);
}

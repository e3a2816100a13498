// Products of few rows of activations with a weight matrix that is read once.
// Eight lanes share a row, so a warp reads 128 neighbouring bytes of each of four; codes become float32 in registers and
// meet float32 activations in shared memory. Sums are float32 in an order that depends on nothing but the sizes.
#pragma once
#include "device.cuh"

static constexpr int GEMV_THREADS = 128, GEMV_LANES = 8, GEMV_GROUPS = GEMV_THREADS / GEMV_LANES, GEMV_TILE = 8192, UNROLL = 2;

// Codes [rows, columns] of BITS, row-major, and float16 scales of 2^shift neighbouring columns (31: of the whole row).
struct Matrix {
  const unsigned char* codes;
  const half_t* scales;
  int columns, shift;
};

template <int BITS> DEVICE int groups_of(const Matrix& m) { return m.shift > 30 ? 1 : m.columns >> m.shift; }

// One row of a matrix from the column `first` on.
struct Row {
  const unsigned char* codes;
  const half_t* scales;
};

template <int BITS> DEVICE Row row_of(const Matrix& m, long long row) {
  return {m.codes + row * (static_cast<long long>(m.columns) * BITS / 8), m.scales + row * groups_of<BITS>(m)};
}

// Σ of eight INT4 codes (low nibble first, + 8) times x: 0x6400 | n is the half 1024 + n, and 0x6400 | n << 4 is 1024 + 16 n.
DEVICE float dot_word(unsigned w, float4 a, float4 b, float sum) {
  const half2_t n04 = add2((w & 0x000f000fu) | 0x64006400u, 0xe408e408u);
  const half2_t n15 = fma2((w & 0x00f000f0u) | 0x64006400u, 0x2c002c00u, 0xd480d480u);
  const half2_t n26 = add2((w >> 8 & 0x000f000fu) | 0x64006400u, 0xe408e408u);
  const half2_t n37 = fma2((w >> 8 & 0x00f000f0u) | 0x64006400u, 0x2c002c00u, 0xd480d480u);
  sum = fmaf(low_half(n04), a.x, sum), sum = fmaf(low_half(n15), a.y, sum);
  sum = fmaf(low_half(n26), a.z, sum), sum = fmaf(low_half(n37), a.w, sum);
  sum = fmaf(high_half(n04), b.x, sum), sum = fmaf(high_half(n15), b.y, sum);
  return fmaf(high_half(n37), b.w, fmaf(high_half(n26), b.z, sum));
}

// A byte in the last place of 2^23 is 2^23 + u, u the code + 128.
DEVICE float code8(unsigned w, int i) { return bits_to_float(permute_bytes(w, 0x4b000000u, 0x7650u + i)) - 8388736.0f; }

// Σ of 16 bytes of a row times x; x: plane p holds columns 4p … 4p + 3 of every chunk, and planes are an odd number of
// 16-byte words apart: neither neighbouring chunks nor neighbouring columns meet in a bank.
DEVICE int plane_stride(int chunks) { return chunks | 1; }

template <int BITS> DEVICE float dot_chunk(uint4 w, const float4* x, int stride, float scale, float next_scale) {
  if (BITS == 4) {
    const float low = dot_word(w.y, x[2 * stride], x[3 * stride], dot_word(w.x, x[0], x[stride], 0.0f));
    const float high = dot_word(w.w, x[6 * stride], x[7 * stride], dot_word(w.z, x[4 * stride], x[5 * stride], 0.0f));
    return fmaf(low, scale, high * next_scale);
  }
  const unsigned words[4] = {w.x, w.y, w.z, w.w};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if (BITS == 8) {
      const float4 a = x[i * stride];
      const unsigned u = words[i] ^ 0x80808080u;
      sum = fmaf(code8(u, 0), a.x, sum), sum = fmaf(code8(u, 1), a.y, sum);
      sum = fmaf(code8(u, 2), a.z, sum), sum = fmaf(code8(u, 3), a.w, sum);
    } else {
      const float2 a = reinterpret_cast<const float2*>(x + i / 2 * stride)[i % 2];
      sum = fmaf(high_half(words[i]), a.y, fmaf(low_half(words[i]), a.x, sum));
    }
  }
  return BITS == 8 ? sum * scale : sum;
}

// Rows whose bytes are no multiple of 16 are read by words; beyond their end stands the code of 0.
template <int BITS, bool WIDE> DEVICE uint4 load_chunk(const unsigned char* row, int chunk, int row_bytes) {
  const unsigned char* p = row + chunk * 16;
  if (WIDE) return stream16(p);
  const unsigned zero = BITS == 4 ? 0x88888888u : 0u;
  const int left = row_bytes - chunk * 16;
  return {left > 0 ? stream4(p) : zero, left > 4 ? stream4(p + 4) : zero, left > 8 ? stream4(p + 8) : zero,
          left > 12 ? stream4(p + 12) : zero};
}

// The scale of a chunk's first 16 columns and, with groups of 16, of its next.
template <int BITS> DEVICE half2_t load_scales(const Row& row, const Matrix& m, int column) {
  if (BITS == 16) return 0;
  const half2_t scale = row.scales[column >> m.shift];
  const bool second = BITS == 4 && m.shift == 4 && column + 16 < m.columns;
  return scale | (second ? row.scales[(column >> 4) + 1] : scale) << 16;
}

// Adds columns [from, from + count) of STREAMS rows times x to their sums; `from` is a multiple of a chunk.
template <int BITS, int STREAMS, bool WIDE>
DEVICE void add_products(const Row (&rows)[STREAMS], const Matrix& m, const float* x, int from, int count, float (&sums)[STREAMS]) {
  const int columns = 128 / BITS, chunks = (count + columns - 1) / columns, first = from / columns;
  const int row_bytes = m.columns * BITS / 8, lane = threadIdx.x % GEMV_LANES;
  const float4* planes = reinterpret_cast<const float4*>(x);
  for (int c = lane; c < chunks; c += GEMV_LANES * UNROLL) {
    uint4 words[UNROLL][STREAMS];
    half2_t scales[UNROLL][STREAMS];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int chunk = c + u * GEMV_LANES;
      if (chunk >= chunks) continue;
#pragma unroll
      for (int r = 0; r < STREAMS; r++) {
        words[u][r] = load_chunk<BITS, WIDE>(rows[r].codes, first + chunk, row_bytes);
        scales[u][r] = load_scales<BITS>(rows[r], m, from + chunk * columns);
      }
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int chunk = c + u * GEMV_LANES;
      if (chunk >= chunks) continue;
#pragma unroll
      for (int r = 0; r < STREAMS; r++)
        sums[r] += dot_chunk<BITS>(words[u][r], planes + chunk, plane_stride(chunks), low_half(scales[u][r]), high_half(scales[u][r]));
    }
  }
}

DEVICE float as_float(float v) { return v; }
DEVICE float as_float(half_t v) { return to_float(v); }

// x[0 … count) to the planes that dot_chunk reads, zeros up to a whole chunk.
template <int BITS, class T> DEVICE void stage(const T* __restrict__ x, float* planes, int count) {
  const int columns = 128 / BITS, chunks = (count + columns - 1) / columns;
  for (int i = threadIdx.x; i < chunks * columns; i += GEMV_THREADS) {
    const int chunk = i / columns, within = i % columns;
    planes[(within / 4 * plane_stride(chunks) + chunk) * 4 + within % 4] = i < count ? as_float(x[i]) : 0.0f;
  }
}

// The products of STREAMS rows with x[0 … count), which stands for the matrix' columns [from, from + count).
// Every thread of the block must come here: x passes through shared memory in tiles.
template <int BITS, int STREAMS, class T>
DEVICE void dot_rows(const Row (&rows)[STREAMS], const Matrix& m, const T* __restrict__ x, int from, int count, float* planes,
                     bool staged, float (&sums)[STREAMS]) {
#pragma unroll
  for (int r = 0; r < STREAMS; r++) sums[r] = 0.0f;
  const bool wide = m.columns * BITS % 128 == 0;
  for (int k = 0; k < count; k += GEMV_TILE) {
    const int part = count - k < GEMV_TILE ? count - k : GEMV_TILE;
    if (!staged) {
      __syncthreads();
      stage<BITS>(x + k, planes, part);
      __syncthreads();
    }
    if (wide) add_products<BITS, STREAMS, true>(rows, m, planes, from + k, part, sums);
    else add_products<BITS, STREAMS, false>(rows, m, planes, from + k, part, sums);
  }
#pragma unroll
  for (int r = 0; r < STREAMS; r++) sums[r] = sum_lanes<GEMV_LANES>(sums[r]);
}

// Causal attention of a few query rows with a cache of halves, split over the cache's length (flash decoding).
// A block has 16 or 32 query rows, four warps a 16, and walks over tiles of 16 keys, the next one being copied meanwhile.
// Scores and sums are float32; weights are rounded to halves for the second product, and what is divided by is their sum.
#pragma once
#include "device.cuh"

static constexpr int KEYS = 16, SCORES = 18, PAD = 8;  // SCORES: floats a row of scores has, PAD: halves between rows

// rows [B, kv_heads, tokens · group, key_size] of queries with keys of `key_stride` halves a position.
struct Attended {
  const half_t *queries, *keys, *values;
  half_t* y;
  float *partial, *marks;
  int tokens, group, kv_heads, key_size, value_size, key_stride, capacity, chunk, y_batch, y_head, y_token, y_group;
  float scale;
};

struct Tiles {
  half_t *queries, *keys, *values, *weights;
  float *scores, *largest, *sums, *factors;
  int key_stride, value_stride;
};

DEVICE int padded(int size) { return (size + 15) / 16 * 16 + PAD; }

DEVICE Tiles lay_out(unsigned char* memory, const Attended& a, int rows) {
  Tiles t;
  t.key_stride = padded(a.key_size), t.value_stride = a.values ? padded(a.value_size) : t.key_stride;
  t.queries = reinterpret_cast<half_t*>(memory);
  t.keys = t.queries + rows * t.key_stride;
  t.values = a.values ? t.keys + 2 * KEYS * t.key_stride : t.keys;
  t.weights = t.values + 2 * KEYS * t.value_stride;
  t.scores = reinterpret_cast<float*>(t.weights + rows * (KEYS + PAD));
  t.largest = t.scores + 2 * rows * SCORES;
  t.sums = t.largest + rows;
  t.factors = t.sums + rows;
  return t;
}

// `count` rows of `size` halves to shared memory; rows from `valid` on and what is beyond `size` become zeros.
DEVICE void copy_rows(half_t* to, int to_stride, const half_t* from, long long from_stride, int size, int count, int valid) {
  const int chunks = (to_stride - PAD) / 8;
  for (int i = threadIdx.x; i < count * chunks; i += blockDim.x) {
    const int row = i / chunks, column = i % chunks * 8;
    const bool exists = row < valid && column < size;
    copy_async16(to + row * to_stride + column, exists ? from + row * from_stride + column : from, exists ? 16 : 0);
  }
}

DEVICE void copy_tile(const Attended& a, const Tiles& t, const half_t* keys, const half_t* values, int first, int end, int buffer) {
  const int valid = end - first < KEYS ? end - first : KEYS;
  const long long at = static_cast<long long>(first) * a.key_stride;
  copy_rows(t.keys + buffer * KEYS * t.key_stride, t.key_stride, keys + at, a.key_stride, a.key_size, KEYS, valid);
  if (values) copy_rows(t.values + buffer * KEYS * t.value_stride, t.value_stride, values + at, a.key_stride, a.value_size, KEYS, valid);
  copy_commit();
}

// 16 rows × 16 keys a four warps: a warp takes 8 keys and one half of the columns.
DEVICE void multiply_keys(const Tiles& t, const half_t* keys) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, q = lane % 4 * 2;
  const int steps = (t.key_stride - PAD) / 16, half_steps = (steps + 1) / 2, part = warp % 4 / 2;
  const half_t* rows = t.queries + (warp / 4 * 16 + g) * t.key_stride + q;
  const half_t* key = keys + (warp % 2 * 8 + g) * t.key_stride + q;
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  for (int k = part * half_steps; k < (part ? steps : half_steps); k++) {
    half2_t a[4], b[2];
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = *reinterpret_cast<const half2_t*>(rows + i % 2 * 8 * t.key_stride + k * 16 + i / 2 * 8);
#pragma unroll
    for (int i = 0; i < 2; i++) b[i] = *reinterpret_cast<const half2_t*>(key + k * 16 + i * 8);
    mma(sums, a, b);
  }
  float* to = t.scores + (part * (blockDim.x / 128) * 16 + warp / 4 * 16 + g) * SCORES + warp % 2 * 8 + q;
  to[0] = sums[0], to[1] = sums[1], to[8 * SCORES] = sums[2], to[8 * SCORES + 1] = sums[3];
}

// Scores to weights; `first`: the position of key 0, `limit`: of the last key that token 0 sees, `row`: the block's first row.
DEVICE void weigh(const Attended& a, const Tiles& t, int first, int limit, int row) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rows = blockDim.x / 8, key = lane % 16;
  const float nothing = bits_to_float(0xff800000u);
#pragma unroll
  for (int pass = 0; pass < 2; pass++) {
    const int r = warp * 4 + pass * 2 + lane / 16;
    const bool seen = first + key <= limit + (row + r) / a.group;
    const float score = seen ? (t.scores[r * SCORES + key] + t.scores[(rows + r) * SCORES + key]) * a.scale : nothing;
    const float before = t.largest[r], largest = fmaxf(before, max_lanes<16>(score));
    const half_t weight = to_half(largest == nothing ? 0.0f : expf(score - largest));
    const float factor = largest == nothing ? 1.0f : expf(before - largest), sum = sum_lanes<16>(to_float(weight));
    t.weights[r * (KEYS + PAD) + key] = weight;
    __syncwarp();
    if (key == 0) {
      t.largest[r] = largest, t.factors[r] = factor;
      t.sums[r] = t.sums[r] * factor + sum;
    }
  }
}

// sums[PAIRS][2] of 16 rows × 16 columns: the warp's pairs of column tiles are warp % 4, + 4, …
template <int PAIRS> DEVICE void multiply_values(const Attended& a, const Tiles& t, const half_t* values, float (&sums)[PAIRS][2][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, row = warp / 4 * 16 + g;
  const half_t* weights = t.weights + row * (KEYS + PAD) + lane % 4 * 2;
  const float factors[2] = {t.factors[row], t.factors[row + 8]};
  half2_t w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = *reinterpret_cast<const half2_t*>(weights + i % 2 * 8 * (KEYS + PAD) + i / 2 * 8);
#pragma unroll
  for (int p = 0; p < PAIRS; p++) {
    const int column = (p * 4 + warp % 4) * 16;
    if (column >= a.value_size) break;
    half2_t v[4];
    load_transposed(v, values + lane % 16 * t.value_stride + column + lane / 16 * 8);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const half2_t b[2] = {v[2 * i], v[2 * i + 1]};
#pragma unroll
      for (int j = 0; j < 4; j++) sums[p][i][j] *= factors[j / 2];
      mma(sums[p][i], w, b);
    }
  }
}

// Writes the block's rows: as halves where there is one split, else as float32 sums with their marks.
template <int PAIRS> DEVICE void write_rows(const Attended& a, const Tiles& t, int row, int rows, float (&sums)[PAIRS][2][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, splits = gridDim.x;
  const long long batch = blockIdx.z / a.kv_heads, head = blockIdx.z % a.kv_heads;
#pragma unroll
  for (int upper = 0; upper < 2; upper++) {
    const int r = warp / 4 * 16 + upper * 8 + lane / 4, at = row + r;
    if (at >= rows) continue;
    const long long place = (static_cast<long long>(blockIdx.z) * splits + blockIdx.x) * rows + at;
    half_t* y = a.y + batch * a.y_batch + head * a.y_head + static_cast<long long>(at / a.group) * a.y_token +
                at % a.group * static_cast<long long>(a.y_group);
    const float sum = t.sums[r];
    if (splits > 1 && warp % 4 == 0 && lane % 4 == 0) a.marks[place * 2] = t.largest[r], a.marks[place * 2 + 1] = sum;
    // A split beyond the conversation saw nothing: merging passes it by.
    if (sum == 0.0f) continue;
#pragma unroll
    for (int p = 0; p < PAIRS; p++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int column = (p * 4 + warp % 4) * 16 + i * 8 + lane % 4 * 2;
        if (column >= a.value_size) continue;
        const float low = sums[p][i][upper * 2], high = sums[p][i][upper * 2 + 1];
        if (splits == 1) *reinterpret_cast<half2_t*>(y + column) = pack_halves(low / sum, high / sum);
        else a.partial[place * a.value_size + column] = low, a.partial[place * a.value_size + column + 1] = high;
      }
  }
}

// blockIdx: split of the keys, tile of the rows, batch · kv_heads + head. A past that cannot be reads no other memory.
template <int PAIRS> DEVICE void attend(const Attended& a, long long past) {
  SHARED(memory);
  const int block_rows = blockDim.x / 8, rows = a.tokens * a.group, row = blockIdx.y * block_rows;
  const Tiles t = lay_out(memory, a, block_rows);
  const long long batch = blockIdx.z / a.kv_heads, head = blockIdx.z % a.kv_heads;
  const half_t* keys = a.keys + batch * a.capacity * a.key_stride + head * a.key_size;
  const half_t* values = a.values ? a.values + batch * a.capacity * a.key_stride + head * a.value_size : nullptr;
  const int valid = rows - row < block_rows ? rows - row : block_rows, last = (row + valid - 1) / a.group;
  const int before = static_cast<int>(past < 0 ? 0 : past < a.capacity ? past : a.capacity);
  const int seen = before + last + 1, limit = seen < a.capacity ? seen : a.capacity;
  const int first = blockIdx.x * a.chunk, end = first + a.chunk < limit ? first + a.chunk : limit;
  float sums[PAIRS][2][4];
#pragma unroll
  for (int i = 0; i < PAIRS * 8; i++) (&sums[0][0][0])[i] = 0.0f;
  for (int r = threadIdx.x; r < block_rows; r += blockDim.x) t.largest[r] = bits_to_float(0xff800000u), t.sums[r] = 0.0f;
  if (first < end) {
    copy_rows(t.queries, t.key_stride, a.queries + (static_cast<long long>(blockIdx.z) * rows + row) * a.key_size, a.key_size,
              a.key_size, block_rows, valid);
    copy_tile(a, t, keys, values, first, end, 0);
  }
  for (int at = first, buffer = 0; at < end; at += KEYS, buffer ^= 1) {
    copy_wait<0>();
    __syncthreads();
    if (at + KEYS < end) copy_tile(a, t, keys, values, at + KEYS, end, buffer ^ 1);
    multiply_keys(t, t.keys + buffer * KEYS * t.key_stride);
    __syncthreads();
    weigh(a, t, at, before, row);
    __syncthreads();
    multiply_values<PAIRS>(a, t, t.values + buffer * KEYS * t.value_stride, sums);
  }
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  write_rows<PAIRS>(a, t, row, rows, sums);
}

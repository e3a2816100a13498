// Multi-head attention over key and value caches written in place; signature and reference: op.py.
#include "attend.cuh"

// Rotates pairs (i, i + size / 2) of a head; from, to: its numbers, cos, sin: the token's tables.
DEVICE void rotate_head(const half_t* from, half_t* to, const float* cos, const float* sin, int size, int i) {
  const float low = to_float(from[i]), high = to_float(from[i + size / 2]);
  to[i] = to_half(low * cos[i] - high * sin[i]);
  to[i + size / 2] = to_half(high * cos[i + size / 2] + low * sin[i + size / 2]);
}

// query [B, T, heads · D] → queries [B, kv_heads, T · group, D], rotated; key, rotated, and value → caches
// [B, C, kv_heads, D] from past_length on. blockIdx: token, batch.
KERNEL(128) vl2_attention_prepare(const half_t* __restrict__ query, const half_t* __restrict__ key,
                                  const half_t* __restrict__ value, const float* __restrict__ cos,
                                  const float* __restrict__ sin, const long long* __restrict__ past_length,
                                  half_t* __restrict__ queries, half_t* __restrict__ key_cache,
                                  half_t* __restrict__ value_cache, int tokens, int heads, int kv_heads, int size, int capacity) {
  const long long token = blockIdx.x, batch = blockIdx.y, place = batch * tokens + token, position = past_length[0] + token;
  const int group = heads / kv_heads, pairs = size / 2;
  cos += place * size, sin += place * size;
  for (int i = threadIdx.x; i < heads * pairs; i += blockDim.x) {
    const int head = i / pairs, kv = head / group;
    half_t* to = queries + (((batch * kv_heads + kv) * tokens + token) * group + head % group) * size;
    rotate_head(query + (place * heads + head) * size, to, cos, sin, size, i % pairs);
  }
  if (position < 0 || position >= capacity) return;
  const long long row = (batch * capacity + position) * kv_heads * size;
  for (int i = threadIdx.x; i < kv_heads * pairs; i += blockDim.x) {
    const int head = i / pairs;
    rotate_head(key + (place * kv_heads + head) * size, key_cache + row + head * size, cos, sin, size, i % pairs);
  }
  for (int i = threadIdx.x; i < kv_heads * size; i += blockDim.x) value_cache[row + i] = value[place * kv_heads * size + i];
}
EXPORT(vl2_attention_prepare)

// Heads of up to 256 numbers.
KERNEL(256, 2) vl2_attention(const half_t* __restrict__ queries, const half_t* __restrict__ key_cache,
                          const half_t* __restrict__ value_cache, const long long* __restrict__ past_length,
                          half_t* __restrict__ y, float* __restrict__ partial, float* __restrict__ marks, int tokens, int group,
                          int kv_heads, int size, int capacity, int chunk, float scale) {
  const int heads = kv_heads * group;
  attend<4>({queries, key_cache, value_cache, y, partial, marks, tokens, group, kv_heads, size, size, kv_heads * size, capacity,
             chunk, tokens * heads * size, group * size, heads * size, size, scale},
            past_length[0]);
}
EXPORT(vl2_attention)

// Merges the splits of a row: partial [B · kv_heads, splits, rows, size] by marks [.., 2] (largest score, sum of weights).
// blockIdx: row, batch · kv_heads + head. A split that saw nothing has the sum 0, and its partial was not written.
KERNEL(128) vl2_attention_merge(const float* __restrict__ partial, const float* __restrict__ marks, half_t* __restrict__ y,
                                int splits, int rows, int size, int group, int kv_heads, int y_batch, int y_head, int y_token,
                                int y_group) {
  const long long row = blockIdx.x, batch = blockIdx.y / kv_heads, head = blockIdx.y % kv_heads;
  const long long first = static_cast<long long>(blockIdx.y) * splits * rows + row;
  float largest = bits_to_float(0xff800000u), sum = 0.0f;
  for (int s = 0; s < splits; s++) largest = fmaxf(largest, marks[(first + static_cast<long long>(s) * rows) * 2]);
  for (int s = 0; s < splits; s++) {
    const float* mark = marks + (first + static_cast<long long>(s) * rows) * 2;
    if (mark[1] > 0.0f) sum += expf(mark[0] - largest) * mark[1];
  }
  y += batch * y_batch + head * y_head + row / group * y_token + row % group * y_group;
  for (int column = threadIdx.x; column < size; column += blockDim.x) {
    float total = 0.0f;
    for (int s = 0; s < splits; s++) {
      const long long at = first + static_cast<long long>(s) * rows;
      if (marks[at * 2 + 1] > 0.0f) total += expf(marks[at * 2] - largest) * partial[at * size + column];
    }
    y[column] = to_half(total / sum);
  }
}
EXPORT(vl2_attention_merge)

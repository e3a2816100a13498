// Absorbed latent attention over the latent cache, written in place; signature and reference: op.py.
// A cache row is the key of every head and its first `rank` numbers are the value: it is read once for all heads.
#include "attend.cuh"

// Pairs (2i, 2i + 1) become (i, i + size / 2), rotated.
DEVICE void rotate_pair(const half_t* from, half_t* to, const float* cos, const float* sin, int size, int i) {
  const float low = to_float(from[2 * i]), high = to_float(from[2 * i + 1]);
  to[i] = to_half(low * cos[i] - high * sin[i]);
  to[i + size / 2] = to_half(high * cos[i + size / 2] + low * sin[i + size / 2]);
}

// query [B, heads, T, R] ‖ rotated query_rope [B, T, heads, E] → queries [B, T · heads, R + E]; latent [B, T, R] ‖ rotated
// key_rope [B, T, E] → cache [B, C, R + E] from past_length on. blockIdx: token, batch.
KERNEL(128) vl2_latent_prepare(const half_t* __restrict__ query, const half_t* __restrict__ query_rope,
                               const half_t* __restrict__ latent, const half_t* __restrict__ key_rope,
                               const float* __restrict__ cos, const float* __restrict__ sin,
                               const long long* __restrict__ past_length, half_t* __restrict__ queries,
                               half_t* __restrict__ cache, int tokens, int heads, int rank, int rope, int capacity) {
  const long long token = blockIdx.x, batch = blockIdx.y, place = batch * tokens + token, position = past_length[0] + token;
  const int width = rank + rope, pairs = rope / 2;
  cos += place * rope, sin += place * rope;
  queries += place * heads * width;
  for (int i = threadIdx.x; i < heads * rank; i += blockDim.x) {
    const int head = i / rank, column = i % rank;
    queries[head * width + column] = query[((batch * heads + head) * tokens + token) * rank + column];
  }
  for (int i = threadIdx.x; i < heads * pairs; i += blockDim.x) {
    const int head = i / pairs;
    rotate_pair(query_rope + (place * heads + head) * rope, queries + head * width + rank, cos, sin, rope, i % pairs);
  }
  if (position < 0 || position >= capacity) return;
  cache += (batch * capacity + position) * width;
  for (int i = threadIdx.x; i < rank; i += blockDim.x) cache[i] = latent[place * rank + i];
  for (int i = threadIdx.x; i < pairs; i += blockDim.x) rotate_pair(key_rope + place * rope, cache + rank, cos, sin, rope, i);
}
EXPORT(vl2_latent_prepare)

// Ranks of up to 512. y [B, heads, T, R].
KERNEL(256, 2) vl2_latent_attention(const half_t* __restrict__ queries, const half_t* __restrict__ cache,
                                 const long long* __restrict__ past_length, half_t* __restrict__ y, float* __restrict__ partial,
                                 float* __restrict__ marks, int tokens, int heads, int rank, int rope, int capacity, int chunk,
                                 float scale) {
  attend<8>({queries, cache, nullptr, y, partial, marks, tokens, heads, 1, rank + rope, rank, rank + rope, capacity, chunk,
             heads * tokens * rank, 0, rank, tokens * rank, scale},
            past_length[0]);
}
EXPORT(vl2_latent_attention)

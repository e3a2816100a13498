// What the attention operators compute, in plain pointers and sizes. Instruction-set neutral.
#pragma once

#include <cstdint>

namespace vl2 {
namespace attention {

enum class CacheType { kFloat, kHalf, kInt8 };

// Distance in elements between neighbours of a float array indexed [batch, token, head, ...].
struct Strides {
  int64_t batch, token, head;
};

// Rows made of a part that is taken as it is and a part that is rotated, in this order; either may have width 0.
// interleaved: the rotary part comes as pairs (2i, 2i + 1) and leaves as halves (i, i + width / 2).
struct Rows {
  const float* plain;
  int64_t plain_width;
  Strides plain_strides;
  const float* rotary;
  int64_t rotary_width;
  Strides rotary_strides;
  bool interleaved;

  int64_t width() const { return plain_width + rotary_width; }
};

// data [slots, capacity, token_rows, plain_width + rotary_width]; scales [slots, capacity, token_rows, parts] for INT8,
// one for each part of the row that has a width: value = code * scale.
struct Cache {
  void* data;
  float* scales;
  CacheType type;
  int64_t plain_width, rotary_width;

  int64_t width() const { return plain_width + rotary_width; }
  int64_t parts() const { return (plain_width > 0) + (rotary_width > 0); }
  int64_t element_size() const { return type == CacheType::kFloat ? 4 : type == CacheType::kHalf ? 2 : 1; }
};

// Writes the new keys (and values) at past[b] and gives each query the softmax-weighted values of the keys it may see:
// all of the past, and of the new ones those up to its own token, or all where the problem is not causal.
// new_keys of width 0: the keys and values of the tokens lie in the caches already.
// values.data == nullptr: the values are the first value_width elements of the keys (latent attention).
struct Problem {
  int64_t batch, tokens, heads, kv_heads, capacity;
  int64_t token_rows;  // rows of the caches from a token to the next: kv_heads, or more where others lie between
  bool causal;
  Rows query, new_keys, new_values;
  const float *cos, *sin;  // [batch, tokens, rotary_width]
  Cache keys, values;
  int64_t value_width;
  const int64_t* past;  // [batch]
  const int64_t* slot;  // [batch]: the row of the caches, each another one
  float scale;
  float* output;
  Strides output_strides;

  int64_t group() const { return heads / kv_heads; }
  bool shared_values() const { return values.data == nullptr; }
  // Keys that the query of token t of batch entry b sees.
  int64_t seen(int64_t b, int64_t t) const { return past[b] + (causal ? t + 1 : tokens); }
};

}  // namespace attention
}  // namespace vl2

// attention.py and latent.py in C++: the launch plans of both attentions.
#pragma once
#include <algorithm>

#include "launch.h"

namespace vl2 {

struct AttentionSizes {
  int64_t rows, heads, key_size, value_size, result_size, capacity;

  int64_t row_tiles() const { return rows <= 16 ? 1 : 2; }

  // Bound of `splits` that no shorter cache exceeds; 1 exactly where there is one split.
  int64_t most_splits() const {
    const int64_t blocks = tiles(rows, 16 * row_tiles()) * heads;
    const int64_t wanted = blocks >= 128 ? 1 : std::min<int64_t>(64, 512 / blocks);
    return std::min(wanted, tiles(capacity, 64));
  }

  int64_t chunk() const {
    const int64_t share = tiles(tiles(capacity, most_splits()), 16) * 16;
    return most_splits() == 1 ? share : std::max<int64_t>(64, share);
  }

  int64_t splits() const { return tiles(capacity, chunk()); }

  Three grid() const { return {splits(), tiles(rows, 16 * row_tiles()), heads}; }

  int64_t shared_bytes() const {
    const int64_t held = 16 * row_tiles();
    const int64_t key = key_size ? tiles(key_size, 16) * 16 + 8 : 0;
    const int64_t value = value_size ? tiles(value_size, 16) * 16 + 8 : 0;
    const int64_t halves = (held + 2 * 16) * key + 2 * 16 * value + held * (16 + 8);
    return halves * 2 + (2 * held * 18 + 3 * held) * 4;
  }

  std::vector<std::pair<std::string, int64_t>> workspace() const {
    std::vector<std::pair<std::string, int64_t>> held = {{"queries", heads * rows * key_size * 2}};
    const int64_t places = heads * most_splits() * rows;
    if (most_splits() > 1) {
      held.push_back({"partial", places * result_size * 4});
      held.push_back({"marks", places * 8});
    }
    return held;
  }

  void check() const {
    require(std::min(rows, heads) > 0, text(heads) + " key heads of " + text(rows) + " rows", "one of each or more");
    require(shared_bytes() <= 99 << 10,
            "heads of " + text(key_size) + " numbers (" + text(shared_bytes()) + " bytes a block)", text(99 << 10));
  }
};

// strides of y, in numbers: batch, key head, token, head of the group.
inline void merge_launch(Plan& plan, const AttentionSizes& sizes, std::array<int64_t, 6> group_and_strides) {
  if (sizes.splits() == 1) return;
  std::vector<Argument> arguments = {"partial", "marks", "y", number(sizes.splits()), number(sizes.rows),
                                     number(sizes.result_size)};
  for (int64_t value : group_and_strides) arguments.push_back(number(value));
  plan.launches.push_back({"vl2_attention_merge", {sizes.rows, sizes.heads, 1}, {128, 1, 1}, 0, arguments});
}

// Buffers by name, then int32 numbers.
inline std::vector<Argument> named(std::initializer_list<const char*> names, std::initializer_list<int64_t> numbers) {
  std::vector<Argument> arguments;
  for (const char* name : names) arguments.push_back(name ? Argument(name) : Argument());
  for (int64_t value : numbers) arguments.push_back(number(value));
  return arguments;
}

inline void room(int64_t tokens, int64_t capacity) {
  require(0 < tokens && tokens <= capacity, text(tokens) + " tokens in a cache of " + text(capacity), "enough room");
}

struct AttentionProblem {
  int64_t batch, heads, kv_heads, tokens, head_dim, capacity;
  float scale;
};

inline Plan attention_plan(const AttentionProblem& p) {
  require(p.heads % p.kv_heads == 0, text(p.heads) + " heads on " + text(p.kv_heads) + " key heads", "whole groups");
  require(p.head_dim % 16 == 0 && p.head_dim <= 256, "heads of " + text(p.head_dim), "a multiple of 16 up to 256");
  room(p.tokens, p.capacity);
  const int64_t group = p.heads / p.kv_heads, size = p.head_dim;
  const AttentionSizes sizes{p.tokens * group, p.batch * p.kv_heads, size, size, size, p.capacity};
  sizes.check();
  const bool split = sizes.splits() > 1;
  auto attend = named({"queries", "key_cache", "value_cache", "past_length", "y", split ? "partial" : nullptr,
                       split ? "marks" : nullptr},
                      {p.tokens, group, p.kv_heads, size, p.capacity, sizes.chunk()});
  attend.emplace_back(p.scale);
  Plan plan{{{"vl2_attention_prepare", {p.tokens, p.batch, 1}, {128, 1, 1}, 0,
              named({"query", "key", "value", "cos", "sin", "past_length", "queries", "key_cache", "value_cache"},
                    {p.tokens, p.heads, p.kv_heads, size, p.capacity})},
             {"vl2_attention", sizes.grid(), {128 * sizes.row_tiles(), 1, 1}, sizes.shared_bytes(), attend}},
            sizes.workspace()};
  merge_launch(plan, sizes, {group, p.kv_heads, p.tokens * p.heads * size, group * size, p.heads * size, size});
  return plan;
}

struct LatentProblem {
  int64_t batch, heads, tokens, rank, rope_dim, capacity;
  float scale;
};

inline Plan latent_plan(const LatentProblem& p) {
  require(p.rank % 16 == 0 && p.rank <= 512 && p.rope_dim % 8 == 0,
          "latents of " + text(p.rank) + " + " + text(p.rope_dim), "multiples of 16, up to 512, and of 8");
  room(p.tokens, p.capacity);
  const AttentionSizes sizes{p.tokens * p.heads, p.batch, p.rank + p.rope_dim, 0, p.rank, p.capacity};
  sizes.check();
  const bool split = sizes.splits() > 1;
  auto attend = named({"queries", "cache", "past_length", "y", split ? "partial" : nullptr, split ? "marks" : nullptr},
                      {p.tokens, p.heads, p.rank, p.rope_dim, p.capacity, sizes.chunk()});
  attend.emplace_back(p.scale);
  Plan plan{{{"vl2_latent_prepare", {p.tokens, p.batch, 1}, {128, 1, 1}, 0,
              named({"query", "query_rope", "latent", "key_rope", "cos", "sin", "past_length", "queries", "cache"},
                    {p.tokens, p.heads, p.rank, p.rope_dim, p.capacity})},
             {"vl2_latent_attention", sizes.grid(), {128 * sizes.row_tiles(), 1, 1}, sizes.shared_bytes(), attend}},
            sizes.workspace()};
  merge_launch(plan, sizes, {p.heads, 1, p.heads * p.tokens * p.rank, 0, p.rank, p.tokens * p.rank});
  return plan;
}

}  // namespace vl2

// Attention of blocks of query rows over tiles of keys. Row r of a kv head's queries is token r / group, head r % group of
// its heads, so that all heads of latent attention share one pass over the cache. A part of kernel.h.
//
// What a task computes depends on sizes only, never on the number of threads: neither do the results.
#pragma once

constexpr int64_t kTileTokens = 8 * Lanes::kTokens;

struct Blocks {
  int64_t regs;              // registers of rows of a group: 1 or 2
  int64_t rows, per_head;    // rows of a block (a multiple of the group's), blocks of a kv head
  int64_t chunk, chunks;     // tokens that a task reads, tasks of a block
  int64_t lanes() const { return regs * Lanes::kLanes; }
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t quotient_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t longest_past(const Problem& p) {
  int64_t longest = 0;
  for (int64_t b = 0; b < p.batch; ++b) longest = most(longest, p.past[b]);
  return longest;
}

inline Blocks make_blocks(const Problem& p) {
  constexpr int64_t kEnoughTasks = 16, kLongestChunk = 8;
  Blocks blocks;
  const int64_t rows = p.tokens * p.group(), total = longest_past(p) + p.tokens;
  blocks.regs = rows <= Lanes::kLanes ? 1 : 2;
  const int64_t lanes = blocks.lanes(), wide = p.query.width() > 256 ? 32 : 64;
  blocks.rows = least(quotient_up(rows, lanes) * lanes, most(wide, lanes));
  blocks.per_head = quotient_up(rows, blocks.rows);
  const int64_t tasks = p.batch * p.kv_heads * blocks.per_head, tiles = quotient_up(total, kTileTokens);
  const int64_t wanted = tasks >= kEnoughTasks ? tiles : least(quotient_up(tiles * tasks, kEnoughTasks), kLongestChunk);
  blocks.chunk = wanted * kTileTokens;
  blocks.chunks = quotient_up(total, blocks.chunk);
  return blocks;
}

// Sums of a block: values [width][lanes] for each group of rows, the largest score and the sum of weights of each row.
struct State {
  float *o, *largest, *sum;

  static int64_t floats(const Problem& p, const Blocks& blocks) { return blocks.rows * (p.value_width + 2); }
  State(float* at, const Problem& p, const Blocks& blocks)
      : o(at), largest(at + blocks.rows * p.value_width), sum(largest + blocks.rows) {}

  void clear(const Problem& p, const Blocks& blocks) const {
    __builtin_memset(o, 0, static_cast<size_t>(floats(p, blocks)) * sizeof(float));
    for (int64_t r = 0; r < blocks.rows; ++r) largest[r] = -__builtin_inff();
  }
};

struct Block {
  int64_t b, g, first;  // batch, kv head, first row
};

inline Block block_of(const Problem& p, const Blocks& blocks, int64_t index) {
  const int64_t head = index / blocks.per_head;
  return {head / p.kv_heads, head % p.kv_heads, index % blocks.per_head * blocks.rows};
}

inline int64_t rows_of(const Problem& p, const Blocks& blocks, const Block& block) {
  return least(blocks.rows, p.tokens * p.group() - block.first);
}

// q [groups][width][lanes]: the block's queries, rotated and multiplied by the softmax scale; lanes without a row are 0.
// row: space for one query.
inline void gather_block(const Problem& p, const Blocks& blocks, const Block& block, float* row, float* q) {
  const int64_t width = p.query.width(), lanes = blocks.lanes(), count = rows_of(p, blocks, block);
  __builtin_memset(q, 0, static_cast<size_t>(blocks.rows * width) * sizeof(float));
  for (int64_t r = 0; r < count; ++r) {
    const int64_t index = block.first + r;
    gather_row(p.query, p, block.b, index / p.group(), block.g * p.group() + index % p.group(), row);
    float* to = q + r / lanes * width * lanes + r % lanes;
    for (int64_t i = 0; i < width; ++i) to[i * lanes] = row[i] * p.scale;
  }
}

// A tile of a cache from token `t` on; expanded to floats in `space` where it is not contiguous floats already.
inline Tile tile_of(const Problem& p, const Cache& cache, const Block& block, int64_t t, int64_t n, float* space) {
  const int64_t width = cache.width(), row = (block.b * p.capacity + t) * p.kv_heads + block.g;
  if (cache.type == CacheType::kFloat && p.kv_heads == 1)
    return {static_cast<const float*>(cache.data) + row * width, width, n, nullptr, 0};
  for (int64_t i = 0; i < n; ++i) load_row(cache, row + i * p.kv_heads, space + i * width);
  return {space, width, n, nullptr, 0};
}

// What tasks share. q and states are null where every block is one task, which then has its own.
struct Tiled {
  const Problem& p;
  Blocks blocks;
  float *q, *states;

  int64_t q_floats() const { return blocks.rows * p.query.width(); }
  int64_t own_floats() const {
    const int64_t tiles = kTileTokens * (p.query.width() + p.value_width), rows = kTileTokens * blocks.rows;
    return tiles + rows + blocks.rows + p.query.width() + q_floats() + State::floats(p, blocks);
  }
};

// How many of the tile's n tokens each row sees, in visible [rows]; false where all rows see all.
inline bool limit_rows(const Problem& p, const Blocks& blocks, const Block& block, int64_t t, int64_t n, float* visible) {
  const int64_t count = rows_of(p, blocks, block), past = p.past[block.b];
  if (past + block.first / p.group() + 1 >= t + n) return false;
  for (int64_t r = 0; r < blocks.rows; ++r) {
    const int64_t seen = r < count ? past + (block.first + r) / p.group() + 1 - t : 0;
    visible[r] = static_cast<float>(most(least(seen, n), 0));
  }
  return true;
}

// Tokens of a tile that any of `count` rows sees.
inline int64_t tokens_seen(const float* visible, int64_t count) {
  float seen = 0.0f;
  for (int64_t r = 0; r < count; ++r) seen = visible[r] > seen ? visible[r] : seen;
  return static_cast<int64_t>(seen);
}

// Takes a tile into the sums of every group of rows. s: space for the scores of one group; visible: as in limit_rows or null.
template <int kRegs>
inline void take_tile(const Tiled& tiled, const float* q, const Tile& keys, const Tile& values, float* s,
                      const float* visible, const State& state) {
  constexpr int64_t kRow = kRegs * Lanes::kLanes;
  const Problem& p = tiled.p;
  for (int64_t first = 0; first < tiled.blocks.rows; first += kRow) {
    Tile tile = keys;
    if (first > 0) tile.ahead = nullptr;
    if (visible) tile.n = tokens_seen(visible + first, kRow);
    if (tile.n == 0) continue;
    score_tile<kRegs>(q + first * p.query.width(), p.query.width(), tile, s);
    Lanes::Reg keep[kRegs];
    for (int r = 0; r < kRegs; ++r) {
      const int64_t row = first + r * Lanes::kLanes;
      keep[r] = softmax_step(s + r * Lanes::kLanes, tile.n, kRow, visible ? visible + row : nullptr,
                             state.largest + row, state.sum + row);
    }
    value_tile<kRegs>(s, keep, {values.rows, values.stride, tile.n, nullptr, 0}, p.value_width,
                      state.o + first * p.value_width);
  }
}

// The sums of a block over tokens [begin, end).
inline void attend_range(const Tiled& tiled, const Block& block, int64_t begin, int64_t end, const float* q, float* own,
                         const State& state) {
  const Problem& p = tiled.p;
  const int64_t width = p.query.width();
  float* value_space = own + kTileTokens * width;
  float* s = value_space + kTileTokens * p.value_width;
  float* visible = s + kTileTokens * tiled.blocks.rows;
  for (int64_t t = begin; t < end; t += kTileTokens) {
    const int64_t n = least(kTileTokens, end - t);
    Tile keys = tile_of(p, p.keys, block, t, n, own);
    if (p.kv_heads == 1 && t + n < end) {
      const int64_t step = p.keys.element_size() * (tiled.blocks.regs == 1 ? 2 : 1) * Lanes::kTokens;
      keys.ahead = static_cast<const char*>(p.keys.data) + (block.b * p.capacity + t + n) * width * p.keys.element_size();
      keys.ahead_step = step;
    }
    const Tile values = p.shared_values() ? Tile{keys.rows, keys.stride, n, nullptr, 0}
                                          : tile_of(p, p.values, block, t, n, value_space);
    const float* limits = limit_rows(p, tiled.blocks, block, t, n, visible) ? visible : nullptr;
    (tiled.blocks.regs == 1 ? take_tile<1> : take_tile<2>)(tiled, q, keys, values, s, limits, state);
  }
}

// Attention of blocks of query rows over tiles of keys. Row r of a kv head's queries is token r / group, head r % group of
// its heads, so that all heads of latent attention share one pass over the cache. A part of kernel.h.
//
// What a task computes depends on sizes only, never on the number of threads: neither do the results.
#pragma once

struct Blocks {
  int64_t regs;              // registers of rows of a group: 1 or 2
  int64_t rows, per_head;    // rows of a block (a multiple of the group's), blocks of a kv head
  int64_t tile;              // tokens that are expanded at a time
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
  constexpr int64_t kEnoughTasks = 16, kShortest = 64, kLongest = 512;
  Blocks blocks;
  const int64_t rows = p.tokens * p.group(), total = longest_past(p) + p.tokens;
  blocks.regs = rows <= Lanes::kLanes ? 1 : 2;
  const int64_t lanes = blocks.lanes(), wide = p.query.width() > 256 ? 32 : 128;
  blocks.rows = least(quotient_up(rows, lanes) * lanes, most(wide, lanes));
  blocks.per_head = quotient_up(rows, blocks.rows);
  // wide rows stay in the first-level cache from their expansion to their use; narrow ones save on rescaling
  blocks.tile = (p.query.width() > 256 ? 2 : 4) * Lanes::kTokens;
  const int64_t tasks = p.batch * p.kv_heads * blocks.per_head;
  const int64_t share = most(least(quotient_up(total * tasks, kEnoughTasks), kLongest), kShortest);
  blocks.chunk = quotient_up(tasks >= kEnoughTasks ? total : share, blocks.tile) * blocks.tile;
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
// space: kLanes queries.
inline void gather_block(const Problem& p, const Blocks& blocks, const Block& block, float* space, float* q) {
  const int64_t width = p.query.width(), lanes = blocks.lanes(), count = rows_of(p, blocks, block);
  const auto scale = Lanes::set1(p.scale);
  for (int64_t first = 0; first < blocks.rows; first += Lanes::kLanes) {
    __builtin_memset(space, 0, static_cast<size_t>(Lanes::kLanes * width) * sizeof(float));
    for (int64_t r = first; r < least(first + Lanes::kLanes, count); ++r) {
      const int64_t index = block.first + r, head = block.g * p.group() + index % p.group();
      gather_row(p.query, p, block.b, index / p.group(), head, space + (r - first) * width);
    }
    float* to = q + first / lanes * width * lanes + first % lanes;
    int64_t i = 0;
    for (; i + Lanes::kLanes <= width; i += Lanes::kLanes) {
      Lanes::Reg x[Lanes::kLanes];
      for (int r = 0; r < Lanes::kLanes; ++r) x[r] = Lanes::mul(Lanes::load(space + r * width + i), scale);
      Lanes::transpose(x);
      for (int c = 0; c < Lanes::kLanes; ++c) Lanes::store(to + (i + c) * lanes, x[c]);
    }
    for (; i < width; ++i)
      for (int r = 0; r < Lanes::kLanes; ++r) to[i * lanes + r] = space[r * width + i] * p.scale;
  }
}

// A tile of a cache from row `row` on, as floats in the space that `tile` names.
inline void fill_tile(const Problem& p, const Cache& cache, int64_t row, const Tile& tile, float* space) {
  const int64_t width = cache.width();
  for (int64_t i = 0; i < tile.n; ++i, row += p.token_rows) {
    float* to = space + i * kSegment;
    int64_t c = 0;
    // a constant width lets the compiler unroll
    for (; c + kSegment <= width; c += kSegment) load_columns(cache, row, c, c + kSegment, to + c * tile.tokens);
    if (c < width) load_columns(cache, row, c, width, to + c * tile.tokens);
  }
}

// What tasks share. q and states are null where every block is one task, which then has its own.
struct Tiled {
  const Problem& p;
  Blocks blocks;
  float *q, *states;

  int64_t q_floats() const { return blocks.rows * p.query.width(); }
  int64_t own_floats() const {
    const int64_t tiles = blocks.tile * (segmented(p.query.width()) + segmented(p.value_width)), rows = blocks.tile * blocks.rows;
    return tiles + rows + blocks.rows + Lanes::kLanes * p.query.width() + q_floats() + State::floats(p, blocks);
  }
};

// How many of the tile's n tokens each row sees, in visible [rows]; false where all rows see all.
inline bool limit_rows(const Problem& p, const Blocks& blocks, const Block& block, int64_t t, int64_t n, float* visible) {
  const int64_t count = rows_of(p, blocks, block);
  if (p.seen(block.b, block.first / p.group()) >= t + n) return false;
  for (int64_t r = 0; r < blocks.rows; ++r) {
    const int64_t seen = r < count ? p.seen(block.b, (block.first + r) / p.group()) - t : 0;
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
    value_tile<kRegs>(s, keep, {values.segments, values.tokens, tile.n, nullptr, 0}, p.value_width,
                      state.o + first * p.value_width);
  }
}

// The sums of a block over tokens [begin, end).
inline void attend_range(const Tiled& tiled, const Block& block, int64_t begin, int64_t end, const float* q, float* own,
                         const State& state) {
  const Problem& p = tiled.p;
  const int64_t width = p.query.width();
  const int64_t tile = tiled.blocks.tile;
  float* value_space = own + tile * segmented(width);
  float* s = value_space + tile * segmented(p.value_width);
  float* visible = s + tile * tiled.blocks.rows;
  for (int64_t t = begin; t < end; t += tile) {
    const int64_t n = least(tile, end - t), row = (block.b * p.capacity + t) * p.token_rows + block.g;
    Tile keys{own, tile, n, nullptr, 0}, values = keys;
    fill_tile(p, p.keys, row, keys, own);
    if (p.token_rows == 1 && t + n < end) {
      const int64_t step = p.keys.element_size() * (tiled.blocks.regs == 1 ? 2 : 1) * Lanes::kTokens;
      keys.ahead = static_cast<const char*>(p.keys.data) + (block.b * p.capacity + t + n) * width * p.keys.element_size();
      keys.ahead_step = step;
    }
    if (!p.shared_values()) {
      values.segments = value_space;
      fill_tile(p, p.values, row, values, value_space);
    }
    const float* limits = limit_rows(p, tiled.blocks, block, t, n, visible) ? visible : nullptr;
    (tiled.blocks.regs == 1 ? take_tile<1> : take_tile<2>)(tiled, q, keys, values, s, limits, state);
  }
}

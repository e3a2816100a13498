// Attention of blocks of query rows by AMX, as in tiled.h, but that sums lie row by row. A part of kernel_amx.cc.
#pragma once

// What tasks share. q and states are null where every block is one task, which then has its own.
struct Termed {
  const Problem& p;
  Blocks blocks;
  float *q, *states;

  int64_t groups() const { return blocks.rows / kRows; }
  int64_t chunks() const { return quotient_up(p.query.width(), kPairs); }  // of keys and queries
  int64_t columns() const { return quotient_up(p.value_width, kRows); }    // of values
  // Rows of sums are apart by an odd number of lines: powers of two would share few sets of the first-level cache.
  int64_t sums_stride() const { return (columns() | 1) * kRows; }
  // Sizes in floats: a tile's terms are kTermed / 2.
  int64_t q_floats() const { return groups() * chunks() * kTermed / 2; }
  int64_t state_floats() const { return blocks.rows * (sums_stride() + 2); }
  int64_t own_floats() const {
    const int64_t tile = blocks.tile, expanded = tile * (p.query.width() + p.value_width);
    const int64_t keys = tile / kRows * most(chunks(), 2), values = tile / kPairs * (most(columns(), 4) + 1);
    return (keys + values) * kTermed / 2 + (tile + kPairs) * kRows + blocks.rows + expanded +
           2 * kRows * p.query.width() + q_floats() + state_floats();
  }
};

inline Blocks term_blocks(const Problem& p) {
  constexpr int64_t kEnoughTasks = 8, kShortest = 64, kLongest = 512;
  Blocks blocks;
  const bool wide = p.query.width() > 256;
  const int64_t rows = p.tokens * p.group(), total = longest_past(p) + p.tokens;
  blocks.regs = 1;
  blocks.rows = least(quotient_up(rows, kRows) * kRows, wide ? 128 : 256);
  blocks.per_head = quotient_up(rows, blocks.rows);
  blocks.rows = quotient_up(quotient_up(rows, blocks.per_head), kRows) * kRows;  // blocks of about the same size
  blocks.tile = wide && blocks.rows > kRows ? 32 : 64;
  const int64_t tasks = p.batch * p.kv_heads * blocks.per_head;
  const int64_t share = most(least(quotient_up(total * tasks, kEnoughTasks), kLongest), kShortest);
  blocks.chunk = quotient_up(tasks >= kEnoughTasks ? total : share, blocks.tile) * blocks.tile;
  blocks.chunks = quotient_up(total, blocks.chunk);
  return blocks;
}

// The memory of a task, in the order of Termed::own_floats.
struct TermSpace {
  uint16_t *keys, *values, *weights;
  float *s, *rest, *visible, *key_rows, *value_rows, *gathered, *q, *state;

  TermSpace(float* at, const Termed& t) {
    const int64_t tile = t.blocks.tile, width = t.p.query.width();
    const auto take = [&at](int64_t floats) { return at += floats, at - floats; };
    keys = reinterpret_cast<uint16_t*>(take(tile / kRows * most(t.chunks(), 2) * kTermed / 2));
    values = reinterpret_cast<uint16_t*>(take(tile / kPairs * most(t.columns(), 4) * kTermed / 2));
    weights = reinterpret_cast<uint16_t*>(take(tile / kPairs * kTermed / 2));
    s = take(tile * kRows);
    rest = take(kPairs * kRows);
    q = take(t.q_floats());
    state = take(t.state_floats());
    visible = take(t.blocks.rows);
    key_rows = take(tile * width);
    value_rows = take(tile * t.p.value_width);
    gathered = take(2 * kRows * width);
  }
};

struct TermState {
  float *o, *largest, *sum;

  TermState(float* at, const Termed& t)
      : o(at), largest(at + t.blocks.rows * t.sums_stride()), sum(largest + t.blocks.rows) {}

  // sums: as well, which a single group of rows overwrites with those of its first tile.
  void clear(const Termed& t, bool sums) const {
    if (sums) __builtin_memset(o, 0, static_cast<size_t>(t.blocks.rows * t.sums_stride()) * sizeof(float));
    for (int64_t r = 0; r < t.blocks.rows; ++r) largest[r] = -__builtin_inff(), sum[r] = 0.0f;
  }
};

// The terms of a block's queries, rotated and multiplied by the softmax scale. space: 2 · 16 queries.
inline void gather_terms(const Termed& t, const Block& block, float* space, uint16_t* q) {
  const int64_t width = t.p.query.width();
  Blocks one = t.blocks;
  one.rows = kRows;
  for (int64_t group = 0; group < t.groups(); ++group, q += t.chunks() * kTermed) {
    gather_block(t.p, one, {block.b, block.g, block.first + group * kRows}, space, space + kRows * width);
    pack_queries(space + kRows * width, width, q);
  }
}

// n rows of a cache from row `row` on as floats: where they lie, or expanded in `space`.
inline FloatRows rows_as_floats(const Problem& p, const Cache& cache, int64_t row, int64_t n, float* space) {
  const int64_t width = cache.width();
  if (cache.type == CacheType::kFloat)
    return {static_cast<const float*>(cache.data) + row * width, p.token_rows * width, width};
  for (int64_t i = 0; i < n; ++i, row += p.token_rows) load_columns(cache, row, 0, width, space + i * width);
  return {space, width, width};
}

// Multiplies the sums of rows whose largest score has grown.
inline void keep_sums(const float* keep, int64_t stride, float* o) {
  for (int64_t r = 0; r < kRows; ++r, o += stride) {
    if (keep[r] == 1.0f) continue;
    const auto factor = Lanes::set1(keep[r]);
    for (int64_t i = 0; i < stride; i += Lanes::kLanes) Lanes::store(o + i, Lanes::mul(Lanes::load(o + i), factor));
  }
}

// Scores of n tokens in own.s become weights, and they terms; the sums of the rows before are brought to the new scale.
inline void weigh(const Termed& t, int64_t n, const TermSpace& own, const float* limits, int64_t first, bool fresh,
                  const TermState& state) {
  float keep[kRows];
  Lanes::store(keep, softmax_step(own.s, n, kRows, limits, state.largest + first, state.sum + first));
  const int64_t steps = quotient_up(n, kPairs);
  __builtin_memset(own.s + n * kRows, 0, static_cast<size_t>((steps * kPairs - n) * kRows) * sizeof(float));
  pack_weights(own.s, steps, own.weights);
  if (!fresh) keep_sums(keep, t.sums_stride(), state.o + first * t.sums_stride());
}

// Takes a tile of n tokens into the sums of the only group of rows; limits: as in limit_rows or null.
inline void stream_terms(const Termed& t, const uint16_t* q, const FloatRows& keys, const FloatRows& values, int64_t n,
                         const TermSpace& own, const float* limits, bool fresh, const TermState& state) {
  for (int64_t first = 0; first < n; first += kPairs)
    stream_scores(q, {keys.data + first * keys.stride, keys.stride, keys.width}, n - first, own.keys,
                  own.s + first * kRows, own.rest);
  weigh(t, n, own, limits, 0, fresh, state);
  const auto add = n > kPairs ? stream_term_values<2> : stream_term_values<1>;
  add(own.weights, values, n, fresh, own.values, state.o, t.sums_stride());
}

// Takes a tile of n tokens into the sums of every group of rows; visible: as in limit_rows or null.
inline void take_terms(const Termed& t, const uint16_t* q, int64_t tokens, const TermSpace& own, const float* visible,
                       const TermState& state) {
  const int64_t chunks = t.chunks();
  for (int64_t group = 0; group < t.groups(); ++group, q += chunks * kTermed) {
    const int64_t first = group * kRows;
    const float* limits = visible ? visible + first : nullptr;
    const int64_t n = limits ? tokens_seen(limits, kRows) : tokens, steps = quotient_up(n, kPairs);
    if (n == 0) continue;
    for (int64_t step = 0; step < steps; ++step)
      score_step(q, own.keys + step * 2 * chunks * kTermed, chunks, own.s + step * kPairs * kRows, own.rest);
    weigh(t, n, own, limits, first, false, state);
    add_values(own.weights, own.values, steps, t.columns(), state.o + first * t.sums_stride(), t.sums_stride());
  }
}

// The sums of a block over tokens [begin, end) in `state`, which need not be initialized.
inline void attend_terms_range(const Termed& t, const Block& block, int64_t begin, int64_t end, const uint16_t* q,
                               const TermSpace& own, const TermState& state) {
  const Problem& p = t.p;
  state.clear(t, t.groups() > 1 || begin >= end);
  for (int64_t at = begin; at < end; at += t.blocks.tile) {
    const int64_t n = least(t.blocks.tile, end - at), row = (block.b * p.capacity + at) * p.token_rows + block.g;
    const FloatRows keys = rows_as_floats(p, p.keys, row, n, own.key_rows);
    FloatRows values = p.shared_values() ? keys : rows_as_floats(p, p.values, row, n, own.value_rows);
    values.width = p.value_width;
    const float* limits = limit_rows(p, t.blocks, block, at, n, own.visible) ? own.visible : nullptr;
    if (t.groups() == 1) {
      stream_terms(t, q, keys, values, n, own, limits, at == begin, state);
      continue;
    }
    pack_keys(keys, n, own.keys);
    pack_values(values, n, own.values);
    take_terms(t, q, n, own, limits, state);
  }
}

// Where row `row` of a block goes.
inline float* output_row(const Problem& p, const Block& block, int64_t row) {
  const int64_t index = block.first + row, head = block.g * p.group() + index % p.group();
  const Strides& to = p.output_strides;
  return p.output + block.b * to.batch + index / p.group() * to.token + head * to.head;
}

// to [width] = from · factor.
inline void write_scaled(const float* from, float factor, int64_t width, float* to) {
  int64_t i = 0;
  for (; i + Lanes::kLanes <= width; i += Lanes::kLanes)
    Lanes::store(to + i, Lanes::mul(Lanes::load(from + i), Lanes::set1(factor)));
  for (; i < width; ++i) to[i] = from[i] * factor;
}

// A block of which one task sees everything.
inline bool attend_terms_whole(const Termed& t, int64_t index) {
  const Problem& p = t.p;
  float* memory = scratch(Scratch::own, static_cast<size_t>(t.own_floats()));
  if (!memory) return false;
  const TileSession tiles;
  const TermSpace own(memory, t);
  const TermState state(own.state, t);
  const Block block = block_of(p, t.blocks, index);
  const int64_t count = rows_of(p, t.blocks, block);
  uint16_t* q = reinterpret_cast<uint16_t*>(own.q);
  gather_terms(t, block, own.gathered, q);
  attend_terms_range(t, block, 0, p.seen(block.b, (block.first + count - 1) / p.group()), q, own, state);
  for (int64_t r = 0; r < count; ++r)
    write_scaled(state.o + r * t.sums_stride(), 1.0f / state.sum[r], p.value_width, output_row(p, block, r));
  return true;
}

// One of the chunks of a block; its sums go to the shared states.
inline bool attend_terms_chunk(const Termed& t, int64_t index) {
  const Problem& p = t.p;
  float* memory = scratch(Scratch::own, static_cast<size_t>(t.own_floats()));
  if (!memory) return false;
  const TileSession tiles;
  const int64_t number = index / t.blocks.chunks, begin = index % t.blocks.chunks * t.blocks.chunk;
  const Block block = block_of(p, t.blocks, number);
  const TermState state(t.states + index * t.state_floats(), t);
  const int64_t seen = p.seen(block.b, (block.first + rows_of(p, t.blocks, block) - 1) / p.group());
  attend_terms_range(t, block, begin, least(begin + t.blocks.chunk, seen),
                     reinterpret_cast<const uint16_t*>(t.q + number * t.q_floats()), TermSpace(memory, t), state);
  return true;
}

// Row `index % rows` of a block over all chunks, brought to the common largest score.
inline void merge_terms(const Termed& t, int64_t index) {
  const Problem& p = t.p;
  const int64_t number = index / t.blocks.rows, r = index % t.blocks.rows, floats = t.state_floats();
  const Block block = block_of(p, t.blocks, number);
  if (r >= rows_of(p, t.blocks, block)) return;
  float* states = t.states + number * t.blocks.chunks * floats;
  const TermState first(states, t);
  float top = -__builtin_inff(), sum = 0.0f;
  for (int64_t c = 0; c < t.blocks.chunks; ++c) {
    const float largest = first.largest[c * floats + r];
    top = largest > top ? largest : top;
  }
  const auto base = finite_base(Lanes::set1(top));
  float* o = first.o + r * t.sums_stride();
  for (int64_t c = 0; c < t.blocks.chunks; ++c) {
    const auto factor = exp_lanes(Lanes::sub(Lanes::set1(first.largest[c * floats + r]), base));
    sum += first.sum[c * floats + r] * _mm512_cvtss_f32(factor);
    for (int64_t i = 0; i < t.columns() * kRows; i += Lanes::kLanes) {
      const auto before = c ? Lanes::load(o + i) : Lanes::zero();
      Lanes::store(o + i, Lanes::fma(Lanes::load(o + c * floats + i), factor, before));
    }
  }
  write_scaled(o, 1.0f / sum, p.value_width, output_row(p, block, r));
}

// False where memory ran out.
inline bool attend_terms(const Problem& p, const Parallel& parallel) {
  Termed t{p, term_blocks(p), nullptr, nullptr};
  const int64_t count = p.batch * p.kv_heads * t.blocks.per_head;
  int failed = 0;
  const auto noted = [&failed](bool done) { if (!done) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED); };
  if (t.blocks.chunks == 1) {
    each(parallel, count, true, [&](size_t i) { noted(attend_terms_whole(t, static_cast<int64_t>(i))); });
    return !failed;
  }
  const int64_t states = count * t.blocks.chunks * t.state_floats(), q = count * t.q_floats();
  t.states = scratch(Scratch::shared, static_cast<size_t>(states + q + 2 * kRows * p.query.width()));
  if (!t.states) return false;
  t.q = t.states + states;
  for (int64_t i = 0; i < count; ++i)
    gather_terms(t, block_of(p, t.blocks, i), t.q + q, reinterpret_cast<uint16_t*>(t.q + i * t.q_floats()));
  const int64_t tasks = count * t.blocks.chunks;
  each(parallel, tasks, true, [&](size_t i) { noted(attend_terms_chunk(t, static_cast<int64_t>(i))); });
  if (failed) return false;
  each(parallel, count * t.blocks.rows, true, [&](size_t i) { merge_terms(t, static_cast<int64_t>(i)); });
  return true;
}

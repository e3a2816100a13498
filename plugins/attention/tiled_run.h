// The tasks of tiled.h, and the merging of what several of them found for one block. A part of kernel.h.
#pragma once

// Runs body(index) for every index below count; side by side unless that would cost more than it saves.
template <typename Body>
inline void each(const Parallel& parallel, int64_t count, bool side_by_side, const Body& body) {
  if (side_by_side && count > 1) return parallel_for(parallel, static_cast<size_t>(count), body);
  for (int64_t i = 0; i < count; ++i) body(static_cast<size_t>(i));
}

// Output rows of a block: o [groups][width][lanes] / sum.
inline void write_block(const Problem& p, const Blocks& blocks, const Block& block, const State& state) {
  const int64_t lanes = blocks.lanes(), count = rows_of(p, blocks, block);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t index = block.first + r, head = block.g * p.group() + index % p.group();
    const float* from = state.o + r / lanes * p.value_width * lanes + r % lanes;
    float* to = p.output + block.b * p.output_strides.batch + index / p.group() * p.output_strides.token +
                head * p.output_strides.head;
    const float factor = 1.0f / state.sum[r];
    for (int64_t i = 0; i < p.value_width; ++i) to[i] = from[i * lanes] * factor;
  }
}

// A block of which one task sees everything.
inline bool attend_whole(const Tiled& tiled, int64_t index) {
  const Problem& p = tiled.p;
  float* own = scratch(Scratch::own, static_cast<size_t>(tiled.own_floats()));
  if (!own) return false;
  const Block block = block_of(p, tiled.blocks, index);
  const int64_t last = (block.first + rows_of(p, tiled.blocks, block) - 1) / p.group();
  float* q = own + tiled.own_floats() - tiled.q_floats();
  float* row = q - p.query.width();
  const State state(row - State::floats(p, tiled.blocks), p, tiled.blocks);
  gather_block(p, tiled.blocks, block, row, q);
  state.clear(p, tiled.blocks);
  attend_range(tiled, block, 0, p.past[block.b] + last + 1, q, own, state);
  write_block(p, tiled.blocks, block, state);
  return true;
}

// One of the chunks of a block; its sums go to the shared states.
inline bool attend_chunk(const Tiled& tiled, int64_t index) {
  const Problem& p = tiled.p;
  float* own = scratch(Scratch::own, static_cast<size_t>(tiled.own_floats()));
  if (!own) return false;
  const int64_t number = index / tiled.blocks.chunks, begin = index % tiled.blocks.chunks * tiled.blocks.chunk;
  const Block block = block_of(p, tiled.blocks, number);
  const int64_t last = (block.first + rows_of(p, tiled.blocks, block) - 1) / p.group();
  const State state(tiled.states + index * State::floats(p, tiled.blocks), p, tiled.blocks);
  state.clear(p, tiled.blocks);
  const int64_t end = least(begin + tiled.blocks.chunk, p.past[block.b] + last + 1);
  attend_range(tiled, block, begin, end, tiled.q + number * tiled.q_floats(), own, state);
  return true;
}

// Brings the chunks of a block to their common largest score and adds them up in the first one's state.
inline void merge_block(const Tiled& tiled, int64_t number) {
  const Problem& p = tiled.p;
  const Blocks& blocks = tiled.blocks;
  const int64_t floats = State::floats(p, blocks), lanes = blocks.lanes();
  float* states = tiled.states + number * blocks.chunks * floats;
  const State whole(states, p, blocks);
  for (int64_t r = 0; r < blocks.rows; r += Lanes::kLanes) {
    auto top = minus_infinity();
    for (int64_t c = 0; c < blocks.chunks; ++c)
      top = Lanes::max(top, Lanes::load(State(states + c * floats, p, blocks).largest + r));
    const auto base = finite_base(top);
    auto sum = Lanes::zero();
    for (int64_t c = 0; c < blocks.chunks; ++c) {
      const State part(states + c * floats, p, blocks);
      const auto factor = exp_lanes(Lanes::sub(Lanes::load(part.largest + r), base));
      sum = Lanes::fma(Lanes::load(part.sum + r), factor, sum);
      float* o = whole.o + r / lanes * p.value_width * lanes + r % lanes;
      const float* from = part.o + (o - whole.o);
      for (int64_t i = 0; i < p.value_width * lanes; i += lanes) {
        const auto scaled = Lanes::mul(Lanes::load(from + i), factor);
        Lanes::store(o + i, c == 0 ? scaled : Lanes::add(Lanes::load(o + i), scaled));
      }
    }
    Lanes::store(whole.sum + r, sum);
  }
  write_block(p, blocks, block_of(p, blocks, number), whole);
}

// False where memory ran out.
inline bool attend_tiled(const Problem& p, const Parallel& parallel) {
  Tiled tiled{p, make_blocks(p), nullptr, nullptr};
  const Blocks& blocks = tiled.blocks;
  const int64_t count = p.batch * p.kv_heads * blocks.per_head;
  int failed = 0;
  const auto noted = [&failed](bool done) { if (!done) __atomic_store_n(&failed, 1, __ATOMIC_RELAXED); };
  if (blocks.chunks == 1) {
    each(parallel, count, true, [&](size_t i) { noted(attend_whole(tiled, static_cast<int64_t>(i))); });
    return !failed;
  }
  const int64_t states = count * blocks.chunks * State::floats(p, blocks);
  tiled.states = scratch(Scratch::shared, static_cast<size_t>(states + count * tiled.q_floats() + p.query.width()));
  if (!tiled.states) return false;
  tiled.q = tiled.states + states;
  float* row = tiled.q + count * tiled.q_floats();
  for (int64_t i = 0; i < count; ++i)
    gather_block(p, blocks, block_of(p, blocks, i), row, tiled.q + i * tiled.q_floats());
  each(parallel, count * blocks.chunks, true, [&](size_t i) { noted(attend_chunk(tiled, static_cast<int64_t>(i))); });
  if (failed) return false;
  each(parallel, count, true, [&](size_t i) { merge_block(tiled, static_cast<int64_t>(i)); });
  return true;
}

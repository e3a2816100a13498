// The tasks of tiled.h, and the merging of what several of them found for one block. A part of kernel.h.
#pragma once

// Runs body(index) for every index below count; side by side unless that would cost more than it saves.
template <typename Body>
inline void each(const Parallel& parallel, int64_t count, bool side_by_side, const Body& body) {
  if (side_by_side && count > 1) {
    auto task = [](void* data, size_t index) { (*static_cast<const Body*>(data))(index); };
    return parallel.run(parallel.context, task, static_cast<size_t>(count), const_cast<Body*>(&body));
  }
  for (int64_t i = 0; i < count; ++i) body(static_cast<size_t>(i));
}

// Columns [begin, end) of a block's output: o [groups][width][lanes] / sum.
inline void write_columns(const Tiled& tiled, const Block& block, const State& state, int64_t begin, int64_t end) {
  const Problem& p = tiled.p;
  const int64_t lanes = tiled.blocks.lanes(), count = rows_of(p, tiled.blocks, block);
  for (int64_t first = 0; first < count; first += Lanes::kLanes) {
    const int64_t rows = least(Lanes::kLanes, count - first);
    const float* from = state.o + first / lanes * p.value_width * lanes + first % lanes;
    float* to[Lanes::kLanes];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t index = block.first + first + r, head = block.g * p.group() + index % p.group();
      to[r] = p.output + block.b * p.output_strides.batch + index / p.group() * p.output_strides.token +
              head * p.output_strides.head;
    }
    const auto factor = Lanes::div(Lanes::set1(1.0f), Lanes::load(state.sum + first));
    int64_t i = begin;
    for (; i + Lanes::kLanes <= end; i += Lanes::kLanes) {
      Lanes::Reg x[Lanes::kLanes];
      for (int c = 0; c < Lanes::kLanes; ++c) x[c] = Lanes::mul(Lanes::load(from + (i + c) * lanes), factor);
      Lanes::transpose(x);
      for (int64_t r = 0; r < rows; ++r) Lanes::store(to[r] + i, x[r]);
    }
    for (; i < end; ++i) {
      float x[Lanes::kLanes];
      Lanes::store(x, Lanes::mul(Lanes::load(from + i * lanes), factor));
      for (int64_t r = 0; r < rows; ++r) to[r][i] = x[r];
    }
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
  float* space = q - Lanes::kLanes * p.query.width();
  const State state(space - State::floats(p, tiled.blocks), p, tiled.blocks);
  gather_block(p, tiled.blocks, block, space, q);
  state.clear(p, tiled.blocks);
  attend_range(tiled, block, 0, p.seen(block.b, last), q, own, state);
  write_columns(tiled, block, state, 0, p.value_width);
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
  const int64_t end = least(begin + tiled.blocks.chunk, p.seen(block.b, last));
  attend_range(tiled, block, begin, end, tiled.q + number * tiled.q_floats(), own, state);
  return true;
}

// Columns [begin, end) of a block's values over all chunks, brought to the common largest score, in the first chunk's
// state, and to the output. sums [rows]: space of this call.
inline void merge_columns(const Tiled& tiled, int64_t number, int64_t begin, int64_t end, float* sums) {
  const Problem& p = tiled.p;
  const Blocks& blocks = tiled.blocks;
  const int64_t floats = State::floats(p, blocks), lanes = blocks.lanes(), chunks = blocks.chunks;
  float* states = tiled.states + number * chunks * floats;
  const State whole(states, p, blocks);
  float* factors = sums + blocks.rows;
  for (int64_t r = 0; r < blocks.rows; r += Lanes::kLanes) {
    auto top = minus_infinity(), sum = Lanes::zero();
    for (int64_t c = 0; c < chunks; ++c) top = Lanes::max(top, Lanes::load(whole.largest + c * floats + r));
    const auto base = finite_base(top);
    for (int64_t c = 0; c < chunks; ++c) {
      const auto factor = exp_lanes(Lanes::sub(Lanes::load(whole.largest + c * floats + r), base));
      sum = Lanes::fma(Lanes::load(whole.sum + c * floats + r), factor, sum);
      Lanes::store(factors + c * Lanes::kLanes, factor);
    }
    Lanes::store(sums + r, sum);
    float* o = whole.o + r / lanes * p.value_width * lanes + r % lanes;
    for (int64_t i = begin; i < end; ++i) {
      auto value = Lanes::zero();
      for (int64_t c = 0; c < chunks; ++c)
        value = Lanes::fma(Lanes::load(o + c * floats + i * lanes), Lanes::load(factors + c * Lanes::kLanes), value);
      Lanes::store(o + i * lanes, value);
    }
  }
  State merged = whole;
  merged.sum = sums;
  write_columns(tiled, block_of(p, blocks, number), merged, begin, end);
}

// One slice of the columns of one block.
inline bool merge_slice(const Tiled& tiled, int64_t index) {
  const int64_t slices = quotient_up(tiled.p.value_width, kSegment), begin = index % slices * kSegment;
  float* sums = scratch(Scratch::own, static_cast<size_t>(tiled.blocks.rows + tiled.blocks.chunks * Lanes::kLanes));
  if (!sums) return false;
  merge_columns(tiled, index / slices, begin, least(begin + kSegment, tiled.p.value_width), sums);
  return true;
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
  tiled.states = scratch(Scratch::shared, static_cast<size_t>(states + count * tiled.q_floats() + Lanes::kLanes * p.query.width()));
  if (!tiled.states) return false;
  tiled.q = tiled.states + states;
  float* space = tiled.q + count * tiled.q_floats();
  for (int64_t i = 0; i < count; ++i)
    gather_block(p, blocks, block_of(p, blocks, i), space, tiled.q + i * tiled.q_floats());
  each(parallel, count * blocks.chunks, true, [&](size_t i) { noted(attend_chunk(tiled, static_cast<int64_t>(i))); });
  if (failed) return false;
  const int64_t slices = quotient_up(p.value_width, kSegment);
  each(parallel, count * slices, true, [&](size_t i) { noted(merge_slice(tiled, static_cast<int64_t>(i))); });
  return !failed;
}

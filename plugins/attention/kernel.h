// The attention kernel for one instruction set: included by kernel_*.cc after the set's lanes, in an anonymous namespace.
#pragma once

#include "attention/numbers.h"
#include "attention/rows.h"
#include "attention/softmax.h"
#include "attention/tile.h"
#include "attention/tiled.h"
#include "attention/tiled_run.h"
#include "attention/streaming.h"

// Writes the new rows of one cache. width floats of space are taken from the thread that runs the task.
inline bool write_new(const Problem& p, const Rows& rows, const Cache& cache, const Parallel& parallel) {
  constexpr int64_t kTokens = 16;
  const int64_t per_batch = quotient_up(p.tokens, kTokens);
  int failed = 0;
  each(parallel, p.batch * per_batch, true, [&](size_t index) {
    float* row = scratch(Scratch::own, static_cast<size_t>(cache.width()));
    if (!row) return __atomic_store_n(&failed, 1, __ATOMIC_RELAXED);
    const int64_t b = static_cast<int64_t>(index) / per_batch, first = static_cast<int64_t>(index) % per_batch * kTokens;
    for (int64_t t = first; t < least(first + kTokens, p.tokens); ++t)
      for (int64_t g = 0; g < p.kv_heads; ++g) {
        gather_row(rows, p, b, t, g, row);
        store_row(cache, (b * p.capacity + p.past[b] + t) * p.token_rows + g, row);
      }
  });
  return !failed;
}

// False where memory ran out.
inline bool attend(const Problem& p, const Parallel& parallel,
                   bool (*attend_blocks)(const Problem&, const Parallel&) = attend_tiled) {
  if (p.batch == 0 || p.tokens == 0) return true;
  if (p.new_keys.width() && !write_new(p, p.new_keys, p.keys, parallel)) return false;
  if (!p.shared_values() && p.new_values.width() && !write_new(p, p.new_values, p.values, parallel)) return false;
  if (!streams(p) || p.keys.type != p.values.type) return attend_blocks(p, parallel);
  switch (p.keys.type) {
    case CacheType::kFloat: return attend_streaming<float>(p, parallel);
    case CacheType::kHalf: return attend_streaming<uint16_t>(p, parallel);
    default: return attend_streaming<int8_t>(p, parallel);
  }
}

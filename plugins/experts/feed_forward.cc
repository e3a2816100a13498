#include "experts/feed_forward.h"

#include <algorithm>
#include <memory>

namespace vl2 {
namespace {

// A task reads about as many bytes of weights, so that a decode step has enough of them for all threads.
constexpr size_t TASK_BYTES = 96 << 10;
// A buffer of a task: the most rows and panels that it computes at once.
constexpr size_t BUFFER = std::max(ROW_BLOCK * WIDE_PANELS, TILE_BLOCK * TILE_PANELS_WIDE) * PANEL_ROWS;
constexpr size_t FEW_PANELS = 4, MOST_PANELS = 8;
// What memory sends while a unit's last lines are computed: the beginning of the next unit's.
constexpr size_t AHEAD_BYTES = 2048;

// One unit's rows of activations before and between its products.
struct Work {
  const Unit* unit;
  std::unique_ptr<float[]> gathered;
  std::shared_ptr<Rows> input;  // one for all units of a single token
  std::unique_ptr<Rows> inner;
  std::unique_ptr<float[]> hidden;  // [tokens, inner columns], silu(gate) ⊙ up

  size_t rows() const { return unit->tokens.size(); }
  size_t width() const { return unit->part.gate_up.panels / 2 * PANEL_ROWS; }
};

struct Task {
  Work* work;
  size_t row;
  Panels pairs;
};

// Runs on one thread; the caller has a task for each unit.
void prepare(const Device& d, const Matrix& m, Rows& rows) {
  const Parallel alone{nullptr, [](void*, void (*task)(void*, size_t), size_t count, void* data) {
                         for (size_t i = 0; i < count; ++i) task(data, i);
                       }};
  rows.prepare(d.kernels, m, d.fast, alone);
}

// Rows of x in the order of the unit's tokens; x itself where that is the same.
void gather(const Tokens& tokens, Work& work) {
  const std::vector<size_t>& order = work.unit->tokens;
  const float* x = tokens.x;
  const bool whole = order.size() == tokens.count;
  if (!whole) {
    work.gathered.reset(new float[order.size() * tokens.hidden]);
    for (size_t i = 0; i < order.size(); ++i)
      std::copy_n(tokens.x + order[i] * tokens.hidden, tokens.hidden, work.gathered.get() + i * tokens.hidden);
    x = work.gathered.get();
  }
  const Shape shape{int64_t(order.size()), int64_t(tokens.hidden)};
  work.input = std::make_shared<Rows>(x, tokens.hidden, shape);
}

std::vector<Task> cut(std::vector<Work>& works) {
  std::vector<Task> tasks;
  for (Work& work : works) {
    const Matrix& m = work.unit->part.gate_up;
    const size_t pairs = m.panels / 2, rows = work.rows();
    const size_t wide = work.input->panels() / 2, bytes = TASK_BYTES * std::min<size_t>(8, rows);
    const size_t width = std::max(wide, bytes / (2 * m.panel_bytes) / wide * wide);
    for (size_t row = 0; row < rows; row += work.input->block())
      for (size_t pair = 0; pair < pairs; pair += width) tasks.push_back({&work, row, {pair, std::min(width, pairs - pair)}});
  }
  return tasks;
}

// silu(gate) ⊙ up of a task's rows and pairs, as many at once as the kernels take.
void run_gate_up(const Device& d, const Task& task) {
  alignas(64) float buffer[BUFFER];
  Work& work = *task.work;
  const Matrix& m = work.unit->part.gate_up;
  const size_t width = work.width(), rows = std::min(work.input->block(), work.rows() - task.row);
  const size_t wide = work.input->panels(), stride = wide * PANEL_ROWS, end = task.pairs.first + task.pairs.count;
  for (size_t pair = task.pairs.first; pair < end; pair += wide / 2) {
    const size_t count = std::min(wide / 2, end - pair);
    work.input->multiply(d.kernels, m, {2 * pair, 2 * count}, task.row, rows, {buffer, stride});
    d.kernels.swiglu(buffer, stride, rows, count, {work.hidden.get() + task.row * width + pair * PANEL_ROWS, width});
  }
}

void prefetch(const uint8_t* data) {
  for (size_t at = 0; at < AHEAD_BYTES; at += 64) __builtin_prefetch(data + at);
}

// One stripe of y: the panels of every unit's product, weighted, added in the order of the units.
void run_down(const Device& d, const std::vector<Work>& works, Panels panels, float* y, size_t stride) {
  alignas(64) float buffer[BUFFER];
  for (const Work& work : works) {
    const Unit& unit = *work.unit;
    const size_t block = work.inner->block(), wide = work.inner->panels(), width = wide * PANEL_ROWS;
    if (&work != &works.back()) prefetch((&work + 1)->unit->part.down.panel(panels.first));
    for (size_t row = 0; row < unit.tokens.size(); row += block) {
      const size_t rows = std::min(block, unit.tokens.size() - row);
      for (size_t panel = panels.first; panel < panels.first + panels.count; panel += wide) {
        const size_t count = std::min(wide, panels.first + panels.count - panel);
        work.inner->multiply(d.kernels, unit.part.down, {panel, count}, row, rows, {buffer, width});
        for (size_t i = 0; i < rows; ++i)
          d.kernels.accumulate(y + unit.tokens[row + i] * stride + panel * PANEL_ROWS, buffer + i * width,
                               unit.weights[row + i], count * PANEL_ROWS);
      }
    }
  }
}

// Panels of a stripe: few for a decode step, whose threads share the weights (fewer would read too little of each expert
// in a row), more where they share rows.
size_t stripe_panels(const std::vector<Work>& works) {
  size_t rows = 0;
  for (const Work& work : works) rows = std::max(rows, work.rows());
  return rows > 16 ? MOST_PANELS : FEW_PANELS;
}

// Adds all units' second products into y, which has a column for every row of the panels.
void add_down(const Device& d, const std::vector<Work>& works, const Tokens& tokens) {
  const size_t panels = (tokens.hidden + PANEL_ROWS - 1) / PANEL_ROWS, stride = panels * PANEL_ROWS;
  const bool direct = stride == tokens.hidden;
  std::vector<float> filled(direct ? 0 : tokens.count * stride);
  float* y = direct ? tokens.y : filled.data();
  const size_t width = stripe_panels(works);
  parallel_for(d.parallel, (panels + width - 1) / width, [&](size_t stripe) {
    const size_t first = stripe * width, count = std::min(width, panels - first);
    for (size_t t = 0; t < tokens.count; ++t) std::fill_n(y + t * stride + first * PANEL_ROWS, count * PANEL_ROWS, 0.0f);
    run_down(d, works, {first, count}, y, stride);
  });
  if (direct) return;
  for (size_t t = 0; t < tokens.count; ++t) std::copy_n(y + t * stride, tokens.hidden, tokens.y + t * tokens.hidden);
}

}  // namespace

void run_feed_forward(const Device& d, const std::vector<Unit>& units, const Tokens& tokens) {
  std::vector<Work> works(units.size());
  for (size_t i = 0; i < units.size(); ++i) works[i].unit = &units[i];
  std::shared_ptr<Rows> single;
  if (tokens.count == 1) {
    single = std::make_shared<Rows>(tokens.x, tokens.hidden, Shape{1, int64_t(tokens.hidden)});
    single->fill();
    // by what any part wants, as with more tokens each is prepared by itself
    const auto wants = [&](const Unit& unit) { return rounds(d.kernels, unit.part.gate_up); };
    const auto first = std::find_if(units.begin(), units.end(), wants);
    if (first != units.end()) prepare(d, first->part.gate_up, *single);
  }
  parallel_for(d.parallel, works.size(), [&](size_t i) {
    works[i].input = single;
    if (!single) {
      gather(tokens, works[i]);
      prepare(d, units[i].part.gate_up, *works[i].input);
    }
    works[i].hidden.reset(new float[works[i].rows() * works[i].width()]);
  });
  const std::vector<Task> tasks = cut(works);
  parallel_for(d.parallel, tasks.size(), [&](size_t i) { run_gate_up(d, tasks[i]); });
  parallel_for(d.parallel, works.size(), [&](size_t i) {
    const Matrix& down = units[i].part.down;
    const Shape shape{int64_t(works[i].rows()), int64_t(down.columns)};
    works[i].inner = std::make_unique<Rows>(works[i].hidden.get(), works[i].width(), shape);
    prepare(d, down, *works[i].inner);
  });
  add_down(d, works, tokens);
}

}  // namespace vl2

// vl2::Linear: y = x · Wᵀ + bias with weights of few bits. plugins/native/README.md has inputs and attributes.
#include <algorithm>

#include "native/matrix.h"

namespace vl2 {
namespace {

// Weights that one task of a decode step reads; tasks of a larger product are cut by rows and panels.
constexpr size_t DECODE_TASK_BYTES = 96 << 10;
constexpr size_t TASK_PANELS = 16;
constexpr size_t FEWEST_TASKS = 64;
// Rows at once, at most: bounds the memory of their other form, 6 bytes a number.
constexpr size_t ROWS_AT_ONCE = 1536;

// Panels of a task: a multiple of what the kernels take at once.
size_t panels_a_task(const Matrix& m, const Rows& input) {
  const size_t rows = input.rows(), blocks = (rows + input.block() - 1) / input.block(), wide = input.panels();
  const size_t most = rows <= FEW_ROWS ? DECODE_TASK_BYTES / m.panel_bytes : std::min(TASK_PANELS, m.panels * blocks / FEWEST_TASKS);
  return std::max(wide, most / wide * wide);
}

class Linear {
 public:
  static Signature signature() {
    return {"Linear",
            {{"x", Type::float32}, {"weight", Type::uint8}, {"bias", Type::float32, true}},
            {{"y", Type::float32}}};
  }

  explicit Linear(const Attributes& attributes)
      : kernels_(kernels_for(choose_isa())),
        matrix_(matrix_from(attributes, {"scheme", "group_size", "scale_dtype"},
                            {attributes.integer("N"), attributes.integer("K")})),
        fast_(is_fast(attributes)) {}

  void compute(Call& call) const {
    const Tensor x = call.input(0), bias = call.input(2);
    require(!x.shape.empty() && size_t(x.shape.back()) == matrix_.columns,
            "`x` has the shape " + x.describe() + ", expected [..., " + std::to_string(matrix_.columns) + "]");
    require(!bias || (bias.shape.size() == 1 && size_t(bias.shape[0]) == matrix_.rows),
            "`bias` has the shape " + bias.describe() + ", expected [" + std::to_string(matrix_.rows) + "]");
    const Matrix m = with_data(matrix_, call.input(1), "weight");
    std::vector<int64_t> shape = x.shape;
    shape.back() = int64_t(m.rows);
    const Tensor y = call.output(0, shape);
    const size_t rows = x.count() / m.columns;
    const Parallel parallel = call.parallel();
    // parts of about one size: none is so small that it would be computed in another way
    const size_t parts = (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
    for (size_t part = 0; part < parts; ++part) {
      const size_t first = rows * part / parts, count = rows * (part + 1) / parts - first;
      product(m, {x.as<const float>() + first * m.columns, bias.as<const float>(), y.as<float>() + first * m.rows, count},
              parallel);
    }
  }

 private:
  struct Job {
    const float *x, *bias;
    float* y;
    size_t rows;
  };

  void product(const Matrix& m, const Job& job, const Parallel& parallel) const {
    Rows input(job.x, m.columns, {int64_t(job.rows), int64_t(m.columns)});
    input.prepare(kernels_, m, fast_, parallel);
    const size_t width = panels_a_task(m, input), stripes = (m.panels + width - 1) / width, height = input.block();
    parallel_for(parallel, stripes * ((job.rows + height - 1) / height), [&](size_t task) {
      const size_t first = task % stripes * width, row = task / stripes * height, count = std::min(height, job.rows - row);
      const Panels panels{first, std::min(width, m.panels - first)};
      block(m, input, panels, row, count, job.y);
      if (job.bias) add_bias(job.bias, panels, row, count, job.y);
    });
  }

  // Rows row … row + count of the panels; the columns of a last panel that is not full come through a buffer.
  void block(const Matrix& m, const Rows& input, Panels panels, size_t row, size_t count, float* y) const {
    const bool partial = (panels.first + panels.count) * PANEL_ROWS > m.rows;
    const Panels full{panels.first, panels.count - partial};
    float* place = y + row * m.rows;
    input.multiply(kernels_, m, full, row, count, {place + full.first * PANEL_ROWS, m.rows});
    if (!partial) return;
    float last[std::max(ROW_BLOCK, TILE_BLOCK) * PANEL_ROWS];
    input.multiply(kernels_, m, {m.panels - 1, 1}, row, count, {last, PANEL_ROWS});
    const size_t begin = (m.panels - 1) * PANEL_ROWS;
    for (size_t i = 0; i < count; ++i)
      std::copy_n(last + i * PANEL_ROWS, m.rows - begin, place + i * m.rows + begin);
  }

  void add_bias(const float* bias, Panels panels, size_t row, size_t count, float* y) const {
    const size_t begin = panels.first * PANEL_ROWS;
    const size_t end = std::min(matrix_.rows, (panels.first + panels.count) * PANEL_ROWS);
    for (size_t i = row; i < row + count; ++i)
      for (size_t n = begin; n < end; ++n) y[i * matrix_.rows + n] += bias[n];
  }

  const Kernels& kernels_;
  Matrix matrix_;
  bool fast_;
};

const Registration<Linear> linear_registration;

}  // namespace
}  // namespace vl2

#include "native/matrix.h"

#include <algorithm>
#include <cstring>

namespace vl2 {
namespace {

constexpr int64_t LARGEST_SIDE = 1 << 24;
constexpr size_t ALIGNMENT = 64;
constexpr size_t ROWS_A_TASK = 16;
// Fewer rows are left to vectors, which have no tile to fill and no weights to expand: measured with 1,792 × 1,152 weights.
size_t fewest_tiled(const Matrix& m, bool fast) {
  constexpr size_t OTHERWISE = FEW_ROWS + 1, ROUNDED = 32, TWO_TERMS = 64;
  if (m.scheme == Scheme::fp16 && !fast) return TWO_TERMS;
  return fast && m.scheme != Scheme::fp16 && m.scheme != Scheme::bf16 ? ROUNDED : OTHERWISE;
}

size_t up_to(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// In the order of Scheme.
constexpr const char* SCHEMES[] = {"int4", "int8", "fp16", "bf16"};

Scheme scheme_named(const std::string& name, const char* attribute) {
  for (int i = 0; i < 4; ++i)
    if (name == SCHEMES[i]) return Scheme(i);
  throw OpError(std::string("`") + attribute + "` is \"" + name + "\", expected int4, int8, fp16 or bf16");
}

// Checks and sets groups and group_columns.
void set_groups(Matrix& m, int64_t group_size, const char* name) {
  m.groups = 1, m.group_columns = m.padded_columns;
  if (group_size == 0 || m.scheme == Scheme::fp16 || m.scheme == Scheme::bf16) return;
  require(group_size > 0 && group_size % 8 == 0 && m.columns % size_t(group_size) == 0,
          std::string("`") + name + "` is " + std::to_string(group_size) + ", expected 0 or a multiple of 8 that divides " +
              std::to_string(m.columns) + " columns");
  m.group_columns = size_t(group_size);
  m.groups = m.columns / m.group_columns;
}

}  // namespace

Matrix matrix_from(const Attributes& attributes, MatrixNames names, Shape shape, const Matrix* fallback) {
  for (int64_t side : {shape.rows, shape.columns})
    require(side > 0 && side <= LARGEST_SIDE, "a matrix has a side of " + std::to_string(side) + ", expected 1 to " +
                                                  std::to_string(LARGEST_SIDE));
  Matrix m{};
  m.scheme = scheme_named(fallback ? attributes.text(names.scheme, SCHEMES[int(fallback->scheme)])
                                   : attributes.text(names.scheme), names.scheme);
  m.rows = size_t(shape.rows), m.columns = size_t(shape.columns);
  m.padded_columns = up_to(m.columns, CHUNK);
  m.panels = up_to(m.rows, PANEL_ROWS) / PANEL_ROWS;
  const std::string scales = attributes.text(names.scale_dtype, fallback && fallback->wide_scales ? "float32" : "float16");
  require(scales == "float16" || scales == "float32",
          std::string("`") + names.scale_dtype + "` is \"" + scales + "\", expected float16 or float32");
  m.wide_scales = scales == "float32";
  const int64_t size = fallback && fallback->groups > 1 ? int64_t(fallback->group_columns) : 0;
  set_groups(m, attributes.integer(names.group_size, size), names.group_size);
  const size_t bits = m.scheme == Scheme::int4 ? 4 : m.scheme == Scheme::int8 ? 8 : 16;
  if (bits < 16) m.scale_bytes = up_to(m.groups * PANEL_ROWS * (m.wide_scales ? 4 : 2), ALIGNMENT);
  m.panel_bytes = m.scale_bytes + m.padded_columns * PANEL_ROWS * bits / 8;
  return m;
}

Matrix with_data(const Matrix& m, const Tensor& tensor, const char* name, size_t count) {
  const size_t expected = size_bytes(m) * count;
  require(tensor.type == Type::uint8 && tensor.count() == expected,
          std::string("`") + name + "` has the shape " + tensor.describe() + ", expected " + std::to_string(expected) +
              " bytes: " + std::to_string(count) + " × [" + std::to_string(m.rows) + ", " + std::to_string(m.columns) + "]");
  Matrix held = m;
  held.data = tensor.as<const uint8_t>();
  return held;
}

bool is_fast(const Attributes& attributes) {
  const std::string mode = attributes.text("mode", "exact");
  require(mode == "exact" || mode == "fast", "`mode` is \"" + mode + "\", expected exact or fast");
  return mode == "fast";
}

Rows::Rows(const float* x, size_t stride, Shape shape)
    : rows_(size_t(shape.rows)), columns_(size_t(shape.columns)), padded_(up_to(columns_, CHUNK)), source_stride_(stride),
      stride_(stride), source_(x), x_(x) {}

void Rows::prepare(const Kernels& kernels, const Matrix& m, bool fast, const Parallel& parallel) {
  if (rows_ >= fewest_tiled(m, fast) && tiles(kernels, m, fast)) return tile(kernels, fast ? 1 : 3, parallel);
  const bool rounds_here = rounds(kernels, m);
  if (rounds_here && fast) return round(kernels, parallel);
  fill();
  if (rounds_here && rows_ <= FEW_ROWS) split(kernels);
}

void Rows::fill() {
  if (padded_ == columns_ || filled_) return;
  stride_ = padded_;
  filled_.reset(new float[rows_ * padded_]);
  for (size_t row = 0; row < rows_; ++row) {
    float* to = std::copy_n(source_ + row * source_stride_, columns_, filled_.get() + row * padded_);
    std::fill(to, filled_.get() + (row + 1) * padded_, 0.0f);
  }
  x_ = filled_.get();
}

void Rows::allocate(size_t rows) {
  const size_t chunks = padded_ / CHUNK;
  codes_.reset(new int8_t[rows * padded_]);
  scales_.reset(new float[rows * chunks]);
  offsets_.reset(new int32_t[2 * rows * chunks]);
  activations_ = {codes_.get(), scales_.get(), offsets_.get(), offsets_.get() + rows * chunks, padded_, chunks};
}

void Rows::split(const Kernels& kernels) {
  allocate(SPLIT_ROWS * rows_);
  for (size_t row = 0; row < rows_; ++row) kernels.split(source_ + row * source_stride_, columns_, activations_, row);
  split_ = true;
}

void Rows::round(const Kernels& kernels, const Parallel& parallel) {
  allocate(rows_);
  parallel_for(parallel, (rows_ + ROWS_A_TASK - 1) / ROWS_A_TASK, [&](size_t task) {
    const size_t end = std::min(rows_, (task + 1) * ROWS_A_TASK);
    for (size_t row = task * ROWS_A_TASK; row < end; ++row)
      kernels.quantize(source_ + row * source_stride_, columns_, activations_, row);
  });
  rounded_ = true;
}

void Rows::tile(const Kernels& kernels, int terms, const Parallel& parallel) {
  const size_t tile_rows = 16, count = (rows_ + tile_rows - 1) / tile_rows, numbers = padded_ * tile_rows * size_t(terms);
  const size_t room = ALIGNMENT / sizeof(uint16_t);
  terms_.reset(new uint16_t[count * numbers + room]);
  const size_t beyond = reinterpret_cast<uintptr_t>(terms_.get()) % ALIGNMENT;
  uint16_t* data = terms_.get() + (beyond ? (ALIGNMENT - beyond) / sizeof(uint16_t) : 0);
  parallel_for(parallel, count, [&](size_t task) {
    const size_t row = task * tile_rows;
    kernels.tiles->pack(source_ + row * source_stride_, source_stride_, std::min(tile_rows, rows_ - row), columns_, terms,
                        data + task * numbers);
  });
  tiles_ = {data, padded_ / CHUNK, terms};
}

void Rows::multiply(const Kernels& kernels, const Matrix& m, Panels panels, size_t first, size_t count, Output out) const {
  if (tiles_.data) kernels.tiles->multiply(m, panels, tiles_, first, count, out);
  else if (rounded_ && rounds(kernels, m)) kernels.fast(m, panels, activations_, first, count, out);
  else if (split_ && rounds(kernels, m)) kernels.split_rows(m, panels, activations_, first, count, out);
  else kernels.exact(m, panels, x_ + first * stride_, stride_, count, out);
}

}  // namespace vl2

// A matrix from a node's attributes, and its product with rows of activations as tasks.
#pragma once
#include <memory>
#include <string>

#include "native/kernels.h"
#include "native/op.h"

namespace vl2 {

// Attributes of one matrix by their names in the node.
struct MatrixNames {
  const char *scheme, *group_size, *scale_dtype;
};
struct Shape {
  int64_t rows, columns;
};

// The layout of layout.py; `data` is null. fallback: a matrix that is taken after where attributes are missing. Throws
// OpError on what a matrix cannot be.
Matrix matrix_from(const Attributes& attributes, MatrixNames names, Shape shape, const Matrix* fallback = nullptr);

inline size_t size_bytes(const Matrix& m) { return m.panels * m.panel_bytes; }

// Throws OpError unless the tensor holds `count` such matrices; gives the first.
Matrix with_data(const Matrix& m, const Tensor& tensor, const char* name, size_t count = 1);

// Whether `mode` is fast (true) or exact (false); anything else throws OpError.
bool is_fast(const Attributes& attributes);

// Whether these kernels multiply this matrix with rounded activations.
inline bool rounds(const Kernels& kernels, const Matrix& m) {
  return (kernels.fast_schemes >> int(m.scheme) & 1) != 0 && (m.groups == 1 || m.group_columns % CHUNK == 0);
}

// Whether these kernels multiply many rows with this matrix in tiles.
inline bool tiles(const Kernels& kernels, const Matrix& m, bool fast) {
  const bool floats = m.scheme == Scheme::fp16 || m.scheme == Scheme::bf16;
  return kernels.tiles != nullptr && (fast || floats || m.groups == 1 || m.group_columns % CHUNK == 0);
}

// Rows of activations in the form that kernels take for a matrix: floats with zeros behind their end, rounded ones, ones that
// are sums of rounded ones, or tiles.
class Rows {
 public:
  // x: [rows, columns] float32, a row every `stride`; kept by reference where its columns need no filling.
  Rows(const float* x, size_t stride, Shape shape);
  // To be called before `multiply` with this matrix, or one that `rounds` and has as many columns. fast: rounded activations
  // where the kernels take them.
  void prepare(const Kernels& kernels, const Matrix& m, bool fast, const Parallel& parallel);
  // Makes floats, whatever form else: rows for several matrices of which not all are what they were prepared for.
  void fill();
  // out = rows first … first + count times panels of the matrix, at most block() rows; `first` is a multiple of it.
  void multiply(const Kernels& kernels, const Matrix& m, Panels panels, size_t first, size_t count, Output out) const;

  size_t rows() const { return rows_; }
  // Rows that one call of `multiply` should get, and panels.
  size_t block() const { return tiles_.data ? TILE_BLOCK : ROW_BLOCK; }
  size_t panels() const { return tiles_.data ? TILE_PANELS_WIDE : WIDE_PANELS; }

 private:
  void allocate(size_t rows);
  void round(const Kernels& kernels, const Parallel& parallel);
  // At most FEW_ROWS rows: exact, and a third of the work of floats, so that a decode step is bound by memory.
  void split(const Kernels& kernels);
  void tile(const Kernels& kernels, int terms, const Parallel& parallel);

  size_t rows_, columns_, padded_, source_stride_, stride_;
  const float* source_;
  const float* x_;
  // arrays, as vectors would write zeros first
  std::unique_ptr<float[]> filled_, scales_;
  std::unique_ptr<int8_t[]> codes_;
  std::unique_ptr<int32_t[]> offsets_;
  std::unique_ptr<uint16_t[]> terms_;
  bool rounded_ = false, split_ = false;
  Activations activations_{};
  TileRows tiles_{};
};

}  // namespace vl2

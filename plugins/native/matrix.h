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

// Rows of activations as kernels take them: floats with zeros behind their end, and rounded ones where they are wanted.
class Rows {
 public:
  // x: [rows, columns] float32, a row every `stride`; kept by reference where its columns need no filling. floats: whether
  // `multiply` will need more than the rounded ones.
  Rows(const float* x, size_t stride, Shape shape, bool floats);
  // Rounds all rows; to be called before `multiply` with a matrix that `rounds`.
  void round(const Kernels& kernels, const Parallel& parallel);
  // Splits at most FEW_ROWS rows, which `multiply` takes in place of the floats for a matrix that `rounds`: exact, and a
  // third of the work, so that a decode step is bound by memory.
  void split(const Kernels& kernels);
  // out = rows first … first + count times panels of the matrix, at most ROW_BLOCK rows.
  void multiply(const Kernels& kernels, const Matrix& m, Panels panels, size_t first, size_t count, Output out) const;

  size_t rows() const { return rows_; }

 private:
  void allocate(size_t rows);

  size_t rows_, columns_, padded_, source_stride_, stride_;
  const float* source_;
  const float* x_;
  // arrays, as vectors would write zeros first
  std::unique_ptr<float[]> filled_, scales_;
  std::unique_ptr<int8_t[]> codes_;
  std::unique_ptr<int32_t[]> offsets_;
  bool rounded_ = false, split_ = false;
  Activations activations_{};
};

}  // namespace vl2

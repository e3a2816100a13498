// A matrix from a node's attributes, and its product with rows of activations as tasks.
#pragma once
#include <string>
#include <vector>

#include "native/kernels.h"
#include "native/op.h"

namespace vl2 {

// Attributes of one matrix by their names in the node; fallback: a matrix whose scheme and group size are the default.
struct MatrixNames {
  const char *scheme, *group_size, *scale_dtype;
};
struct Shape {
  int64_t rows, columns;
};

// The layout of layout.py; `data` is null. Throws OpError on what it cannot be.
Matrix matrix_from(const Attributes& attributes, MatrixNames names, Shape shape, const MatrixNames* fallback = nullptr);

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
  // x: [rows, columns] float32 without gaps; kept by reference where its columns need no filling.
  Rows(const float* x, size_t rows, size_t columns, bool floats);
  // Rounds all rows; to be called before `multiply` with a matrix that `rounds`.
  void round(const Kernels& kernels, const Parallel& parallel);
  // out = rows first … first + count times panels of the matrix, at most ROW_BLOCK rows.
  void multiply(const Kernels& kernels, const Matrix& m, Panels panels, size_t first, size_t count, Output out) const;

  size_t rows() const { return rows_; }

 private:
  size_t rows_, columns_, stride_;
  const float* source_;
  const float* x_;
  std::vector<float> filled_;
  bool rounded_ = false;
  std::vector<int8_t> codes_;
  std::vector<float> scales_;
  std::vector<int32_t> offsets_;
  Activations activations_{};
};

}  // namespace vl2

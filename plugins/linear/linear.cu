// y = W x for few rows of activations: attention's and dense projections, the head.
#include "gemv.cuh"

// x [tokens, columns] → y [tokens, rows]; a block walks over tiles of 32 rows, its token's x staged once.
template <int BITS>
DEVICE void linear(const unsigned char* codes, const half_t* scales, const half_t* x, half_t* y, int rows, int columns, int shift) {
  SHARED(memory);
  const Matrix m = {codes, scales, columns, shift};
  const long long token = blockIdx.y;
  const int group = threadIdx.x / GEMV_LANES;
  bool staged = false;
  for (int tile = blockIdx.x; tile * 2 * GEMV_GROUPS < rows; tile += gridDim.x) {
    const int first = tile * 2 * GEMV_GROUPS + group, second = first + GEMV_GROUPS;
    const Row both[2] = {row_of<BITS>(m, first < rows ? first : rows - 1), row_of<BITS>(m, second < rows ? second : rows - 1)};
    float sums[2];
    dot_rows<BITS>(both, m, x + token * columns, 0, columns, reinterpret_cast<float*>(memory), staged, sums);
    staged = columns <= GEMV_TILE;
    if (threadIdx.x % GEMV_LANES) continue;
    if (first < rows) y[token * rows + first] = to_half(sums[0]);
    if (second < rows) y[token * rows + second] = to_half(sums[1]);
  }
}

#define LINEAR(bits, name)                                                                                                    \
  KERNEL(128, 4) name(const unsigned char* __restrict__ codes, const half_t* __restrict__ scales, const half_t* __restrict__ x,  \
                   half_t* __restrict__ y, int rows, int columns, int shift) {                                                \
    linear<bits>(codes, scales, x, y, rows, columns, shift);                                                                  \
  }                                                                                                                           \
  EXPORT(name)
LINEAR(4, vl2_linear_int4)
LINEAR(8, vl2_linear_int8)
LINEAR(16, vl2_linear_fp16)

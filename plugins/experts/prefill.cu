// Products of many tokens, with the experts' stacks or one matrix: blockIdx.x is the tile of weight rows, blockIdx.y the
// expert, and blockIdx.z, with its grid's size as stride, the tile of its tokens.
#include "gemm.cuh"

// Where an expert's tokens lie in the sorted order; without offsets everything is one expert's.
DEVICE Tokens tokens_of(const half_t* x, const int* source, const int* offsets, int tokens, int columns, int* start) {
  const int first = offsets ? offsets[blockIdx.y] : 0, end = offsets ? offsets[blockIdx.y + 1] : tokens;
  *start = first;
  return {source ? x : x + static_cast<long long>(first) * columns, source ? source + first : nullptr, end - first, columns};
}
DEVICE Tokens from_tile(const Tokens& all, int tile) {
  const int skipped = tile * TILE;
  return {all.source ? all.x : all.x + static_cast<long long>(skipped) * all.columns,
          all.source ? all.source + skipped : nullptr, all.count - skipped, all.columns};
}

// y[target or token · stride + offset] = W x[source], rows of `rows` halves.
template <int BITS>
DEVICE void product(const Matrix (&m)[1], const Tokens& all, int start, const int* target, half_t* y, int rows, int stride,
                    int offset) {
  SHARED(memory);
  const int row = blockIdx.x * TILE;
  const long long place = static_cast<long long>(blockIdx.y) * rows;
  for (int tile = blockIdx.z; tile * TILE < all.count; tile += gridDim.z) {
    const Tokens tokens = from_tile(all, tile);
    float sums[1][2][4][4];
    multiply_tile<BITS, 1>(memory, tokens, m, place, row, rows, sums);
    for_each_pair([&](int token, int n, int i, int j, int v) {
      if (token >= tokens.count) return;
      const int place_in_order = start + tile * TILE + token;
      const long long to = target ? target[place_in_order] : static_cast<long long>(place_in_order) * stride + offset;
      store_pair(y + to * rows, row + n, rows, sums[0][i][j][v], sums[0][i][j][v + 1]);
    });
  }
}

#define PRODUCT(bits, name)                                                                                                   \
  KERNEL(128, 3) name(const unsigned char* __restrict__ codes, const half_t* __restrict__ scales, const half_t* __restrict__ x,  \
                   const int* __restrict__ source, const int* __restrict__ target, const int* __restrict__ offsets,           \
                   half_t* __restrict__ y, int tokens, int rows, int columns, int shift, int stride, int offset) {            \
    const Matrix m[1] = {{codes, scales, columns, shift}};                                                                    \
    int start;                                                                                                                \
    const Tokens all = tokens_of(x, source, offsets, tokens, columns, &start);                                                \
    product<bits>(m, all, start, target, y, rows, stride, offset);                                                            \
  }                                                                                                                           \
  EXPORT(name)
PRODUCT(4, vl2_product_int4)
PRODUCT(8, vl2_product_int8)
PRODUCT(16, vl2_product_fp16)

// hidden[place in order] = silu(gate x) ⊙ (up x), rows of `rows` halves.
template <int BITS>
DEVICE void gated_product(const Matrix (&m)[2], const Tokens& all, int start, half_t* hidden, int rows) {
  SHARED(memory);
  const int row = blockIdx.x * TILE;
  const long long place = static_cast<long long>(blockIdx.y) * rows;
  for (int tile = blockIdx.z; tile * TILE < all.count; tile += gridDim.z) {
    const Tokens tokens = from_tile(all, tile);
    float sums[2][2][4][4];
    multiply_tile<BITS, 2>(memory, tokens, m, place, row, rows, sums);
    for_each_pair([&](int token, int n, int i, int j, int v) {
      if (token >= tokens.count) return;
      half_t* to = hidden + static_cast<long long>(start + tile * TILE + token) * rows;
      store_pair(to, row + n, rows, silu(sums[0][i][j][v]) * sums[1][i][j][v],
                 silu(sums[0][i][j][v + 1]) * sums[1][i][j][v + 1]);
    });
  }
}

#define GATED_PRODUCT(bits, name)                                                                                             \
  KERNEL(128, 2) name(const unsigned char* __restrict__ gate, const half_t* __restrict__ gate_scales,                            \
                   const unsigned char* __restrict__ up, const half_t* __restrict__ up_scales, const half_t* __restrict__ x,  \
                   const int* __restrict__ source, const int* __restrict__ offsets, half_t* __restrict__ hidden, int tokens,  \
                   int rows, int columns, int shift) {                                                                        \
    const Matrix m[2] = {{gate, gate_scales, columns, shift}, {up, up_scales, columns, shift}};                               \
    int start;                                                                                                                \
    const Tokens all = tokens_of(x, source, offsets, tokens, columns, &start);                                                \
    gated_product<bits>(m, all, start, hidden, rows);                                                                         \
  }                                                                                                                           \
  EXPORT(name)
GATED_PRODUCT(4, vl2_gated_product_int4)
GATED_PRODUCT(8, vl2_gated_product_int8)
GATED_PRODUCT(16, vl2_gated_product_fp16)

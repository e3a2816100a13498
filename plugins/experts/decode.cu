// The experts of a few tokens: every chosen expert's matrices pass by once. Choices and the shared experts are the slots
// of one grid, their sum is made in the end by vl2_combine in a fixed order.
#include "gemv.cuh"

// hidden[token, slot] = silu(gate x) ⊙ (up x), [tokens, top_k · inner + shared_inner]; blockIdx.x + first_block counts
// tiles of 16 rows, first of the choices, then of the shared experts.
template <int BITS>
DEVICE void gate_up(const unsigned char* gate, const half_t* gate_scales, const unsigned char* up, const half_t* up_scales,
                    bool shared_experts, int block, const half_t* x, const int* idx, float* hidden, int columns, int inner,
                    int width, int top_k, int shift) {
  SHARED(memory);
  const Matrix gates = {gate, gate_scales, columns, shift}, ups = {up, up_scales, columns, shift};
  const long long token = blockIdx.y;
  const int tiles = (inner + GEMV_GROUPS - 1) / GEMV_GROUPS, slot = shared_experts ? 0 : block / tiles;
  const int row = (block - slot * tiles) * GEMV_GROUPS + threadIdx.x / GEMV_LANES, clamped = row < inner ? row : inner - 1;
  const long long expert = shared_experts ? 0 : idx[token * top_k + slot], place = expert * inner + clamped;
  const Row both[2] = {row_of<BITS>(gates, place), row_of<BITS>(ups, place)};
  float sums[2];
  dot_rows<BITS>(both, gates, x + token * columns, 0, columns, reinterpret_cast<float*>(memory), false, sums);
  if (threadIdx.x % GEMV_LANES == 0 && row < inner) hidden[token * width + slot * inner + row] = silu(sums[0]) * sums[1];
}

#define GATE_UP(bits, name)                                                                                                   \
  KERNEL(128, 4) name(const unsigned char* __restrict__ gate, const half_t* __restrict__ gate_scales,                            \
                   const unsigned char* __restrict__ up, const half_t* __restrict__ up_scales,                                \
                   const unsigned char* __restrict__ shared_gate, const half_t* __restrict__ shared_gate_scales,              \
                   const unsigned char* __restrict__ shared_up, const half_t* __restrict__ shared_up_scales,                  \
                   const half_t* __restrict__ x, const int* __restrict__ idx, float* __restrict__ hidden, int columns,        \
                   int inner, int shared_inner, int top_k, int shift, int shared_shift, int first_block) {                    \
    const int routed = top_k * ((inner + GEMV_GROUPS - 1) / GEMV_GROUPS), block = blockIdx.x + first_block;                   \
    const int width = top_k * inner + shared_inner;                                                                           \
    const bool own = block < routed;                                                                                          \
    gate_up<bits>(own ? gate : shared_gate, own ? gate_scales : shared_gate_scales, own ? up : shared_up,                     \
                  own ? up_scales : shared_up_scales, !own, own ? block : block - routed, x, idx,                             \
                  own ? hidden : hidden + top_k * inner, columns, own ? inner : shared_inner, width, top_k,                   \
                  own ? shift : shared_shift);                                                                                \
  }                                                                                                                           \
  EXPORT(name)
GATE_UP(4, vl2_gate_up_int4)
GATE_UP(8, vl2_gate_up_int8)
GATE_UP(16, vl2_gate_up_fp16)

// partial[token, slot] = down · hidden[token, slot], [tokens, slots, rows]; blockIdx.y + first_slot is the slot: choices,
// then the shared experts' columns in `parts` equal parts, so that no slot is much longer than another.
template <int BITS>
DEVICE void down_slot(const Matrix& m, long long expert, const float* x, float* partial, int rows, int from, int count) {
  SHARED(memory);
  const int first = blockIdx.x * 2 * GEMV_GROUPS + threadIdx.x / GEMV_LANES, second = first + GEMV_GROUPS;
  const Row both[2] = {row_of<BITS>(m, expert * rows + (first < rows ? first : rows - 1)),
                       row_of<BITS>(m, expert * rows + (second < rows ? second : rows - 1))};
  float sums[2];
  dot_rows<BITS>(both, m, x, from, count, reinterpret_cast<float*>(memory), false, sums);
  if (threadIdx.x % GEMV_LANES) return;
  if (first < rows) partial[first] = sums[0];
  if (second < rows) partial[second] = sums[1];
}

#define DOWN(bits, name)                                                                                                      \
  KERNEL(128, 4) name(const unsigned char* __restrict__ down, const half_t* __restrict__ scales,                                 \
                   const unsigned char* __restrict__ shared_down, const half_t* __restrict__ shared_scales,                   \
                   const float* __restrict__ hidden, const int* __restrict__ idx, float* __restrict__ partial, int rows,      \
                   int inner, int shared_inner, int top_k, int parts, int shift, int shared_shift, int first_slot) {          \
    const long long token = blockIdx.z;                                                                                       \
    const int slot = blockIdx.y + first_slot;                                                                                 \
    const bool own = slot < top_k;                                                                                            \
    const int count = own ? inner : shared_inner / parts, from = own ? 0 : (slot - top_k) * count;                            \
    const Matrix m = {own ? down : shared_down, own ? scales : shared_scales, own ? inner : shared_inner,                     \
                      own ? shift : shared_shift};                                                                            \
    const float* x = hidden + token * (top_k * inner + shared_inner) + (own ? slot * inner : top_k * inner + from);           \
    down_slot<bits>(m, own ? idx[token * top_k + slot] : 0, x, partial + (token * (top_k + parts) + slot) * rows, rows, from, \
                    count);                                                                                                   \
  }                                                                                                                           \
  EXPORT(name)
DOWN(4, vl2_down_int4)
DOWN(8, vl2_down_int8)
DOWN(16, vl2_down_fp16)

// y[token] = Σ weights[token, j] · partial[token, j] + the shared experts' partials; blockIdx.y is the token.
template <class T>
DEVICE void combine(const T* partial, const float* weights, half_t* y, int columns, int top_k, int parts) {
  const long long token = blockIdx.y;
  const int column = blockIdx.x * 256 + threadIdx.x;
  if (column >= columns) return;
  partial += token * (top_k + parts) * columns + column;
  float sum = 0.0f;
  for (int j = 0; j < top_k + parts; j++) {
    const float value = as_float(partial[static_cast<long long>(j) * columns]);
    sum = fmaf(j < top_k ? weights[token * top_k + j] : 1.0f, value, sum);
  }
  y[token * columns + column] = to_half(sum);
}

KERNEL(256) vl2_combine_float(const float* __restrict__ partial, const float* __restrict__ weights, half_t* __restrict__ y,
                              int columns, int top_k, int parts) {
  combine(partial, weights, y, columns, top_k, parts);
}
EXPORT(vl2_combine_float)
KERNEL(256) vl2_combine_half(const half_t* __restrict__ partial, const float* __restrict__ weights, half_t* __restrict__ y,
                             int columns, int top_k, int parts) {
  combine(partial, weights, y, columns, top_k, parts);
}
EXPORT(vl2_combine_half)

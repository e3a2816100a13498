// Kernels with the faults that the emulation is there to find, and mended ones beside them.
#include "device.cuh"

// y[i] = x[i ^ 1] through shared memory; without a barrier between writing and reading where `barrier` is 0.
KERNEL(64) swap_neighbours(const float* x, float* y, int barrier) {
  SHARED(memory);
  float* held = reinterpret_cast<float*>(memory);
  held[threadIdx.x] = x[threadIdx.x];
  if (barrier) __syncthreads();
  y[threadIdx.x] = held[threadIdx.x ^ 1];
}
EXPORT(swap_neighbours)

// y = x through cp.async, waited for where `wait` is 1.
KERNEL(32) copy_later(const float* x, float* y, int wait) {
  SHARED(memory);
  float* held = reinterpret_cast<float*>(memory);
  copy_async4(held + threadIdx.x, x + threadIdx.x, 4);
  copy_commit();
  if (wait) copy_wait<0>();
  else copy_wait<1>();
  y[threadIdx.x] = held[threadIdx.x];
  copy_wait<0>();
}
EXPORT(copy_later)

KERNEL(64) half_a_barrier(const float* x, float* y, int threads) {
  if (static_cast<int>(threadIdx.x) < threads) __syncthreads();
  y[threadIdx.x] = x[threadIdx.x];
}
EXPORT(half_a_barrier)

KERNEL(32) half_a_warp(const float* x, float* y, int lanes) {
  float sum = x[threadIdx.x];
  if (static_cast<int>(threadIdx.x) < lanes) sum = sum_lanes<32>(sum);
  y[threadIdx.x] = sum;
}
EXPORT(half_a_warp)

KERNEL(32) shift(const float* x, float* y, int by) { y[threadIdx.x] = x[threadIdx.x + by]; }
EXPORT(shift)

KERNEL(32) load_wide(const float* x, float* y, int from) { y[threadIdx.x] = bits_to_float(stream16(x + from).x); }
EXPORT(load_wide)

// d[16, 8] = a[16, 16] b[8, 16]ᵀ with the fragments as PTX lists them; row-major halves, d float32.
KERNEL(32) one_mma(const half_t* a, const half_t* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4 * 2;
  half2_t fa[4], fb[2];
  for (int i = 0; i < 4; i++) fa[i] = a[(g + i % 2 * 8) * 16 + t + i / 2 * 8] | static_cast<half2_t>(a[(g + i % 2 * 8) * 16 + t + i / 2 * 8 + 1]) << 16;
  for (int i = 0; i < 2; i++) fb[i] = b[g * 16 + t + i * 8] | static_cast<half2_t>(b[g * 16 + t + i * 8 + 1]) << 16;
  float sums[4] = {0, 0, 0, 0};
  mma(sums, fa, fb);
  for (int i = 0; i < 4; i++) d[(g + i / 2 * 8) * 8 + t + i % 2] = sums[i];
}
EXPORT(one_mma)

KERNEL(32) rounded(const float* x, half_t* y, int count) {
  for (int i = threadIdx.x; i < count; i += 32) y[i] = to_half(x[i]);
}
EXPORT(rounded)

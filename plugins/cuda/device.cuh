// The few device operations that the kernels use, each once as PTX and, in emulation.h, once in C++.
// A half is an unsigned short here and two of them an unsigned int: no CUDA header is needed, so NVRTC compiles this too.
#pragma once

typedef unsigned short half_t;
typedef unsigned int half2_t;
typedef unsigned long long wide_t;

#ifdef __CUDACC__

#define DEVICE static __device__ __forceinline__
extern __shared__ uint4 vl2_shared[];
#define SHARED(name) unsigned char* const name = reinterpret_cast<unsigned char*>(vl2_shared)
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)
#define EXPORT(name)

DEVICE float to_float(half_t h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
DEVICE half_t to_half(float f) { half_t h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f)); return h; }
DEVICE float bits_to_float(unsigned u) { return __uint_as_float(u); }
DEVICE unsigned float_to_bits(float f) { return __float_as_uint(f); }
DEVICE half2_t add2(half2_t a, half2_t b) { half2_t d; asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE half2_t mul2(half2_t a, half2_t b) { half2_t d; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
DEVICE half2_t fma2(half2_t a, half2_t b, half2_t c) {
  half2_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
DEVICE unsigned permute_bytes(unsigned a, unsigned b, unsigned selector) { return __byte_perm(a, b, selector); }

// Weights pass by once: they are kept out of the first-level cache, where the activations live.
DEVICE uint4 stream16(const void* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
DEVICE unsigned stream4(const void* p) {
  unsigned v;
  asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// Copies `valid` bytes to shared memory and zeros the rest of the 16 (or 4).
DEVICE void copy_async16(void* to, const void* from, int valid) {
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(valid) : "memory");
}
DEVICE void copy_async4(void* to, const void* from, int valid) {
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(valid) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

DEVICE float shuffle_xor(float v, int lane_mask) { return __shfl_xor_sync(0xffffffffu, v, lane_mask); }
DEVICE wide_t shuffle_xor(wide_t v, int lane_mask) { return __shfl_xor_sync(0xffffffffu, v, lane_mask); }
DEVICE unsigned warp_ballot(bool v) { return __ballot_sync(0xffffffffu, v); }

// c[16, 8] += a[16, 16] · b[16, 8], fragments as PTX's mma.m16n8k16 has them.
DEVICE void mma(float (&c)[4], const half2_t (&a)[4], const half2_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Four 8 × 8 matrices of halves, transposed; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_transposed(half2_t (&d)[4], const void* row) {
  unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(address) : "memory");
}

#else
#include "emulation.h"
#endif

DEVICE float low_half(half2_t v) { return to_float(static_cast<half_t>(v & 0xffffu)); }
DEVICE float high_half(half2_t v) { return to_float(static_cast<half_t>(v >> 16)); }
DEVICE half2_t pack_halves(float low, float high) { return to_half(low) | static_cast<half2_t>(to_half(high)) << 16; }

// The sum over `lanes` neighbouring lanes (a power of two), in every one of them.
template <int LANES> DEVICE float sum_lanes(float v) {
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  return v;
}
template <int LANES> DEVICE float max_lanes(float v) {
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask /= 2) v = fmaxf(v, shuffle_xor(v, mask));
  return v;
}
DEVICE wide_t max_lanes(wide_t v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    wide_t other = shuffle_xor(v, mask);
    if (other > v) v = other;
  }
  return v;
}
DEVICE float silu(float v) { return v / (1.0f + expf(-v)); }

// CUDA on a CPU, for tests: blocks run one after another, the threads of a block as fibers that stop only where they
// must wait. What a GPU may do late is done as late as possible (cp.async at its wait), shared memory begins as NaN,
// the order of threads and blocks can be turned round: a missing barrier or wait shows as a wrong number.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

struct Dim3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };

namespace emulation {
constexpr int WARP = 32, PAYLOAD = 64;
struct Warp { alignas(16) unsigned char slots[2][WARP][PAYLOAD]; };
extern Dim3 thread, block, block_size, grid_size;
extern unsigned char* shared;

float half_to_float(uint16_t h);
uint16_t float_to_half(double f);  // from double, so that a fused multiply-add rounds once
void block_barrier();
// Leaves `mine` for the lanes of this warp and gives back the slots of all, after all came to the same operation.
unsigned char (*exchange(int operation, const void* mine, int bytes))[PAYLOAD];
[[noreturn]] void fail(const char* what);
void copy_later(void* to, const void* from, int valid, int bytes);
void commit_copies();
void wait_copies(int pending);
int lane();

template <class T> T* aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) fail("misaligned access");
  return static_cast<T*>(const_cast<void*>(p));
}
template <class... A, size_t... I> void unpack(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(arguments[I])...);
}
template <class... A> void call(void (*kernel)(A...), void** arguments) {
  unpack(kernel, arguments, std::index_sequence_for<A...>{});
}
struct Registration { Registration(const char* name, void (*call)(void**)); };
template <class T> T shuffle_xor(T v, int mask) {
  T other;
  std::memcpy(&other, exchange(1, &v, sizeof v)[lane() ^ mask], sizeof v);
  return other;
}
}  // namespace emulation

#define DEVICE static inline
#define SHARED(name) unsigned char* const name = emulation::shared
#define KERNEL(...) extern "C" void
#define EXPORT(name) static emulation::Registration name##_known(#name, [](void** a) { emulation::call(name, a); });
#define __restrict__
#define threadIdx emulation::thread
#define blockIdx emulation::block
#define blockDim emulation::block_size
#define gridDim emulation::grid_size

DEVICE void __syncthreads() { emulation::block_barrier(); }
DEVICE int __popc(unsigned v) { return __builtin_popcount(v); }
DEVICE void __syncwarp() { emulation::exchange(4, nullptr, 0); }
DEVICE float to_float(half_t h) { return emulation::half_to_float(h); }
DEVICE half_t to_half(float f) { return emulation::float_to_half(f); }
DEVICE float bits_to_float(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }
DEVICE unsigned float_to_bits(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }
DEVICE half2_t fma2(half2_t a, half2_t b, half2_t c) {
  half2_t d = 0;
  for (int i = 0; i < 32; i += 16) {
    auto part = [i](half2_t v) { return static_cast<double>(emulation::half_to_float(v >> i & 0xffffu)); };
    d |= static_cast<half2_t>(emulation::float_to_half(part(a) * part(b) + part(c))) << i;
  }
  return d;
}
DEVICE half2_t add2(half2_t a, half2_t b) { return fma2(a, 0x3c003c00u, b); }
DEVICE half2_t mul2(half2_t a, half2_t b) { return fma2(a, b, 0x80008000u); }
DEVICE unsigned permute_bytes(unsigned a, unsigned b, unsigned selector) {
  uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned d = 0;
  for (int i = 0; i < 4; i++) d |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return d;
}
DEVICE uint4 stream16(const void* p) { return *emulation::aligned<uint4>(p); }
DEVICE unsigned stream4(const void* p) { return *emulation::aligned<unsigned>(p); }
DEVICE void copy_async16(void* to, const void* from, int valid) {
  emulation::copy_later(emulation::aligned<uint4>(to), emulation::aligned<uint4>(from), valid, 16);
}
DEVICE void copy_async4(void* to, const void* from, int valid) {
  emulation::copy_later(emulation::aligned<unsigned>(to), emulation::aligned<unsigned>(from), valid, 4);
}
DEVICE void copy_commit() { emulation::commit_copies(); }
template <int PENDING> DEVICE void copy_wait() { emulation::wait_copies(PENDING); }
DEVICE float shuffle_xor(float v, int mask) { return emulation::shuffle_xor(v, mask); }
DEVICE wide_t shuffle_xor(wide_t v, int mask) { return emulation::shuffle_xor(v, mask); }
DEVICE unsigned warp_ballot(bool v) {
  auto slots = emulation::exchange(2, &v, sizeof v);
  unsigned d = 0;
  for (int i = 0; i < emulation::WARP; i++) d |= static_cast<unsigned>(slots[i][0] & 1) << i;
  return d;
}
void mma(float (&c)[4], const half2_t (&a)[4], const half2_t (&b)[2]);
void load_transposed(half2_t (&d)[4], const void* row);

// AMX: eight tile registers of 16 rows by 64 bytes, as assembly: what the compilers' intrinsics lack is that a tile's load
// reads memory, so that stores before it are not moved behind it.
//
// A task that uses tiles begins with `tiles_begin` and ends with `tiles_end`, or holds a `TileSession`: the threads are ONNX
// Runtime's, and nothing may throw between. No instruction set is needed to compile this; `Isa::amx` says whether it may run.
#pragma once
#include <cstddef>
#include <cstdint>

#include "native/target.h"

#if defined(__x86_64__) && VL2_HAS_AMX
namespace vl2 {

constexpr size_t TILE_ROWS_MOST = 16, TILE_ROW_BYTES = 64, TILE_BYTES = TILE_ROWS_MOST * TILE_ROW_BYTES;

// Configures all eight tiles as 16 rows by 64 bytes for this thread; `tiles_end` gives them back.
inline __attribute__((always_inline)) void tiles_begin() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int tile = 0; tile < 8; ++tile) config.row_bytes[tile] = TILE_ROW_BYTES, config.rows[tile] = TILE_ROWS_MOST;
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}
inline __attribute__((always_inline)) void tiles_end() { __asm__ volatile("tilerelease"); }

// The same for a scope.
class TileSession {
 public:
  __attribute__((always_inline)) TileSession() { tiles_begin(); }
  __attribute__((always_inline)) ~TileSession() { tiles_end(); }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

// 16 rows of 64 bytes, a row every `stride` bytes.
template <int TILE>
inline __attribute__((always_inline)) void tile_load(const void* from, size_t stride = TILE_ROW_BYTES) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
inline __attribute__((always_inline)) void tile_store(void* to, size_t stride = TILE_ROW_BYTES) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE>
inline __attribute__((always_inline)) void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(TILE));
}
// SUM [16, 16] float32 += A [16, 32] bfloat16 · B, whose row i holds columns' pairs 2 i, 2 i + 1 of the 32. Subnormal numbers
// count as 0, sums are float32, rounded to nearest.
template <int SUM, int A, int B>
inline __attribute__((always_inline)) void tile_dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}

}  // namespace vl2
#endif

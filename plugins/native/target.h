// Compiles the rest of a source file for an instruction set, so that no file needs compiler flags of its own.
//
// Rules for a file that begins with one of these: include the standard library before it, put everything that follows
// into an anonymous namespace, and call no inline function or template of the standard library after it. Such a function
// would be emitted once for all files, compiled for this instruction set, and crash on processors without it.
#pragma once

#define VL2_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define VL2_TARGET(names) VL2_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define VL2_TARGET_END _Pragma("clang attribute pop")
#else
#define VL2_TARGET(names) VL2_PRAGMA(GCC target(names))
// GCC makes templates at the end of a file, so that the target stays in force until there
#define VL2_TARGET_END
#endif

#define VL2_TARGET_AVX2 VL2_TARGET("avx2,fma,f16c")
#define VL2_TARGET_AVXVNNI VL2_TARGET("avx2,fma,f16c,avxvnni")
#define VL2_TARGET_AVX512 VL2_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#define VL2_TARGET_AVX512VNNI VL2_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define VL2_TARGET_AMX VL2_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16")
// GCC before 13 inlines the intrinsics only where the architecture is named too
#define VL2_TARGET_DOTPROD VL2_TARGET("arch=armv8.2-a+dotprod")

// AVX-VNNI's intrinsics came with GCC 11 and Clang 12.
#if defined(__x86_64__) && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define VL2_HAS_AVXVNNI 1
#else
#define VL2_HAS_AVXVNNI 0
#endif

// AMX is written as assembly (tiles.h): the assemblers that come with GCC 11 and Clang 12 know it.
#define VL2_HAS_AMX VL2_HAS_AVXVNNI

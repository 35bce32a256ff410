// AMX, Intel's matrix unit (Sapphire Rapids and later): its instructions, and which compilers know
// them. Shared by attention and convolution.
//
// A tile is 16 rows of 64 bytes. One instruction adds A B to C: A 16 x 32 bfloat16, row-major;
// B 32 x 16 with two rows in each row of the tile ("paired": a dword has rows 2 j and 2 j + 1 of a
// column); C 16 x 16 float32. The assembler's names are written out because the compilers'
// intrinsics want literals and, in GCC 12, do not say that they touch memory.
#pragma once

#include <cstdint>

#include "isa.h"

// Compilers, and the assemblers that come with them, that know AMX and AVX-512's bfloat16.
#if defined(__x86_64__) && defined(__linux__)
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define ENGINE_AMX 1
#endif
#endif

// Between the two, functions may use AVX-512 with its bfloat16; no library is included there.
#define ENGINE_BF16_FEATURES "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi,bmi2"
#define ENGINE_BF16_STRING(text) #text
#define ENGINE_BF16_PRAGMA(text) _Pragma(ENGINE_BF16_STRING(text))
#ifdef __clang__
#define ENGINE_BF16_TARGET \
  ENGINE_BF16_PRAGMA(      \
      clang attribute push(__attribute__((target(ENGINE_BF16_FEATURES))), apply_to = function))
#define ENGINE_BF16_TARGET_END _Pragma("clang attribute pop")
#else
#define ENGINE_BF16_TARGET \
  _Pragma("GCC push_options") ENGINE_BF16_PRAGMA(GCC target(ENGINE_BF16_FEATURES))
#define ENGINE_BF16_TARGET_END _Pragma("GCC pop_options")
#endif

#ifdef ENGINE_AMX
namespace engine {
namespace amx {

constexpr int64_t kTile = 16, kTileBytes = 1024, kLine = 64;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <int T>
ENGINE_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
ENGINE_INLINE void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
ENGINE_INLINE void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
ENGINE_INLINE void tile_multiply() {  // C += A B
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// What ldtilecfg reads: eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
  TileConfig() {
    for (int t = 0; t < 8; ++t) bytes[t] = kLine, rows[t] = kTile;
  }
  void load() const { asm volatile("ldtilecfg %0" ::"m"(*this)); }
};

ENGINE_INLINE uint32_t words_mask(int64_t n) {  // the first n of 32
  return n >= 32 ? 0xFFFFFFFFu : n <= 0 ? 0 : (1u << n) - 1;
}
ENGINE_INLINE uint16_t lanes_mask(int64_t n) {  // the first n of 16
  return static_cast<uint16_t>(n >= 16 ? 0xFFFF : n <= 0 ? 0 : (1u << n) - 1);
}

}  // namespace amx
}  // namespace engine
#endif

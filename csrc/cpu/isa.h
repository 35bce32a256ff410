// One portable binary, several instruction sets: foreach_isa.h compiles a file of kernels once per
// level, each time in a namespace of its own, and the caller picks the table of the best level.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define ENGINE_X86 1
#endif

#define ENGINE_INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define ENGINE_UNROLL _Pragma("unroll")
#define ENGINE_UNROLL_FOUR _Pragma("unroll 4")
#else
#define ENGINE_UNROLL _Pragma("GCC unroll 16")
#define ENGINE_UNROLL_FOUR _Pragma("GCC unroll 4")
#endif

namespace engine {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

enum Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// The best level of vectors of this machine, at most kAvx512, or the lower one that a test asked
// for (limit_isa_level, ../kernels.h).
int isa_level();

// kAvx512, and this machine has AMX tiles of bfloat16, the system grants them, and no test asked
// for a level below kAmx.
bool amx_allowed();

// kAvx512, and this machine has AVX512_BF16: sums of products of bfloat16 pairs (Cooper Lake, Zen 4
// and later).
bool bf16_dots_allowed();

// parallel_for with a bound on the work per thread: `cost` elements of work per item.
inline int64_t grain_of(int64_t cost) { return cost >= 16384 ? 1 : 16384 / (cost > 0 ? cost : 1); }

}  // namespace engine

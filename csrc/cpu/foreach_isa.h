// Includes ENGINE_KERNELS (a file of kernels) once per instruction set, in namespaces
// engine::avx512, engine::avx2 and engine::baseline. The kernels find ENGINE_LEVEL and simd.h. Not
// guarded: a .cpp file includes this once, after isa.h.
#ifdef ENGINE_X86

#ifdef __clang__
#define ENGINE_TARGET(features) \
  _Pragma(                      \
      ENGINE_STRING(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define ENGINE_TARGET_END _Pragma("clang attribute pop")
#else
#define ENGINE_TARGET(features) \
  _Pragma("GCC push_options") _Pragma(ENGINE_STRING(GCC target(features)))
#define ENGINE_TARGET_END _Pragma("GCC pop_options")
#endif
#define ENGINE_STRING(text) #text

#define ENGINE_LEVEL 2
ENGINE_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")
namespace engine {
namespace avx512 {
#include "simd.h"
#include ENGINE_KERNELS
}  // namespace avx512
}  // namespace engine
ENGINE_TARGET_END
#undef ENGINE_LEVEL

#define ENGINE_LEVEL 1
ENGINE_TARGET("avx2,fma,f16c,bmi,bmi2")
namespace engine {
namespace avx2 {
#include "simd.h"
#include ENGINE_KERNELS
}  // namespace avx2
}  // namespace engine
ENGINE_TARGET_END
#undef ENGINE_LEVEL

#endif  // ENGINE_X86

#define ENGINE_LEVEL 0
namespace engine {
namespace baseline {
#include "simd.h"
#include ENGINE_KERNELS
}  // namespace baseline
}  // namespace engine
#undef ENGINE_LEVEL

#ifdef ENGINE_X86
#define ENGINE_PICK(table)                        \
  (isa_level() == kAvx512 ? engine::avx512::table \
   : isa_level() == kAvx2 ? engine::avx2::table   \
                          : engine::baseline::table)
#else
#define ENGINE_PICK(table) (engine::baseline::table)
#endif

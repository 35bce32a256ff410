#include "isa.h"

#include <atomic>

namespace engine {

static int detect() {
#ifdef ENGINE_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBaseline;
}

static std::atomic<int> limit{kAvx512};

int isa_level() {
  static const int best = detect();
  const int asked = limit.load(std::memory_order_relaxed);
  return asked < best ? asked : best;
}

void limit_isa_level(int level) { limit.store(level); }

}  // namespace engine

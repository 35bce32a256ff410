#include "isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#ifdef ENGINE_X86
#include <cpuid.h>
#endif
#if defined(ENGINE_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace engine {

// PyTorch's own switch for its kernels holds for ours too: "default", "avx2", "avx512" …
static int allowed() {
  const char* name = std::getenv("ATEN_CPU_CAPABILITY");
  if (name && std::strcmp(name, "default") == 0) return kBaseline;
  return name && std::strcmp(name, "avx2") == 0 ? kAvx2 : kAvx512;
}

static int supported() {
#ifdef ENGINE_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBaseline;
}

static int detect() { return std::min(supported(), allowed()); }

static bool detect_bf16_dots() {
#ifdef ENGINE_X86
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & 1u << 5) != 0;
#else
  return false;
#endif
}

// Linux saves the tiles of a process only after it has asked for them, once for all its threads.
static bool detect_amx() {
#if defined(ENGINE_X86) && defined(__linux__)
  unsigned eax, ebx, ecx, edx;
  if (detect() != kAvx512 || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if ((edx & amx_bf16) == 0 || (edx & amx_tile) == 0) return false;
  if (!detect_bf16_dots()) return false;
  const long ask_permission = 0x1023, get_permission = 0x1022, tile_data = 18;  // of arch_prctl(2)
  unsigned long granted = 0;
  return syscall(SYS_arch_prctl, ask_permission, tile_data) == 0 &&
         syscall(SYS_arch_prctl, get_permission, &granted) == 0 && (granted >> tile_data & 1) == 1;
#else
  return false;
#endif
}

static std::atomic<int> limit{kAmx};

int isa_level() {
  static const int best = detect();
  const int asked = limit.load(std::memory_order_relaxed);
  return asked < best ? asked : best;
}

bool amx_allowed() {
  static const bool here = detect_amx();
  return here && limit.load(std::memory_order_relaxed) >= kAmx;
}

bool bf16_dots_allowed() {
  static const bool here = detect_bf16_dots();
  return here && isa_level() == kAvx512;
}

void limit_isa_level(int level) { limit.store(level); }

}  // namespace engine

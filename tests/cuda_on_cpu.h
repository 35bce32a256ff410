// Runs CUDA kernels on the CPU, for tests: g++ -x c++ -include tests/cuda_on_cpu.h kernel.cu
//
// One fiber per CUDA thread, one block after another. A fiber runs until it must wait (for a
// barrier or a shuffle), then the next one of its warp runs; kernels without barriers are plain
// loops. Caught here: a barrier or shuffle that not all threads reach, reads of shared memory that
// nobody wrote (it is all NaN when a block starts), writes past the dynamic shared memory, and
// launches that a device would refuse. Not modelled: partial masks, streams, races of atomics.
#pragma once
#define ENGINE_CUDA_ON_CPU 1

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace cuda_on_cpu {

constexpr size_t kStack = 128 * 1024, kGuard = 64, kSharedLimit = 48 * 1024;

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  unsigned lanes = 0;
  uint64_t values[2][32];  // two sets: the next exchange may begin while this one is being read
};

struct Fiber {
  ucontext_t start;
  jmp_buf where;
  dim3 thread;
  bool started = false, done = true;
  const Barrier* waits_for = nullptr;
  unsigned generation = 0, exchanges = 0;
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::vector<char> dynamic_shared;
inline std::vector<const void*> poisoned;  // static shared arrays that this block has met
inline Barrier block_barrier;
inline unsigned current, block_threads;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::mutex one_launch_at_a_time;
inline unsigned ends = 0;  // if not 0: only so many blocks at each end of a grid run

inline void fiber_main() {
  for (;;) {
    body();
    fibers[current].done = true;
    if (!_setjmp(fibers[current].where)) _longjmp(scheduler, 1);
  }
}

inline void resume(unsigned id) {
  Fiber& fiber = fibers[id];
  current = id;
  threadIdx = fiber.thread;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.where, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline void wait(Barrier& barrier, unsigned expected) {
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  Fiber& fiber = fibers[current];
  fiber.waits_for = &barrier;
  fiber.generation = barrier.generation;
  if (!_setjmp(fiber.where)) _longjmp(scheduler, 1);
}

inline bool can_run(Fiber& fiber) {
  if (fiber.done || (fiber.waits_for && fiber.waits_for->generation == fiber.generation))
    return false;
  fiber.waits_for = nullptr;
  return true;
}

// The first thread of a block that meets a static shared array fills it with NaN.
inline void poison_once(void* array, size_t bytes) {
  for (const void* p : poisoned)
    if (p == array) return;
  std::memset(array, 0xFF, bytes);
  poisoned.push_back(array);
}

inline void make_fibers(unsigned count) {
  if (fibers.size() >= count) return;
  fibers.clear();
  fibers.resize(count);
  static char* stacks =
      static_cast<char*>(mmap(nullptr, 1024 * kStack, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (unsigned i = 0; i < count; ++i) {
    getcontext(&fibers[i].start);
    fibers[i].start.uc_stack.ss_sp = stacks + i * kStack;
    fibers[i].start.uc_stack.ss_size = kStack;
    makecontext(&fibers[i].start, fiber_main, 0);
  }
}

inline void run_block(size_t shared) {
  std::memset(dynamic_shared.data(), 0xFF, dynamic_shared.size());
  poisoned.clear();
  block_barrier = Barrier();
  warps.assign((block_threads + 31) / 32, Warp());
  for (unsigned i = 0; i < block_threads; ++i) {
    fibers[i].thread =
        dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    fibers[i].done = false;
    fibers[i].waits_for = nullptr;
    fibers[i].exchanges = 0;
    ++warps[i / 32].lanes;
  }
  for (bool moved = true; moved;) {
    moved = false;
    for (unsigned first = 0; first < block_threads; first += 32) {
      for (bool warp_moved = true; warp_moved;) {
        warp_moved = false;
        for (unsigned i = first; i < first + 32 && i < block_threads; ++i) {
          if (!can_run(fibers[i])) continue;
          resume(i);
          moved = warp_moved = true;
        }
      }
    }
  }
  for (unsigned i = 0; i < block_threads; ++i) {
    if (fibers[i].done) continue;
    fibers.clear();  // their stacks hold abandoned frames: start afresh next time
    throw std::runtime_error("deadlock: a barrier or shuffle that not all threads reach");
  }
  for (size_t i = shared; i < shared + kGuard; ++i)
    if (dynamic_shared[i] != static_cast<char>(0xFF))
      throw std::runtime_error("a kernel wrote past its dynamic shared memory");
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, Args&&... args) {
  std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  block_threads = block.x * block.y * block.z;
  if (block_threads < 1 || block_threads > 1024 || block.z > 64 || shared > kSharedLimit ||
      grid.x < 1 || grid.x > 0x7FFFFFFFu || grid.y < 1 || grid.y > 65535 || grid.z < 1 ||
      grid.z > 65535)
    throw std::runtime_error("a launch that a device would refuse: grid " + std::to_string(grid.x) +
                             " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) +
                             ", block " + std::to_string(block_threads) + ", shared " +
                             std::to_string(shared));
  make_fibers(block_threads);
  dynamic_shared.resize(shared + kGuard);
  gridDim = grid, blockDim = block;
  body = [&] { kernel(args...); };
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        if (ends && blockIdx.x == ends && grid.x > 2 * ends) blockIdx.x = grid.x - ends;
        run_block(shared);
      }
}

template <typename T>
T exchange(unsigned mask, T value, unsigned source_lane) {
  static_assert(sizeof(T) <= 8, "shuffles carry at most 8 bytes");
  if (mask != 0xFFFFFFFFu) {
    std::fputs("cuda_on_cpu: only shuffles of the full warp\n", stderr);
    std::abort();
  }
  Warp& warp = warps[current / 32];
  uint64_t* values = warp.values[fibers[current].exchanges++ & 1];
  std::memcpy(&values[current % 32], &value, sizeof(T));
  wait(warp.barrier, warp.lanes);
  T result = value;  // what a lane that does not exist would give
  if (source_lane < warp.lanes) std::memcpy(&result, &values[source_lane], sizeof(T));
  return result;
}

}  // namespace cuda_on_cpu

// For tests of tensors too large to go through: tests/large_offsets.py.
extern "C" __attribute__((used, visibility("default"))) inline void cuda_on_cpu_run_ends(
    unsigned blocks) {
  cuda_on_cpu::ends = blocks;
}

#define ENGINE_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (static_cast<void>(stream), cuda_on_cpu::launch(kernel, grid, block, shared, __VA_ARGS__))
#define ENGINE_SHARED(T, name, dimensions) \
  static T name dimensions;                \
  cuda_on_cpu::poison_once(name, sizeof(name))
#define ENGINE_DYNAMIC_SHARED(T, name) \
  T* name = reinterpret_cast<T*>(cuda_on_cpu::dynamic_shared.data())

inline void __syncthreads() {
  cuda_on_cpu::wait(cuda_on_cpu::block_barrier, cuda_on_cpu::block_threads);
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { cuda_on_cpu::exchange(mask, 0, 0); }
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int = 32) {
  return cuda_on_cpu::exchange(mask, value, (threadIdx.x % 32) ^ lane_mask);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int = 32) {
  return cuda_on_cpu::exchange(mask, value, source & 31);
}

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

// Fibers change only at barriers and shuffles, so plain operations are atomic.
template <typename T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}
template <typename T>
T atomicMin(T* address, T value) {
  const T before = *address;
  if (value < before) *address = value;
  return before;
}

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 a) { return __uint_as_float(uint32_t{a.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float a) {
  const uint32_t bits = __float_as_uint(a);
  if (a != a) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

struct __half {
  uint16_t bits;
};
inline float __half2float(__half a) {
  const uint32_t sign = uint32_t{a.bits & 0x8000u} << 16, rest = a.bits & 0x7FFFu;
  if (rest >= 0x7C00) return __uint_as_float(sign | 0x7F800000u | (rest & 0x3FF) << 13);
  const float magnitude = std::ldexp(__uint_as_float(rest << 13), 112);  // exponent bias 127 - 15
  return __uint_as_float(__float_as_uint(magnitude) | sign);
}
inline __half __float2half_rn(float a) {
  const uint32_t sign = (__float_as_uint(a) >> 16) & 0x8000;
  const float magnitude = std::fabs(a);
  if (a != a) return {0x7FFF};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  if (magnitude < 6.103515625e-5f)  // subnormal: a multiple of 2^-24, rounded by the host's mode
    return {
        static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(magnitude * 0x1p24f)))};
  const uint32_t bits = __float_as_uint(magnitude) - (112u << 23);
  return {static_cast<uint16_t>(sign | ((bits + 0xFFF + ((bits >> 13) & 1)) >> 13))};
}

struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __half2 __floats2half2_rn(float a, float b) {
  return {__float2half_rn(a), __float2half_rn(b)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

// Runs CUDA kernels on the CPU, for tests: g++ -x c++ -include tests/cuda_on_cpu.h kernel.cu
//
// One fiber per CUDA thread, one block after another; of a cooperative launch all blocks at once. A
// fiber runs until it must wait (for a barrier or a shuffle), then the next one of its warp runs;
// kernels without barriers are plain loops. Caught here: a barrier or shuffle that not all threads
// reach, reads of shared memory that nobody wrote (it is all NaN when a block starts), writes past
// the dynamic shared memory, and launches that a device would refuse. Warps take turns in their
// order, or, to bring a missing barrier to light, in a random one (cuda_on_cpu_device). Not
// modelled: partial masks, streams, races of atomics, memory that other blocks see late.
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
#include <utility>
#include <vector>

#include "cuda_on_cpu_numbers.h"

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
constexpr unsigned kFibers = 8192;

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  unsigned lanes = 0;
  uint64_t values[2][32];  // two sets: the next exchange may begin while this one is being read
};

struct Block {
  dim3 index;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<float4> dynamic_shared, static_shared;
  std::vector<std::pair<const void*, void*>> arrays;  // static shared ones that it has met
  size_t used = 0;                                    // of static_shared
};

struct Fiber {
  ucontext_t start;
  jmp_buf where;
  dim3 thread;
  Block* block = nullptr;
  unsigned in_block = 0;
  bool started = false, done = true;
  const Barrier* waits_for = nullptr;
  unsigned generation = 0, exchanges = 0;
};

inline std::vector<Fiber> fibers;
inline std::vector<Block> running;  // the blocks that run now
inline Barrier grid_barrier;
inline unsigned current, block_threads;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::mutex one_launch_at_a_time;
inline unsigned ends = 0;  // if not 0: only so many blocks at each end of a grid run
inline int processors = 2, l2_bytes = 1 << 20;  // of the device; each processor holds one block
inline uint32_t order = 0;                      // of the warps' turns: 0, or a random number's seed

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
  blockIdx = fiber.block->index;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.where, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// → the generation that must end before a wait at the barrier does.
inline unsigned arrive(Barrier& barrier, unsigned expected) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == expected) barrier.arrived = 0, ++barrier.generation;
  return generation;
}

inline void wait(const Barrier& barrier, unsigned generation) {
  if (barrier.generation != generation) return;
  Fiber& fiber = fibers[current];
  fiber.waits_for = &barrier;
  fiber.generation = generation;
  if (!_setjmp(fiber.where)) _longjmp(scheduler, 1);
}

inline void sync(Barrier& barrier, unsigned expected) { wait(barrier, arrive(barrier, expected)); }

inline bool can_run(Fiber& fiber) {
  if (fiber.done || (fiber.waits_for && fiber.waits_for->generation == fiber.generation))
    return false;
  fiber.waits_for = nullptr;
  return true;
}

// A block's own copy of a static shared array, which the first thread that meets it fills with NaN.
inline void* static_array(const void* name, size_t bytes) {
  Block& block = *fibers[current].block;
  for (const auto& [known, array] : block.arrays)
    if (known == name) return array;
  const size_t size = (bytes + sizeof(float4) - 1) / sizeof(float4);
  if ((block.used + size) * sizeof(float4) > kSharedLimit) {
    std::fputs("cuda_on_cpu: more static shared memory than a block has\n", stderr);
    std::abort();
  }
  void* array = block.static_shared.data() + block.used;
  block.used += size;
  std::memset(array, 0xFF, bytes);
  block.arrays.emplace_back(name, array);
  return array;
}

inline void make_fibers(unsigned count) {
  if (fibers.size() >= count) return;
  fibers.clear();
  fibers.resize(count);
  static char* stacks =
      static_cast<char*>(mmap(nullptr, kFibers * kStack, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  for (unsigned i = 0; i < count; ++i) {
    getcontext(&fibers[i].start);
    fibers[i].start.uc_stack.ss_sp = stacks + i * kStack;
    fibers[i].start.uc_stack.ss_size = kStack;
    makecontext(&fibers[i].start, fiber_main, 0);
  }
}

inline void prepare(Block& block, unsigned first, dim3 index, size_t shared) {
  block.index = index;
  block.barrier = Barrier();
  block.warps.assign((block_threads + 31) / 32, Warp());
  block.dynamic_shared.resize((shared + kGuard) / sizeof(float4) + 1);
  std::memset(static_cast<void*>(block.dynamic_shared.data()), 0xFF, shared + kGuard);
  block.static_shared.resize(kSharedLimit / sizeof(float4));
  block.arrays.clear();
  block.used = 0;
  for (unsigned i = 0; i < block_threads; ++i) {
    Fiber& fiber = fibers[first + i];
    fiber.thread = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    fiber.block = &block;
    fiber.in_block = i;
    fiber.done = false;
    fiber.waits_for = nullptr;
    fiber.exchanges = 0;
    ++block.warps[i / 32].lanes;
  }
}

// Runs a warp until all of its fibers wait or are done; whether any ran.
inline bool run_warp(unsigned first, unsigned lanes) {
  bool moved = false;
  for (bool again = true; again;) {
    again = false;
    for (unsigned i = first; i < first + lanes; ++i) {
      if (!can_run(fibers[i])) continue;
      resume(i);
      moved = again = true;
    }
  }
  return moved;
}

// Runs the prepared blocks, their warps in turn.
inline void run_blocks(size_t shared) {
  const unsigned warps = (block_threads + 31) / 32;
  std::vector<unsigned> turns(warps * running.size());
  for (unsigned i = 0; i < turns.size(); ++i) turns[i] = i;
  uint32_t random = order;
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t i = turns.size(); order && i > 1; --i) {
      random = random * 1664525u + 1013904223u;
      std::swap(turns[i - 1], turns[(random >> 8) % i]);
    }
    for (const unsigned turn : turns) {
      const unsigned in_block = turn % warps * 32;
      const unsigned first = turn / warps * block_threads + in_block;
      moved |= run_warp(first, block_threads - in_block < 32 ? block_threads - in_block : 32);
    }
  }
  for (unsigned i = 0; i < block_threads * running.size(); ++i) {
    if (fibers[i].done) continue;
    fibers.clear();  // their stacks hold abandoned frames: start afresh next time
    throw std::runtime_error("deadlock: a barrier or shuffle that not all threads reach");
  }
  for (const Block& block : running) {
    const char* dynamic = reinterpret_cast<const char*>(block.dynamic_shared.data());
    for (size_t i = shared; i < shared + kGuard; ++i)
      if (dynamic[i] != static_cast<char>(0xFF))
        throw std::runtime_error("a kernel wrote past its dynamic shared memory");
  }
}

inline void check(bool fits, dim3 grid, dim3 block, size_t shared) {
  block_threads = block.x * block.y * block.z;
  if (!fits || block_threads < 1 || block_threads > 1024 || block.z > 64 || shared > kSharedLimit ||
      grid.x < 1 || grid.x > 0x7FFFFFFFu || grid.y < 1 || grid.y > 65535 || grid.z < 1 ||
      grid.z > 65535)
    throw std::runtime_error("a launch that a device would refuse: grid " + std::to_string(grid.x) +
                             " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) +
                             ", block " + std::to_string(block_threads) + ", shared " +
                             std::to_string(shared));
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, Args&&... args) {
  std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  check(true, grid, block, shared);
  make_fibers(block_threads);
  running.resize(1);
  gridDim = grid, blockDim = block;
  body = [&] { kernel(args...); };
  dim3 at;
  for (at.z = 0; at.z < grid.z; ++at.z)
    for (at.y = 0; at.y < grid.y; ++at.y)
      for (at.x = 0; at.x < grid.x; ++at.x) {
        if (ends && at.x == ends && grid.x > 2 * ends) at.x = grid.x - ends;
        prepare(running[0], 0, at, shared);
        run_blocks(shared);
      }
}

// All blocks at once, so that they may wait for each other.
template <typename... Params, typename... Args>
void launch_cooperative(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared,
                        Args&&... args) {
  std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  const unsigned blocks = grid.x, limit = static_cast<unsigned>(processors);
  check(blocks <= limit && grid.y == 1 && grid.z == 1, grid, block, shared);
  if (block_threads * blocks > kFibers) throw std::runtime_error("cuda_on_cpu: too many threads");
  make_fibers(block_threads * blocks);
  running.resize(blocks);
  gridDim = grid, blockDim = block;
  body = [&] { kernel(args...); };
  grid_barrier = Barrier();
  for (unsigned i = 0; i < blocks; ++i)
    prepare(running[i], i * block_threads, dim3(i, 0, 0), shared);
  run_blocks(shared);
}

template <typename T>
T exchange(unsigned mask, T value, unsigned source_lane) {
  static_assert(sizeof(T) <= 8, "shuffles carry at most 8 bytes");
  if (mask != 0xFFFFFFFFu) {
    std::fputs("cuda_on_cpu: only shuffles of the full warp\n", stderr);
    std::abort();
  }
  Fiber& fiber = fibers[current];
  Warp& warp = fiber.block->warps[fiber.in_block / 32];
  uint64_t* values = warp.values[fiber.exchanges++ & 1];
  std::memcpy(&values[fiber.in_block % 32], &value, sizeof(T));
  sync(warp.barrier, warp.lanes);
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

// The device that tests want: blocks that run at once, its L2, and the order of warps (see order).
extern "C" __attribute__((used, visibility("default"))) inline void cuda_on_cpu_device(
    int blocks, int l2_bytes, unsigned order) {
  cuda_on_cpu::processors = blocks;
  cuda_on_cpu::l2_bytes = l2_bytes;
  cuda_on_cpu::order = order;
}

#define ENGINE_LAUNCH(kernel, grid, block, shared, stream, ...) \
  (static_cast<void>(stream), cuda_on_cpu::launch(kernel, grid, block, shared, __VA_ARGS__))
#define ENGINE_SHARED(T, name, dimensions) \
  using name##_array = T dimensions;       \
  static char name##_name;                 \
  name##_array& name =                     \
      *static_cast<name##_array*>(cuda_on_cpu::static_array(&name##_name, sizeof(name##_array)))
#define ENGINE_DYNAMIC_SHARED(T, name) \
  T* name =                            \
      reinterpret_cast<T*>(cuda_on_cpu::fibers[cuda_on_cpu::current].block->dynamic_shared.data())

inline void __syncthreads() {
  cuda_on_cpu::sync(cuda_on_cpu::fibers[cuda_on_cpu::current].block->barrier,
                    cuda_on_cpu::block_threads);
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

#include "cuda_on_cpu_launches.h"

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

template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

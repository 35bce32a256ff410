// How a kernel is launched. Kernel sources use these three macros in place of CUDA's own syntax, so
// that tests/cuda_on_cpu.h, included before them, can run the same sources on the CPU.
#pragma once

#ifndef ENGINE_CUDA_ON_CPU
#include <cuda_runtime.h>

#define ENGINE_LAUNCH(kernel, grid, block, shared, stream, ...) \
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define ENGINE_SHARED(T, name, dimensions) __shared__ T name dimensions
#define ENGINE_DYNAMIC_SHARED(T, name)              \
  extern __shared__ float4 engine_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(engine_dynamic_shared)
#endif

#include <cstdint>
#include <stdexcept>
#include <string>

namespace engine {

// A grid that may be longer than 65535: one dimension, at most 2^31 - 1 blocks.
inline dim3 blocks(int64_t count, const char* op) {
  if (count > 0x7FFFFFFF)
    throw std::runtime_error(std::string(op) +
                             ": the tensor needs more blocks than one launch has");
  return dim3(static_cast<unsigned>(count));
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) +
                             ": the CUDA launch failed: " + cudaGetErrorString(error));
}

}  // namespace engine

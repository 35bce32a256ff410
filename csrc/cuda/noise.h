// Normals by their numbers, eight to a thread: what noise.cu and reverse_step*.cu share.
#pragma once

#include "../philox.h"
#include "elements.h"

namespace engine {

constexpr int kPerThread = 8;

// z[j] <- normal number first + j, j = 0 ... 7. A number below zero (a slot that begins before its
// tensor) gives a value that nobody stores.
__device__ __forceinline__ void numbered_normals(int64_t seed, uint32_t step, uint32_t stream_id,
                                                 int64_t first, float* z) {
  const int shift = static_cast<int>(first & 3);
  const uint64_t quad = static_cast<uint64_t>(first >> 2);
  float w[12];
  philox::normal_quad(seed, step, stream_id, quad, w);
  philox::normal_quad(seed, step, stream_id, quad + 1, w + 4);
  if (shift != 0) philox::normal_quad(seed, step, stream_id, quad + 2, w + 8);
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {  // selects, not indices: w stays in registers
    const float low = shift & 1 ? w[j + 1] : w[j];
    const float high = shift & 1 ? w[j + 3] : w[j + 2];
    z[j] = shift & 2 ? high : low;
  }
}

// values[kPerThread] <- elements first ... of a tensor of `count`; zero outside.
__device__ __forceinline__ void load_floats(const void* data, DType dtype, int64_t first,
                                            int64_t count, float* values) {
#define ENGINE_LOAD(T)                                                                     \
  {                                                                                        \
    const auto slot = load_slot<T, kPerThread>(static_cast<const T*>(data), first, count); \
    for (int j = 0; j < kPerThread; ++j) values[j] = slot.get(j);                          \
  }
  if (dtype == DType::f32)
    ENGINE_LOAD(float)
  else if (dtype == DType::bf16)
    ENGINE_LOAD(bf16)
  else
    ENGINE_LOAD(f16)
#undef ENGINE_LOAD
}

}  // namespace engine

// The arithmetic of contiguous planes, forward: what the kernels of one block and of a cluster
// share.
#pragma once

#include "group_norm_silu.h"

namespace engine {
namespace {

// The sum over the threads of a unit, in all of them; `slots`: 32 floats used by no other sum.
__device__ __forceinline__ float unit_sum(float value, float* slots) {
  value = warp_sum(value);
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  if (warps == 1) return value;  // units in the same block are warps of their own
  const int first = threadIdx.y * warps;
  if (lane == 0) slots[first + threadIdx.x / 32] = value;
  __syncthreads();
  return warp_sum(lane < warps ? slots[first + lane] : 0.0f);
}

// Of a thread's vectors: the sum of u = x + add.
template <typename T, bool WHOLE, int K>
__device__ __forceinline__ float piece_sum(const Slot<T, kVector<T>> (&slots)[K],
                                           const PlaneVectors<T, WHOLE>& vectors, float add) {
  float sum = 0.0f;
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j)
      if (vectors.inside(k, j)) sum += slots[k].get(j) + add;
  return sum;
}

// The sums of d = u - m and of its squares.
template <typename T, bool WHOLE, int K>
__device__ __forceinline__ float2 centred_sums(const Slot<T, kVector<T>> (&slots)[K],
                                               const PlaneVectors<T, WHOLE>& vectors, float add,
                                               float m) {
  float2 sums = make_float2(0.0f, 0.0f);
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j)
      if (vectors.inside(k, j)) {
        const float d = slots[k].get(j) + add - m;
        sums.x += d;
        sums.y += d * d;
      }
  return sums;
}

// y = act((u - m) gamma + beta).
template <typename T, bool WHOLE, int K>
__device__ __forceinline__ void apply_planes(const Slot<T, kVector<T>> (&slots)[K],
                                             const PlaneVectors<T, WHOLE>& vectors,
                                             const Channel& channel, float m, bool silu, T* y) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (!vectors.inside(k)) break;
    Slot<T, kVector<T>> result;
#pragma unroll
    for (int i = 0; i < result.WORDS; ++i) {
      float values[result.PER_WORD];
#pragma unroll
      for (int e = 0; e < result.PER_WORD; ++e) {
        const float d = slots[k].get(i * result.PER_WORD + e) + channel.add - m;
        values[e] = act<T>(d * channel.gamma + channel.beta, silu);
      }
      result.set(i, values);
    }
    vectors.store(result, y, k);
  }
}

// Statistics of a piece of a group; of an empty one, zeros: a mean of 0 / 0 would reach the others.
struct Piece {
  float count, mean, m2;
};

// Merges piece(0), piece(1), ... by one warp, in a fixed order (Chan, Golub & LeVeque 1979); the
// result is in all of its lanes.
template <typename F>
__device__ __forceinline__ Piece merge_pieces(int64_t parts, F&& piece) {
  const int lane = threadIdx.x % 32;
  const float m0 = piece(0).mean;
  float count = 0.0f, shifted = 0.0f, m2 = 0.0f;
  for (int64_t i = lane; i < parts; i += 32) {
    const Piece p = piece(i);
    count += p.count;
    shifted += p.count * (p.mean - m0);
  }
  count = warp_sum(count);
  const float above = warp_sum(shifted) / count;  // mean - m0
  for (int64_t i = lane; i < parts; i += 32) {
    const Piece p = piece(i);
    const float d = p.mean - m0 - above;
    m2 += p.m2 + p.count * d * d;
  }
  return {count, m0 + above, warp_sum(m2)};
}

}  // namespace
}  // namespace engine

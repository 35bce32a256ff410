// The arithmetic of contiguous planes, forward: what the kernels of one block, of a cluster and of
// a cooperative grid share.
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
template <bool LAST, typename T, bool WHOLE, int K>
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
    vectors.template store<LAST>(result, y, k);
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

// mean and rstd of a group from its pieces, by one warp. partials: (rows, parts, 3).
__device__ __forceinline__ void merge_row(const float* partials, float* mean, float* rstd,
                                          int64_t row, int64_t parts, float eps) {
  const float* partial = partials + 3 * row * parts;
  const Piece all = merge_pieces(parts, [&](int64_t i) {
    return Piece{partial[3 * i], partial[3 * i + 1], partial[3 * i + 2]};
  });
  if (threadIdx.x % 32 == 0)
    mean[row] = all.mean, rstd[row] = 1.0f / sqrtf(all.m2 / all.count + eps);
}

// One block's piece of x: its statistics, or y. WHOLE: planes are whole vectors, aligned; K:
// vectors of a thread; LAST: see Slot::store. partials: (N * G, parts, 3).
template <typename T, bool WHOLE, int K, bool LAST = false>
__device__ __forceinline__ void fwd_planes(const GroupNormSilu& p,
                                           T* y,         // (N, C, S), like p.x
                                           float* mean,  // (N, G), like rstd
                                           float* rstd, float* partials, const PlaneTile& tile,
                                           Stage stage, int64_t block) {
  constexpr int VEC = kVector<T>;
  ENGINE_SHARED(float, sums, [4][32]);
  const PlanePlace at(p, tile, block);
  const Half<const T> half = half_of_x<T>(p, at.c);
  const T* x = half.data + (at.n * half.C + half.c) * p.S;
  PlaneVectors<T, WHOLE> vectors(x, p.S, at, tile, K);
  Channel channel = {0.0f, 0.0f, 0.0f};
  if (at.active) channel = load_channel(p, at.n, at.c);

  Slot<T, VEC> slots[K];
#pragma unroll
  for (int k = 0; k < K; ++k) slots[k] = vectors.load(x, k);

  float m = 0.0f, r = 0.0f, correction = 0.0f;
  if (stage == Stage::apply) {
    if (at.active) m = mean[at.row], r = rstd[at.row];
  } else {
    float count = static_cast<float>(p.C / p.G * p.S);
    if (stage == Stage::stats) count = unit_sum(static_cast<float>(vectors.count(K)), sums[0]);
    m = unit_sum(piece_sum(slots, vectors, channel.add), sums[1]) / count;
    forget(slots);
    forget(vectors.step);
    const float2 d = centred_sums(slots, vectors, channel.add, m);
    const float d_sum = unit_sum(d.x, sums[2]), d_squares = unit_sum(d.y, sums[3]);
    correction = d_sum / count;
    const float m2 = fmaxf(d_squares - d_sum * correction, 0.0f);
    const bool writer = at.active && threadIdx.x == 0;
    if (stage == Stage::stats) {
      if (writer) {
        float* partial = partials + 3 * (at.row * tile.c_parts * tile.s_parts + at.part);
        // An empty piece has no mean: 0 / 0 would reach the others through the merge.
        const bool empty = !(count > 0.0f);
        partial[0] = count, partial[1] = empty ? 0.0f : m + correction;
        partial[2] = empty ? 0.0f : m2;
      }
      return;
    }
    r = 1.0f / sqrtf(m2 / count + p.eps);
    if (writer) mean[at.row] = m + correction, rstd[at.row] = r;
  }

  forget(slots);
  forget(vectors.step);
  channel.beta -= correction * channel.gamma * r;
  channel.gamma *= r;
  apply_planes<LAST>(slots, vectors, channel, m, p.silu, y + (at.n * p.C + at.c) * p.S);
}

}  // namespace
}  // namespace engine

// The arithmetic of channels_last slabs, forward: what the kernels of one block and of a
// cooperative grid share.
#pragma once

#include "group_norm_silu_planes.h"

namespace engine {
namespace {

// Dynamic shared memory of fwd_slabs, in bytes.
inline size_t fwd_slabs_shared(const SlabTile& tile) {
  return sizeof(float4) * tile.width + sizeof(float) * 2 * tile.rows * tile.stride() +
         sizeof(float2) * tile.width;
}

// One block's piece of x: its statistics, or y. K: vectors of a thread. partials: (N * G, parts,
// 3), parts = tile.parts * tile.s_parts. LAST: see Slot::store.
template <typename T, int VEC, int K, bool LAST = false>
__device__ __forceinline__ void fwd_slabs(const GroupNormSilu& p,
                                          T* y,         // (N, S, C), like p.x
                                          float* mean,  // (N, G), like rstd
                                          float* rstd, float* partials, const SlabTile& tile,
                                          Stage stage, int64_t block) {
  ENGINE_DYNAMIC_SHARED(float4, params);  // (VEC, columns): add, mean, gamma, beta of a channel
  float* buffer = reinterpret_cast<float*>(params + tile.width);  // (2, rows, stride)
  float* plane = buffer + tile.rows * tile.stride();
  float2* statistics = reinterpret_cast<float2*>(buffer + 2 * tile.rows * tile.stride());
  const SlabPlace at(p, tile, VEC, block);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t s_first = at.s_part * tile.s_rows + at.r;
  const int64_t c = at.c_first + at.column * VEC;
  const Half<const T> half = half_of_x<T>(p, c);
  const T* x = half.data + at.n * p.S * half.C + half.c;

  // This thread's vectors: rows s_first, s_first + rows, ... that lie in S.
  const int64_t rest = p.S - s_first;
  const int s_left = rest > K * tile.rows ? K * tile.rows : static_cast<int>(rest);
  int rows = tile.rows;
  const auto inside = [&](int k) { return at.active && k * rows < s_left; };
  x += s_first * half.C;

  Slot<T, VEC> slots[K];
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (inside(k)) slots[k].load(x + k * rows * half.C);
  const auto param = [&](int c) -> float4& { return params[c % VEC * tile.columns + c / VEC]; };

  for (int c = threadIdx.x; c < at.width; c += blockDim.x) {
    const Channel channel = load_channel(p, at.n, at.c_first + c);
    param(c) = make_float4(channel.add, 0.0f, channel.gamma, channel.beta);
  }
  __syncthreads();

  const int64_t row = at.n * p.G + at.g_first;
  // Sums over the group's rows and channels in both planes of the buffer, by one warp per group.
  const auto group_sums = [&](int g, bool second) {
    float2 sum = make_float2(0.0f, 0.0f);
    const int rows_on = 32 / at.group, channels_on = 32 % at.group;  // to a lane's next element
    int r = lane / at.group, c = lane % at.group;
    while (r < tile.rows) {
      const int i = r * tile.stride() + g * at.group + c;
      sum.x += buffer[i];
      if (second) sum.y += plane[i];
      r += rows_on, c += channels_on;
      if (c >= at.group) c -= at.group, ++r;
    }
    return make_float2(warp_sum(sum.x), second ? warp_sum(sum.y) : 0.0f);
  };
  if (stage == Stage::apply) {
    for (int g = threadIdx.x; g < at.groups; g += blockDim.x)
      statistics[g] = make_float2(mean[row + g], rstd[row + g]);
    __syncthreads();
    for (int c = threadIdx.x; c < at.width; c += blockDim.x) {
      const float2 s = statistics[c / at.group];
      param(c).y = s.x;
      param(c).z *= s.y;
    }
    __syncthreads();
  } else {
    const int64_t left = p.S - at.s_part * tile.s_rows;
    const float count = static_cast<float>((left < tile.s_rows ? left : tile.s_rows) * at.group);
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      if (!at.active) break;
      const float add = params[j * tile.columns + at.column].x;
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (inside(k)) sum += slots[k].get(j) + add;
      buffer[at.r * tile.stride() + at.column * VEC + j] = sum;
    }
    __syncthreads();
    for (int g = warp; g < at.groups; g += warps) {
      const float sum = group_sums(g, false).x;
      if (lane == 0) statistics[g].x = sum / count;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < at.width; c += blockDim.x)
      param(c).y = statistics[c / at.group].x;
    __syncthreads();
    forget(slots);
    forget(rows);
#pragma unroll
    for (int j = 0; j < VEC; ++j) {
      if (!at.active) break;
      const float4 channel = params[j * tile.columns + at.column];
      float d_sum = 0.0f, d_squares = 0.0f;
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (inside(k)) {
          const float d = slots[k].get(j) + channel.x - channel.y;
          d_sum += d;
          d_squares += d * d;
        }
      buffer[at.r * tile.stride() + at.column * VEC + j] = d_sum;
      plane[at.r * tile.stride() + at.column * VEC + j] = d_squares;
    }
    __syncthreads();
    for (int g = warp; g < at.groups; g += warps) {
      const float2 d = group_sums(g, true);
      const float correction = d.x / count, m2 = fmaxf(d.y - d.x * correction, 0.0f);
      if (lane == 0) {
        const float m = statistics[g].x + correction, r = 1.0f / sqrtf(m2 / count + p.eps);
        statistics[g] = make_float2(correction, r);
        if (stage == Stage::stats) {
          const int64_t parts = tile.parts * tile.s_parts;
          float* partial =
              partials + 3 * ((row + g) * parts + at.slab_part * tile.s_parts + at.s_part);
          partial[0] = count, partial[1] = m, partial[2] = m2;
        } else {
          mean[row + g] = m, rstd[row + g] = r;
        }
      }
    }
    if (stage == Stage::stats) return;
    __syncthreads();
    for (int c = threadIdx.x; c < at.width; c += blockDim.x) {
      const float2 s = statistics[c / at.group];
      float4& channel = param(c);
      channel.z *= s.y;
      channel.w -= s.x * channel.z;
    }
    __syncthreads();
  }

  if (!at.active) return;
  forget(slots);
  forget(rows);
  using S = Slot<T, VEC>;
#pragma unroll
  for (int i = 0; i < S::WORDS; ++i) {
    float4 channels[S::PER_WORD];
#pragma unroll
    for (int e = 0; e < S::PER_WORD; ++e)
      channels[e] = params[(i * S::PER_WORD + e) * tile.columns + at.column];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      float values[S::PER_WORD];
#pragma unroll
      for (int e = 0; e < S::PER_WORD; ++e) {
        const float d = slots[k].get(i * S::PER_WORD + e) + channels[e].x - channels[e].y;
        values[e] = act<T>(d * channels[e].z + channels[e].w, p.silu);
      }
      slots[k].set(i, values);
    }
  }
  y += (at.n * p.S + s_first) * p.C + c;
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (inside(k)) slots[k].template store<LAST>(y + k * rows * p.C);
}

}  // namespace
}  // namespace engine

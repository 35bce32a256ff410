// What a block does in the backward of group_norm_silu: the sums of a piece, or dx. Shared by the
// kernels of group_norm_silu_bwd.cu and of group_norm_silu_bwd_blocked.cu.
#pragma once

#include "group_norm_silu.h"

namespace engine {
namespace {

// rstd, or 0 where a group is one element: xhat and dx are 0 there, exactly. Its own rstd,
// 1 / sqrt(eps), is large and would multiply what a contracted gamma dv - S1 left of 0.
__device__ __forceinline__ float unless_alone(const GroupNormSilu& p, float rstd) {
  return p.C == p.G && p.S == 1 ? 0.0f : rstd;
}

// S1 and S2 of a group from the workspace, by one warp, in all of its lanes.
__device__ __forceinline__ float2 group_sums(const GroupNormSilu& p, const float* workspace,
                                             int64_t n, int64_t g) {
  const int64_t group = p.C / p.G, plane = p.N * p.C;
  float2 sums = make_float2(0.0f, 0.0f);
  for (int64_t c = g * group + threadIdx.x % 32; c < (g + 1) * group; c += 32) {
    const float gamma = load_channel(p, n, c).gamma;
    sums.x += gamma * workspace[n * p.C + c];
    sums.y += gamma * workspace[plane + n * p.C + c];
  }
  return make_float2(warp_sum(sums.x), warp_sum(sums.y));
}

// What dx needs of an element.
struct Element {
  float xhat, dv;
};

template <typename T>
__device__ __forceinline__ Element element(float x, float dy, const Channel& channel, float mean,
                                           float rstd, bool silu) {
  const float xhat = (x + channel.add - mean) * rstd;
  return {xhat, act_bwd<T>(dy, xhat * channel.gamma + channel.beta, silu)};
}

// Where sum i (A, B, X) of piece `part` of (n, c) lies: (3, N, C, parts) if BLOCKED, so that a warp
// reads the pieces of a sum; else (parts, 3, N, C), so that the pieces are added as wholes.
template <bool BLOCKED>
__device__ __forceinline__ int64_t sum_index(const GroupNormSilu& p, int64_t i, int64_t n,
                                             int64_t c, int64_t part, int64_t parts) {
  return BLOCKED ? ((i * p.N + n) * p.C + c) * parts + part : ((part * 3 + i) * p.N + n) * p.C + c;
}

// dy2: null, or dy and dy2 are the halves of a pair. They may be dx and dx2: an element is read
// before the same thread writes it. `stats` writes sums_of_pieces, of which `apply` reads the
// total, the workspace; pieces: what a block walks over in `stats`.
template <typename T, bool WHOLE, int K, int THREADS, bool BLOCKED = false>
__device__ __forceinline__ void bwd_planes(const GroupNormSilu& p,
                                           const T* dy,  // (N, C, S), like p.x
                                           const T* dy2, T* dx, T* dx2,
                                           const float* mean_of_group,  // (N, G), like rstd
                                           const float* rstd_of_group, float* sums_of_pieces,
                                           const float* workspace,  // (3, N, C)
                                           const PlaneTile& tile, int64_t pieces, Stage stage,
                                           int64_t block) {
  constexpr int VEC = kVector<T>;
  // Of each plane, or of each warp of a plane: A, B, X, gamma A, gamma B.
  ENGINE_SHARED(float, sums, [5][THREADS]);
  PlanePlace at(p, tile, block);
  const Half<const T> half = half_of_x<T>(p, at.c);
  const int64_t plane = (at.n * half.C + half.c) * p.S;
  const T* x = half.data + plane;
  dy = dy2 ? half_of(p, dy, dy2, at.c).data + plane : dy + (at.n * p.C + at.c) * p.S;
  Channel channel = {0.0f, 0.0f, 0.0f};
  float mean = 0.0f, rstd = 0.0f;
  if (at.active) {
    channel = load_channel(p, at.n, at.c);
    mean = mean_of_group[at.row], rstd = unless_alone(p, rstd_of_group[at.row]);
  }
  Slot<T, VEC> xs[K], dys[K];
  PlaneVectors<T, WHOLE> vectors;
  float s1, s2;
  if (stage == Stage::apply) {
    vectors = PlaneVectors<T, WHOLE>(x, p.S, at, tile, K);
#pragma unroll
    for (int k = 0; k < K; ++k) xs[k] = vectors.load(x, k), dys[k] = vectors.load(dy, k);
    const float2 group = group_sums(p, workspace, at.n, at.row % p.G);
    s1 = group.x, s2 = group.y;
  } else {
    float a = 0.0f, b = 0.0f, t = 0.0f;
    const int64_t part = at.s_part;
    // `all` holds a plane at once; `stats` walks over its pieces.
    for (int64_t piece = 0; piece < pieces; ++piece) {
      at.s_part = part * pieces + piece;
      vectors = PlaneVectors<T, WHOLE>(x, p.S, at, tile, K);
#pragma unroll
      for (int k = 0; k < K; ++k) xs[k] = vectors.load(x, k), dys[k] = vectors.load(dy, k);
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int j = 0; j < VEC; ++j)
          if (vectors.inside(k, j)) {
            const Element e = element<T>(xs[k].get(j), dys[k].get(j), channel, mean, rstd, p.silu);
            a += e.dv, b += e.dv * e.xhat, t += e.xhat;
          }
    }
    const int width = tile.lanes < 32 ? tile.lanes : 32;
    a = lane_sum(a, width), b = lane_sum(b, width), t = lane_sum(t, width);
    const int first = threadIdx.y * blockDim.x, entry = first + threadIdx.x / width;
    const int entries = tile.channels * tile.lanes / width, per_plane = tile.lanes / width;
    if (at.lane % width == 0) {
      sums[0][entry] = a, sums[1][entry] = b, sums[2][entry] = t;
      sums[3][entry] = channel.gamma * a, sums[4][entry] = channel.gamma * b;
    }
    __syncthreads();
    if (at.active && at.lane == 0) {
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        float sum = 0.0f;
        for (int e = 0; e < per_plane; ++e) sum += sums[i][entry + e];
        sums_of_pieces[sum_index<BLOCKED>(p, i, at.n, at.c, part, tile.s_parts)] = sum;
      }
    }
    if (stage == Stage::stats) return;
    s1 = 0.0f, s2 = 0.0f;
    for (int e = threadIdx.x % 32; e < entries; e += 32)
      s1 += sums[3][first + e], s2 += sums[4][first + e];
    s1 = warp_sum(s1), s2 = warp_sum(s2);
  }

  forget(xs), forget(dys), forget(vectors.step);
  const float per_element = 1.0f / static_cast<float>(p.C / p.G * p.S);
  dx = half_of(p, dx, dx2, at.c).data + plane;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (!vectors.inside(k)) break;
    Slot<T, VEC> result;
#pragma unroll
    for (int i = 0; i < result.WORDS; ++i) {
      float values[result.PER_WORD];
#pragma unroll
      for (int h = 0; h < result.PER_WORD; ++h) {
        const int j = i * result.PER_WORD + h;
        const Element e = element<T>(xs[k].get(j), dys[k].get(j), channel, mean, rstd, p.silu);
        values[h] = rstd * (channel.gamma * e.dv - (s1 + e.xhat * s2) * per_element);
      }
      result.set(i, values);
    }
    vectors.template store<BLOCKED>(result, dx, k);
  }
}

// As bwd_planes.
template <typename T, int VEC, int K, bool BLOCKED = false>
__device__ __forceinline__ void bwd_slabs(const GroupNormSilu& p,
                                          const T* dy,  // (N, S, C), like p.x
                                          const T* dy2, T* dx, T* dx2,
                                          const float* mean_of_group,  // (N, G), like rstd
                                          const float* rstd_of_group, float* sums_of_pieces,
                                          const float* workspace,  // (3, N, C)
                                          const SlabTile& tile, Stage stage, int64_t block) {
  ENGINE_DYNAMIC_SHARED(float4, params);  // (VEC, columns): add, mean, rstd, gamma of a channel
  float* beta = reinterpret_cast<float*>(params + tile.width);  // (VEC, columns)
  float* totals = beta + tile.width;                            // (2, width): gamma A, gamma B
  float* group_totals = totals + 2 * tile.width;                // (2, width): S1, S2
  float* buffer = group_totals + 2 * tile.width;                // (rows, stride)
  const SlabPlace at(p, tile, VEC, block);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t c_thread = at.c_first + at.column * VEC;
  const Half<const T> half = half_of_x<T>(p, c_thread);
  const int64_t offset = at.n * p.S * half.C + half.c;
  const T* x = half.data + offset;
  // 32 bits each: registers are short here.
  const int x_row = static_cast<int>(half.C), dy_row = static_cast<int>(dy2 ? half.C : p.C);
  dy = dy2 ? half_of(p, dy, dy2, c_thread).data + offset : dy + at.n * p.S * p.C + c_thread;
  const auto index = [&](int c) { return c % VEC * tile.columns + c / VEC; };
  for (int c = threadIdx.x; c < at.width; c += blockDim.x) {
    const Channel channel = load_channel(p, at.n, at.c_first + c);
    const int64_t row = at.n * p.G + at.g_first + c / at.group;
    params[index(c)] = make_float4(channel.add, mean_of_group[row],
                                   unless_alone(p, rstd_of_group[row]), channel.gamma);
    beta[index(c)] = channel.beta;
  }
  __syncthreads();

  const auto element_of = [&](float x, float dy, int j) {
    const float4 q = params[j * tile.columns + at.column];
    return element<T>(x, dy, {q.x, q.w, beta[j * tile.columns + at.column]}, q.y, q.z, p.silu);
  };
  Slot<T, VEC> xs[K], dys[K];
  const int64_t s_first = at.s_part * tile.s_rows;
  const int64_t s_end = s_first + tile.s_rows < p.S ? s_first + tile.s_rows : p.S;
  int rows = tile.rows, left = 0;  // rows left from this thread's first one on
  const auto inside = [&](int k) { return k * rows < left; };
  const auto load = [&](int64_t s) {
    left = at.active ? static_cast<int>(s_end - s < K * rows ? s_end - s : K * rows) : 0;
#pragma unroll
    for (int k = 0; k < K; ++k)
      if (inside(k)) {
        xs[k].load(x + (s + k * rows) * x_row);
        dys[k].load(dy + (s + k * rows) * dy_row);
      }
  };
  if (stage == Stage::apply) {
    load(s_first + at.r);
  } else {
    float a[VEC] = {}, b[VEC] = {}, t[VEC] = {};
    // One round for `all`; as many as the piece takes for `stats`.
    for (int64_t s = s_first; s < s_end; s += K * rows) {
      load(s + at.r);
#pragma unroll
      for (int j = 0; j < VEC; ++j)
#pragma unroll
        for (int k = 0; k < K; ++k)
          if (inside(k)) {
            const Element e = element_of(xs[k].get(j), dys[k].get(j), j);
            a[j] += e.dv, b[j] += e.dv * e.xhat, t[j] += e.xhat;
          }
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      __syncthreads();
      if (at.active)
#pragma unroll
        for (int j = 0; j < VEC; ++j)
          buffer[at.r * tile.stride() + at.column * VEC + j] = i == 0 ? a[j] : i == 1 ? b[j] : t[j];
      __syncthreads();
      for (int c = warp; c < at.width; c += warps) {
        float sum = 0.0f;
        for (int r = lane; r < rows; r += 32) sum += buffer[r * tile.stride() + c];
        sum = warp_sum(sum);
        if (lane == 0) {
          sums_of_pieces[sum_index<BLOCKED>(p, i, at.n, at.c_first + c, at.s_part, tile.s_parts)] =
              sum;
          if (i < 2) totals[i * tile.width + c] = params[index(c)].w * sum;
        }
      }
    }
    if (stage == Stage::stats) return;
    __syncthreads();
  }
  for (int g = warp; g < at.groups; g += warps) {
    float2 total = make_float2(0.0f, 0.0f);
    if (stage == Stage::apply) {
      total = group_sums(p, workspace, at.n, at.g_first + g);
    } else {
      for (int c = lane; c < at.group; c += 32) {
        total.x += totals[g * at.group + c];
        total.y += totals[tile.width + g * at.group + c];
      }
      total = make_float2(warp_sum(total.x), warp_sum(total.y));
    }
    if (lane == 0) group_totals[g] = total.x, group_totals[tile.width + g] = total.y;
  }
  __syncthreads();
  if (!at.active) return;

  forget(xs), forget(dys), forget(rows);
  const float per_element = 1.0f / static_cast<float>(p.C / p.G * p.S);
  using S = Slot<T, VEC>;
#pragma unroll
  for (int i = 0; i < S::WORDS; ++i) {
    float s1[S::PER_WORD], s2[S::PER_WORD];
#pragma unroll
    for (int h = 0; h < S::PER_WORD; ++h) {
      const int g = (at.column * VEC + i * S::PER_WORD + h) / at.group;
      s1[h] = group_totals[g] * per_element, s2[h] = group_totals[tile.width + g] * per_element;
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      float values[S::PER_WORD];
#pragma unroll
      for (int h = 0; h < S::PER_WORD; ++h) {
        const int j = i * S::PER_WORD + h;
        const float4 q = params[j * tile.columns + at.column];
        const Element e = element_of(xs[k].get(j), dys[k].get(j), j);
        values[h] = q.z * (q.w * e.dv - (s1[h] + e.xhat * s2[h]));
      }
      dys[k].set(i, values);
    }
  }
  const Half<T> out = half_of(p, dx, dx2, at.c_first + at.column * VEC);
  dx = out.data + (at.n * p.S + s_first + at.r) * out.C + out.c;
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (inside(k)) dys[k].template store<BLOCKED>(dx + k * rows * out.C);
}

// Dynamic shared memory of bwd_slabs, in bytes.
inline size_t bwd_slabs_shared(const SlabTile& tile) {
  return sizeof(float4) * tile.width + sizeof(float) * (5 * tile.width + tile.rows * tile.stride());
}

}  // namespace
}  // namespace engine

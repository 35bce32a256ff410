// group_norm_silu, forward: u = x + add; mean, var over a group (n, g) of C/G channels and S;
//   xhat = (u - mean) rstd;  v = xhat gamma + beta, gamma = weight (1 + scale),
//   beta = bias (1 + scale) + shift;  y = v sigmoid(v), or v.  Backward: group_norm_silu_bwd.cu.
//
// A pair (x, x2) is read as its concatenation: a thread's channel says which half it lies in.
// Two passes over registers: the mean, then d = u - mean: its sum corrects the mean's rounding, its
// squares give the variance. mean and rstd (N, G) are saved in float32.
//
// Grid: a group that fits a block's registers (96 KB contiguous, 64 KB a slab of channels_last)
// is read once, one launch. Larger ones: blocks write (count, mean, M2) of their pieces, a warp per
// group merges them, and a third launch applies, last pieces first, as they may still be in L2.
// The pieces' statistics lie in y, which the last launch overwrites: no workspace. Layouts:
// group_norm_silu.h. No atomics: the same bits on every run.
// Bytes per element: x read once (twice for large groups), y written once: 4 (6) in bf16, 8 (12) in
// float32. Refuses nothing (csrc/ops_group_norm_silu.cpp sees to it that both halves of a pair have
// one layout); misaligned planes and odd channel counts are read element by element.
#include "group_norm_silu_planes.h"

namespace engine {
namespace {

constexpr int K = 8;  // vectors per thread

// WHOLE: planes are whole vectors, aligned. partials: (N * G, parts, 3).
template <typename T, bool WHOLE>
__global__ void __launch_bounds__(kMaxThreads)
    group_norm_silu_fwd_planes_kernel(GroupNormSilu p,
                                      T* y,         // (N, C, S), like p.x
                                      float* mean,  // (N, G), like rstd
                                      float* rstd, float* partials, PlaneTile tile, Stage stage) {
  constexpr int VEC = kVector<T>;
  ENGINE_SHARED(float, sums, [4][32]);
  const PlanePlace at(p, tile, stage);
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
  apply_planes(slots, vectors, channel, m, p.silu, y + (at.n * p.C + at.c) * p.S);
}

// partials: as above, parts = tile.parts * tile.s_parts.
template <typename T, int VEC>
__global__ void __launch_bounds__(kSlabThreads)
    group_norm_silu_fwd_slabs_kernel(GroupNormSilu p,
                                     T* y,         // (N, S, C), like p.x
                                     float* mean,  // (N, G), like rstd
                                     float* rstd, float* partials, SlabTile tile, Stage stage) {
  ENGINE_DYNAMIC_SHARED(float4, params);  // (VEC, columns): add, mean, gamma, beta of a channel
  float* buffer = reinterpret_cast<float*>(params + tile.width);  // (2, rows, stride)
  float* plane = buffer + tile.rows * tile.stride();
  float2* statistics = reinterpret_cast<float2*>(buffer + 2 * tile.rows * tile.stride());
  const SlabPlace at(p, tile, VEC, stage);
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
    if (inside(k)) slots[k].store(y + k * rows * p.C);
}

// One warp per group merges its pieces.
__global__ void __launch_bounds__(128)
    group_norm_silu_merge_kernel(const float* partials,     // (rows, parts, 3): count, mean, M2
                                 float* mean, float* rstd,  // (rows,)
                                 int64_t rows, int64_t parts, float eps) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  if (row >= rows) return;
  const float* partial = partials + 3 * row * parts;
  const Piece all = merge_pieces(parts, [&](int64_t i) {
    return Piece{partial[3 * i], partial[3 * i + 1], partial[3 * i + 2]};
  });
  if (threadIdx.x % 32 == 0)
    mean[row] = all.mean, rstd[row] = 1.0f / sqrtf(all.m2 / all.count + eps);
}

// Runs launch(stage, partials) for `all`, or for `stats` and `apply` with the merge in between.
template <typename F>
void run_stages(const GroupNormSilu& p, bool resident, int64_t parts, void* y, int element_size,
                float* mean, float* rstd, void* stream, F&& launch) {
  if (resident) {
    launch(Stage::all, nullptr);
    return;
  }
  const int64_t rows = p.N * p.G;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(y) + 3) & ~uintptr_t{3};
  if (rows * parts * 12 + 4 > p.N * p.C * p.S * element_size)
    throw std::logic_error("group_norm_silu: the statistics of the pieces do not fit into y");
  float* partials = reinterpret_cast<float*>(start);
  launch(Stage::stats, partials);
  ENGINE_LAUNCH(group_norm_silu_merge_kernel, blocks((rows + 3) / 4, "group_norm_silu"), 128, 0,
                stream, partials, mean, rstd, rows, parts, p.eps);
  check_launch("group_norm_silu");
  launch(Stage::apply, nullptr);
}

template <typename T, bool WHOLE>
void launch_fwd_planes(const GroupNormSilu& p, T* y, float* mean, float* rstd, void* stream) {
  PlaneTile tile;
  const bool resident = choose_plane_tile(p, kVector<T>, K, WHOLE, &tile);
  run_stages(p, resident, tile.c_parts * tile.s_parts, y, sizeof(T), mean, rstd, stream,
             [&](Stage stage, float* partials) {
               auto* kernel = group_norm_silu_fwd_planes_kernel<T, WHOLE>;
               ENGINE_LAUNCH(kernel, blocks(tile.grid(), "group_norm_silu"), tile.block(), 0,
                             stream, p, y, mean, rstd, partials, tile, stage);
               check_launch("group_norm_silu");
             });
}

template <typename T, int VEC>
void launch_fwd_slabs(const GroupNormSilu& p, T* y, float* mean, float* rstd, void* stream) {
  SlabTile tile;
  const bool resident = choose_slab_tile(p, sizeof(T), VEC, K, &tile);
  const size_t shared = sizeof(float4) * tile.width +
                        sizeof(float) * 2 * tile.rows * tile.stride() + sizeof(float2) * tile.width;
  run_stages(p, resident, tile.parts * tile.s_parts, y, sizeof(T), mean, rstd, stream,
             [&](Stage stage, float* partials) {
               auto* kernel = group_norm_silu_fwd_slabs_kernel<T, VEC>;
               ENGINE_LAUNCH(kernel, blocks(tile.units, "group_norm_silu"), tile.threads, shared,
                             stream, p, y, mean, rstd, partials, tile, stage);
               check_launch("group_norm_silu");
             });
}

}  // namespace

void group_norm_silu_fwd_cuda(const GroupNormSilu& p, void* y, float* mean, float* rstd,
                              void* stream) {
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out = static_cast<T*>(y);
    const bool aligned = aligned16(p.x) && aligned16(p.x2) && aligned16(y);
    if (p.channels_last) {
      if (aligned && slab_vectors(p, kVector<T>))
        launch_fwd_slabs<T, kVector<T>>(p, out, mean, rstd, stream);
      else
        launch_fwd_slabs<T, 1>(p, out, mean, rstd, stream);
    } else if (aligned && p.S % kVector<T> == 0) {
      launch_fwd_planes<T, true>(p, out, mean, rstd, stream);
    } else {
      launch_fwd_planes<T, false>(p, out, mean, rstd, stream);
    }
  });
}

}  // namespace engine

// group_norm_silu, backward (names as in group_norm_silu.cu): v, xhat are computed again from x.
//   dv = dy s (1 + v (1 - s)), s = sigmoid(v), or dy
//   A = sum_S dv, B = sum_S dv xhat, X = sum_S xhat per (n, c): the workspace, (3, N, C)
//   S1 = sum_c gamma A, S2 = sum_c gamma B over a group, M = C/G S
//   dx = rstd (gamma dv - (S1 + xhat S2) / M);  dadd = rstd (gamma A - (S S1 + X S2) / M)
//   dshift = A, dscale = weight B + bias A, dweight = sum_n (1 + scale) B, dbias = sum_n (1 +
//   scale) A
//
// Grid: a group whose x and dy fit a block's registers (48 KB of each contiguous, 32 KB a slab of
// channels_last) is read once. Larger ones: one launch sums, one applies; contiguous planes are
// summed by one block each; pieces of channels_last slabs are put into dx and merged, unless dx is
// taken. dy in the other layout is transposed into dx first, and dx then written in place. A last,
// small launch makes the gradients of the operands. Every sum has one writer and a fixed order: the
// same bits on every run.
// Bytes per element: x, dy read, dx written: 6 in bf16, 12 in float32; large groups read x and dy
// twice (10, 20); dy in the other layout adds a read and a write (4, 8). Refuses nothing. Of a pair
// (x, x2), (dx, dx2) take the places of x and dx.
#include "group_norm_silu_bwd.h"

namespace engine {
namespace {

constexpr int K = 4;  // vectors per thread, of x and of dy
constexpr const char* kOp = "group_norm_silu backward";

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

// dy2: null, or dy and dy2 are the halves of a pair. They may be dx and dx2: an element is read
// before the same thread writes it.
template <typename T, bool WHOLE>
__global__ void __launch_bounds__(kMaxThreads)
    group_norm_silu_bwd_planes_kernel(GroupNormSilu p,
                                      const T* dy,  // (N, C, S), like p.x
                                      const T* dy2, T* dx, T* dx2,
                                      const float* mean_of_group,  // (N, G), like rstd
                                      const float* rstd_of_group, float* workspace,  // (3, N, C)
                                      PlaneTile tile, int64_t pieces, Stage stage) {
  constexpr int VEC = kVector<T>;
  // Of each plane, or of each warp of a plane: A, B, X, gamma A, gamma B.
  ENGINE_SHARED(float, sums, [5][kMaxThreads]);
  PlanePlace at(p, tile, block_of(stage));
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
    // `all` holds a plane at once; `stats` walks over its pieces.
    for (int64_t piece = 0; piece < pieces; ++piece) {
      at.s_part = piece;
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
        workspace[(i * p.N + at.n) * p.C + at.c] = sum;
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
    vectors.store(result, dx, k);
  }
}

// sums: the workspace (3, N, C), or in pieces (s_parts, 3, N, C). dy, dy2: as above.
template <typename T, int VEC>
__global__ void __launch_bounds__(kSlabThreads, sizeof(T) * VEC == 4 ? 1 : 0)  // else it spills
    group_norm_silu_bwd_slabs_kernel(GroupNormSilu p,
                                     const T* dy,  // (N, S, C), like p.x
                                     const T* dy2, T* dx, T* dx2,
                                     const float* mean_of_group,  // (N, G), like rstd
                                     const float* rstd_of_group, float* sums, SlabTile tile,
                                     Stage stage) {
  ENGINE_DYNAMIC_SHARED(float4, params);  // (VEC, columns): add, mean, rstd, gamma of a channel
  float* beta = reinterpret_cast<float*>(params + tile.width);  // (VEC, columns)
  float* totals = beta + tile.width;                            // (2, width): gamma A, gamma B
  float* group_totals = totals + 2 * tile.width;                // (2, width): S1, S2
  float* buffer = group_totals + 2 * tile.width;                // (rows, stride)
  const SlabPlace at(p, tile, VEC, block_of(stage));
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
          sums[((at.s_part * 3 + i) * p.N + at.n) * p.C + at.c_first + c] = sum;
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
      total = group_sums(p, sums, at.n, at.g_first + g);
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
    if (inside(k)) dys[k].store(dx + k * rows * out.C);
}

// dx, `channels` channels <- those of dy from `first` on, in the layout of x.
template <typename T>
void launch_transpose(const GroupNormSilu& p, const void* dy, int64_t first, int64_t channels,
                      void* dx, void* stream) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
  const int64_t a = p.channels_last ? channels : p.S, b = p.channels_last ? p.S : channels;
  const int64_t a_tiles = (a + 31) / 32, b_tiles = (b + 31) / 32;
  const Bits* in = static_cast<const Bits*>(dy) + (p.channels_last ? first * p.S : first);
  ENGINE_LAUNCH(transpose_kernel<Bits>, blocks(p.N * a_tiles * b_tiles, kOp), 256, 0, stream, in,
                static_cast<Bits*>(dx), p.C * p.S, p.channels_last ? p.S : p.C, a, b, a_tiles,
                b_tiles);
  check_launch(kOp);
}

template <typename T, bool WHOLE>
void launch_bwd_planes(const GroupNormSilu& p, const T* dy, const T* dy2, T* dx, T* dx2,
                       const float* mean, const float* rstd, float* workspace, void* stream) {
  PlaneTile tile;
  const bool resident = choose_plane_tile(p, kVector<T>, K, WHOLE, &tile);
  const auto launch = [&](Stage stage) {
    PlaneTile t = tile;
    if (stage == Stage::stats) t.s_parts = 1, t.units /= tile.s_parts;  // a block has whole planes
    auto* kernel = group_norm_silu_bwd_planes_kernel<T, WHOLE>;
    ENGINE_LAUNCH(kernel, blocks(t.grid(), kOp), t.block(), 0, stream, p, dy, dy2, dx, dx2, mean,
                  rstd, workspace, t, tile.s_parts, stage);
    check_launch(kOp);
  };
  if (resident) return launch(Stage::all);
  launch(Stage::stats);
  launch(Stage::apply);
}

// scratch: whether dx (or dx2) may hold the sums of the pieces.
template <typename T, int VEC>
void launch_bwd_slabs(const GroupNormSilu& p, const T* dy, const T* dy2, T* dx, T* dx2,
                      const float* mean, const float* rstd, float* workspace, bool scratch,
                      void* stream) {
  SlabTile tile;
  const bool resident = choose_slab_tile(p, sizeof(T), VEC, K, &tile);
  const size_t shared =
      sizeof(float4) * tile.width + sizeof(float) * (5 * tile.width + tile.rows * tile.stride());
  const auto launch = [&](Stage stage, const SlabTile& t, float* sums) {
    auto* kernel = group_norm_silu_bwd_slabs_kernel<T, VEC>;
    ENGINE_LAUNCH(kernel, blocks(t.units, kOp), t.threads, shared, stream, p, dy, dy2, dx, dx2,
                  mean, rstd, sums, t, stage);
    check_launch(kOp);
  };
  if (resident) return launch(Stage::all, tile, workspace);

  // Pieces as short as the apply's while they fit into dx and there are not enough blocks.
  SlabTile stats = tile;
  const bool in_second = 2 * p.C2 > p.C;  // of dx and dx2 the larger one
  const int64_t channels = in_second ? p.C2 : p.C - p.C2;
  const int64_t bytes = p.N * channels * p.S * static_cast<int64_t>(sizeof(T));
  const int64_t room = (bytes - 4) / (12 * p.N * p.C);
  const int64_t wanted = kEnoughThreads / kSlabThreads * 4 / (p.N * tile.slabs) + 1;
  int64_t parts = tile.s_parts < wanted ? tile.s_parts : wanted;
  if (parts > room) parts = room;
  if (!scratch || parts < 1) parts = 1;
  const int64_t rounds = (tile.s_parts + parts - 1) / parts;
  stats.s_rows = tile.s_rows * rounds;
  stats.s_parts = (p.S + stats.s_rows - 1) / stats.s_rows;
  stats.units = p.N * tile.slabs * stats.s_parts;
  if (stats.s_parts == 1) {
    launch(Stage::stats, stats, workspace);
  } else {
    const uintptr_t start = (reinterpret_cast<uintptr_t>(in_second ? dx2 : dx) + 3) & ~uintptr_t{3};
    float* pieces = reinterpret_cast<float*>(start);
    launch(Stage::stats, stats, pieces);
    const int64_t count = 3 * p.N * p.C;
    ENGINE_LAUNCH(group_norm_silu_bwd_merge_kernel, blocks((count + 255) / 256, kOp), 256, 0,
                  stream, pieces, workspace, count, stats.s_parts);
    check_launch(kOp);
  }
  launch(Stage::apply, tile, workspace);
}

}  // namespace

void group_norm_silu_bwd_cuda(const GroupNormSilu& p, const void* dy, bool dy_channels_last,
                              const float* mean, const float* rstd, float* workspace,
                              const GroupNormSiluGrads& grads, void* stream) {
  // Where both layouts are the same memory, dy is where it has to be.
  const bool other = dy_channels_last != p.channels_last && p.S > 1 && p.C > 1;
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    T *dx = static_cast<T*>(grads.dx), *dx2 = static_cast<T*>(grads.dx2);
    if (other) {
      launch_transpose<T>(p, dy, 0, p.C - p.C2, dx, stream);
      if (p.C2) launch_transpose<T>(p, dy, p.C - p.C2, p.C2, dx2, stream);
    }
    const T *d = other ? dx : static_cast<const T*>(dy), *d2 = other ? dx2 : nullptr;
    const bool aligned =
        aligned16(p.x) && aligned16(p.x2) && aligned16(d) && aligned16(dx) && aligned16(dx2);
    if (p.channels_last) {
      if (aligned && slab_vectors(p, kVector<T>))
        launch_bwd_slabs<T, kVector<T>>(p, d, d2, dx, dx2, mean, rstd, workspace, !other, stream);
      else
        launch_bwd_slabs<T, 1>(p, d, d2, dx, dx2, mean, rstd, workspace, !other, stream);
    } else if (aligned && p.S % kVector<T> == 0) {
      launch_bwd_planes<T, true>(p, d, d2, dx, dx2, mean, rstd, workspace, stream);
    } else {
      launch_bwd_planes<T, false>(p, d, d2, dx, dx2, mean, rstd, workspace, stream);
    }
  });
  const int64_t group_blocks = grads.dadd || grads.dscale || grads.dshift ? (p.N * p.G + 7) / 8 : 0;
  const int64_t channel_blocks = grads.dweight || grads.dbias ? (p.C + 31) / 32 : 0;
  if (group_blocks + channel_blocks == 0) return;
  ENGINE_LAUNCH(group_norm_silu_bwd_operands_kernel, blocks(group_blocks + channel_blocks, kOp),
                256, 0, stream, p, rstd, workspace, grads, group_blocks);
  check_launch(kOp);
}

}  // namespace engine

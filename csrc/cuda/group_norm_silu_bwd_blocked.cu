// group_norm_silu, backward, of groups larger than a block: dx by one cooperative launch whose
// second read of x and dy comes from L2.  Equations: group_norm_silu_bwd.cu, which makes the
// operands' gradients too; arithmetic: group_norm_silu_bwd_pieces.h, shared with it.
//
// UNPROVEN, and taken as little as group_norm_silu_blocked.cu.
//
// Grid: as there. Blocks sum pieces of a wave, a warp each merges channels of the wave before it
// into the workspace (3, N, C), and each block applies the pieces that it summed two turns ago. The
// sums of a piece have one writer, a merge a fixed order: the same bits on every run.
// Bytes per element: x, dy read once, dx written once: 6 in bf16, 12 in float32, if the second
// reads hit (group_norm_silu_bwd.cu: 10, 20). Refuses: groups that one block of
// group_norm_silu_bwd.cu holds; groups (of channels_last: slabs of 64 bytes of channels) of which
// x and dy are over a sixth of the L2.
#include "group_norm_silu_bwd_pieces.h"
#include "group_norm_silu_cooperative.h"

namespace engine {
namespace {

constexpr int K = 4;  // vectors per thread, of x and of dy
// Of slabs: up to 168 registers, as 128 are too few on sm_80; single channels need a thread each.
constexpr int slab_threads(int vec) { return vec == 1 ? kBlockedThreads : 192; }
constexpr const char* kOp = "group_norm_silu backward";

// The sums of channel `item` = n * C + c over its pieces, by a warp. pieces: (3, N, C, parts).
__device__ __forceinline__ void merge_channel(const GroupNormSilu& p, const float* pieces,
                                              float* workspace, int64_t item, int64_t parts) {
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    const int64_t at = i * p.N * p.C + item;
    float sum = 0.0f;
    for (int64_t part = threadIdx.x % 32; part < parts; part += 32)
      sum += pieces[at * parts + part];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) workspace[at] = sum;
  }
}

template <typename T, bool WHOLE>
__global__ void __launch_bounds__(kBlockedThreads, 2)
    group_norm_silu_bwd_blocked_planes_kernel(GroupNormSilu p,
                                              const T* dy,  // (N, C, S), like p.x
                                              const T* dy2, T* dx, T* dx2,
                                              const float* mean,  // (N, G), like rstd
                                              const float* rstd,
                                              float* pieces,     // (3, N, C, s_parts)
                                              float* workspace,  // (3, N, C)
                                              PlaneTile tile, Waves waves) {
  run_waves(
      p, waves, p.C / p.G,
      [&](Stage stage, int i) {
        bwd_planes<T, WHOLE, K, kBlockedThreads, true>(p, dy, dy2, dx, dx2, mean, rstd, pieces,
                                                       workspace, tile, 1, stage, i);
      },
      [&](int64_t item) { merge_channel(p, pieces, workspace, item, tile.s_parts); });
}

template <typename T, int VEC>
__global__ void __launch_bounds__(slab_threads(VEC), 2)
    group_norm_silu_bwd_blocked_slabs_kernel(GroupNormSilu p,
                                             const T* dy,  // (N, S, C), like p.x
                                             const T* dy2, T* dx, T* dx2,
                                             const float* mean,  // (N, G), like rstd
                                             const float* rstd,
                                             float* pieces,     // (3, N, C, s_parts)
                                             float* workspace,  // (3, N, C)
                                             SlabTile tile, Waves waves) {
  run_waves(
      p, waves, p.C / p.G,
      [&](Stage stage, int i) {
        bwd_slabs<T, VEC, K, true>(p, dy, dy2, dx, dx2, mean, rstd, pieces, workspace, tile, stage,
                                   i);
      },
      [&](int64_t item) { merge_channel(p, pieces, workspace, item, tile.s_parts); });
}

template <typename T, bool WHOLE>
bool launch_blocked_planes(const GroupNormSilu& p, const T* dy, const T* dy2, T* dx, T* dx2,
                           const float* mean, const float* rstd, float* workspace,
                           const Allocate& allocate, void* stream) {
  PlaneTile tile;
  if (choose_plane_tile(p, kVector<T>, K, WHOLE, &tile, kBlockedThreads)) return false;
  if (tile.threads_y > 1) return false;
  auto* kernel = group_norm_silu_bwd_blocked_planes_kernel<T, WHOLE>;
  const int64_t bytes = 2 * p.C / p.G * p.S * sizeof(T);
  const auto limits = limits_of(kernel, tile.threads_x, 0);
  Waves waves;
  if (!choose_waves({p.N, p.G, 1, tile.c_parts * tile.s_parts, bytes}, limits, &waves))
    return false;
  float* pieces = allocate(3 * p.N * p.C * tile.s_parts);
  launch_cooperative(kernel, kOp, waves.blocks, tile.threads_x, 0, stream, p, dy, dy2, dx, dx2,
                     mean, rstd, pieces, workspace, tile, waves);
  return true;
}

template <typename T, int VEC>
bool launch_blocked_slabs(const GroupNormSilu& p, const T* dy, const T* dy2, T* dx, T* dx2,
                          const float* mean, const float* rstd, float* workspace,
                          const Allocate& allocate, void* stream) {
  auto* kernel = group_norm_silu_bwd_blocked_slabs_kernel<T, VEC>;
  for (const int row_bytes : {128, 64}) {
    SlabTile tile;
    if (choose_slab_tile(p, sizeof(T), VEC, K, &tile, slab_threads(VEC), row_bytes)) return false;
    const size_t shared = bwd_slabs_shared(tile);
    const auto limits = limits_of(kernel, tile.threads, shared);
    Waves waves;
    if (!choose_waves(slab_bundles(p, tile, 2 * sizeof(T)), limits, &waves)) continue;
    float* pieces = allocate(3 * p.N * p.C * tile.s_parts);
    launch_cooperative(kernel, kOp, waves.blocks, tile.threads, shared, stream, p, dy, dy2, dx, dx2,
                       mean, rstd, pieces, workspace, tile, waves);
    return true;
  }
  return false;
}

}  // namespace

bool group_norm_silu_bwd_blocked_dx(const GroupNormSilu& p, const void* dy, const void* dy2,
                                    void* dx, void* dx2, const float* mean, const float* rstd,
                                    float* workspace, const Allocate& allocate, void* stream) {
  bool served = false;
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    bool aligned = true;
    for (const void* each : {p.x, p.x2, dy, dy2, (const void*)dx, (const void*)dx2})
      aligned &= aligned16(each);
    const auto run = [&](auto* launch) {
      served = launch(p, static_cast<const T*>(dy), static_cast<const T*>(dy2), static_cast<T*>(dx),
                      static_cast<T*>(dx2), mean, rstd, workspace, allocate, stream);
    };
    if (p.channels_last)
      run(aligned && slab_vectors(p, kVector<T>) ? launch_blocked_slabs<T, kVector<T>>
                                                 : launch_blocked_slabs<T, 1>);
    else
      run(aligned && p.S % kVector<T> == 0 ? launch_blocked_planes<T, true>
                                           : launch_blocked_planes<T, false>);
  });
  return served;
}

}  // namespace engine

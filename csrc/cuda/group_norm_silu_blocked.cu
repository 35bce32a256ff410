// group_norm_silu, forward, of groups larger than a block: one cooperative launch whose second
// read of x comes from L2.  Equations: group_norm_silu.cu; arithmetic: group_norm_silu_planes.h
// and group_norm_silu_slabs.h, shared with it.
//
// UNPROVEN: no GPU has run this kernel yet; the emulation runs it with all of its barriers. Nothing
// takes it but its own op, engine::group_norm_silu_fwd_blocked, until a GPU's name stands in
// BLOCKED of kernels/native.py.
//
// Grid: at most as many blocks as run at once. x is cut into waves of whole groups that stay in L2
// (group_norm_silu_waves.h). In a turn all blocks sum pieces of a wave, a warp each merges groups
// of the wave before it, and each block applies the pieces that it summed two turns ago; there is
// one barrier of the grid in a turn (group_norm_silu_cooperative.h). Saved: mean, rstd (N, G).
// (count, mean, M2) of a piece has one writer, a merge a fixed order: the same bits on every run.
// Bytes per element: x read once, y written once: 4 in bf16, 8 in float32, if the second read hits
// (group_norm_silu.cu: 6, 12). Refuses: groups that one block of group_norm_silu.cu holds; groups
// (of channels_last: slabs of 64 bytes of channels) over a sixth of the L2.
#include "group_norm_silu_cooperative.h"
#include "group_norm_silu_slabs.h"

namespace engine {
namespace {

constexpr int K = 8;  // vectors per thread

template <typename T, bool WHOLE>
__global__ void __launch_bounds__(kBlockedThreads, 2)
    group_norm_silu_fwd_blocked_planes_kernel(GroupNormSilu p,
                                              T* y,         // (N, C, S), like p.x
                                              float* mean,  // (N, G), like rstd
                                              float* rstd,
                                              float* partials,  // (N * G, parts, 3)
                                              PlaneTile tile, Waves waves) {
  run_waves(
      p, waves, 1,
      [&](Stage stage, int i) {
        fwd_planes<T, WHOLE, K, true>(p, y, mean, rstd, partials, tile, stage, i);
      },
      [&](int64_t row) {
        merge_row(partials, mean, rstd, row, tile.c_parts * tile.s_parts, p.eps);
      });
}

template <typename T, int VEC>
__global__ void __launch_bounds__(kBlockedThreads, 2)
    group_norm_silu_fwd_blocked_slabs_kernel(GroupNormSilu p,
                                             T* y,         // (N, S, C), like p.x
                                             float* mean,  // (N, G), like rstd
                                             float* rstd,
                                             float* partials,  // (N * G, parts, 3)
                                             SlabTile tile, Waves waves) {
  run_waves(
      p, waves, 1,
      [&](Stage stage, int i) {
        fwd_slabs<T, VEC, K, true>(p, y, mean, rstd, partials, tile, stage, i);
      },
      [&](int64_t row) { merge_row(partials, mean, rstd, row, tile.parts * tile.s_parts, p.eps); });
}

template <typename T, bool WHOLE>
bool launch_blocked_planes(const GroupNormSilu& p, T* y, float* mean, float* rstd,
                           const Allocate& allocate, void* stream) {
  PlaneTile tile;
  if (choose_plane_tile(p, kVector<T>, K, WHOLE, &tile, kBlockedThreads)) return false;
  if (tile.threads_y > 1) return false;
  auto* kernel = group_norm_silu_fwd_blocked_planes_kernel<T, WHOLE>;
  const int64_t parts = tile.c_parts * tile.s_parts, bytes = p.C / p.G * p.S * sizeof(T);
  const auto limits = limits_of(kernel, tile.threads_x, 0);
  Waves waves;
  if (!choose_waves({p.N, p.G, 1, parts, bytes}, limits, &waves)) return false;
  float* partials = allocate(3 * p.N * p.G * parts);
  launch_cooperative(kernel, "group_norm_silu", waves.blocks, tile.threads_x, 0, stream, p, y, mean,
                     rstd, partials, tile, waves);
  return true;
}

template <typename T, int VEC>
bool launch_blocked_slabs(const GroupNormSilu& p, T* y, float* mean, float* rstd,
                          const Allocate& allocate, void* stream) {
  auto* kernel = group_norm_silu_fwd_blocked_slabs_kernel<T, VEC>;
  for (const int row_bytes : {128, 64}) {  // the sectors of half a line are still read whole
    SlabTile tile;
    if (choose_slab_tile(p, sizeof(T), VEC, K, &tile, kBlockedThreads, row_bytes)) return false;
    const size_t shared = fwd_slabs_shared(tile);
    const auto limits = limits_of(kernel, tile.threads, shared);
    const int64_t parts = tile.parts * tile.s_parts;
    Waves waves;
    if (!choose_waves(slab_bundles(p, tile, sizeof(T)), limits, &waves)) continue;
    float* partials = allocate(3 * p.N * p.G * parts);
    launch_cooperative(kernel, "group_norm_silu", waves.blocks, tile.threads, shared, stream, p, y,
                       mean, rstd, partials, tile, waves);
    return true;
  }
  return false;
}

}  // namespace

bool group_norm_silu_fwd_blocked_cuda(const GroupNormSilu& p, void* y, float* mean, float* rstd,
                                      const Allocate& allocate, void* stream) {
  bool served = false;
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out = static_cast<T*>(y);
    const bool aligned = aligned16(p.x) && aligned16(p.x2) && aligned16(y);
    if (p.channels_last) {
      auto* launch = aligned && slab_vectors(p, kVector<T>) ? launch_blocked_slabs<T, kVector<T>>
                                                            : launch_blocked_slabs<T, 1>;
      served = launch(p, out, mean, rstd, allocate, stream);
    } else {
      auto* launch = aligned && p.S % kVector<T> == 0 ? launch_blocked_planes<T, true>
                                                      : launch_blocked_planes<T, false>;
      served = launch(p, out, mean, rstd, allocate, stream);
    }
  });
  return served;
}

}  // namespace engine

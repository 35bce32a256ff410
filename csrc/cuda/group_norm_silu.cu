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
#include "group_norm_silu_slabs.h"

namespace engine {
namespace {

constexpr int K = 8;  // vectors per thread

template <typename T, bool WHOLE>
__global__ void __launch_bounds__(kMaxThreads)
    group_norm_silu_fwd_planes_kernel(GroupNormSilu p,
                                      T* y,         // (N, C, S), like p.x
                                      float* mean,  // (N, G), like rstd
                                      float* rstd, float* partials, PlaneTile tile, Stage stage) {
  fwd_planes<T, WHOLE, K>(p, y, mean, rstd, partials, tile, stage, block_of(stage));
}

template <typename T, int VEC>
__global__ void __launch_bounds__(kSlabThreads)
    group_norm_silu_fwd_slabs_kernel(GroupNormSilu p,
                                     T* y,         // (N, S, C), like p.x
                                     float* mean,  // (N, G), like rstd
                                     float* rstd, float* partials, SlabTile tile, Stage stage) {
  fwd_slabs<T, VEC, K>(p, y, mean, rstd, partials, tile, stage, block_of(stage));
}

// One warp per group merges its pieces.
__global__ void __launch_bounds__(128)
    group_norm_silu_merge_kernel(const float* partials,     // (rows, parts, 3): count, mean, M2
                                 float* mean, float* rstd,  // (rows,)
                                 int64_t rows, int64_t parts, float eps) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  if (row < rows) merge_row(partials, mean, rstd, row, parts, eps);
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
  run_stages(p, resident, tile.parts * tile.s_parts, y, sizeof(T), mean, rstd, stream,
             [&](Stage stage, float* partials) {
               auto* kernel = group_norm_silu_fwd_slabs_kernel<T, VEC>;
               ENGINE_LAUNCH(kernel, blocks(tile.units, "group_norm_silu"), tile.threads,
                             fwd_slabs_shared(tile), stream, p, y, mean, rstd, partials, tile,
                             stage);
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

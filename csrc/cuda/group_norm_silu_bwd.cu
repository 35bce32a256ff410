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

template <typename T, bool WHOLE>
__global__ void __launch_bounds__(kMaxThreads)
    group_norm_silu_bwd_planes_kernel(GroupNormSilu p,
                                      const T* dy,  // (N, C, S), like p.x
                                      const T* dy2, T* dx, T* dx2,
                                      const float* mean,                    // (N, G), like rstd
                                      const float* rstd, float* workspace,  // (3, N, C)
                                      PlaneTile tile, int64_t pieces, Stage stage) {
  bwd_planes<T, WHOLE, K, kMaxThreads>(p, dy, dy2, dx, dx2, mean, rstd, workspace, workspace, tile,
                                       pieces, stage, block_of(stage));
}

// sums: the workspace (3, N, C), or in pieces (s_parts, 3, N, C).
template <typename T, int VEC>
__global__ void __launch_bounds__(kSlabThreads, sizeof(T) * VEC == 4 ? 1 : 0)  // else it spills
    group_norm_silu_bwd_slabs_kernel(GroupNormSilu p,
                                     const T* dy,  // (N, S, C), like p.x
                                     const T* dy2, T* dx, T* dx2,
                                     const float* mean,  // (N, G), like rstd
                                     const float* rstd, float* sums, SlabTile tile, Stage stage) {
  bwd_slabs<T, VEC, K>(p, dy, dy2, dx, dx2, mean, rstd, sums, sums, tile, stage, block_of(stage));
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
  const size_t shared = bwd_slabs_shared(tile);
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

namespace {

// blocked: if given, dx by the cooperative kernel or not at all; → whether that served.
bool run_bwd(const GroupNormSilu& p, const void* dy, bool dy_channels_last, const float* mean,
             const float* rstd, float* workspace, const GroupNormSiluGrads& grads,
             const Allocate* blocked, void* stream) {
  bool served = true;
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
    if (blocked) {
      served = group_norm_silu_bwd_blocked_dx(p, d, d2, dx, dx2, mean, rstd, workspace, *blocked,
                                              stream);
      return;
    }
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
  if (!served) return false;
  const int64_t group_blocks = grads.dadd || grads.dscale || grads.dshift ? (p.N * p.G + 7) / 8 : 0;
  const int64_t channel_blocks = grads.dweight || grads.dbias ? (p.C + 31) / 32 : 0;
  if (group_blocks + channel_blocks == 0) return true;
  ENGINE_LAUNCH(group_norm_silu_bwd_operands_kernel, blocks(group_blocks + channel_blocks, kOp),
                256, 0, stream, p, rstd, workspace, grads, group_blocks);
  check_launch(kOp);
  return true;
}

}  // namespace

void group_norm_silu_bwd_cuda(const GroupNormSilu& p, const void* dy, bool dy_channels_last,
                              const float* mean, const float* rstd, float* workspace,
                              const GroupNormSiluGrads& grads, void* stream) {
  run_bwd(p, dy, dy_channels_last, mean, rstd, workspace, grads, nullptr, stream);
}

bool group_norm_silu_bwd_blocked_cuda(const GroupNormSilu& p, const void* dy, bool dy_channels_last,
                                      const float* mean, const float* rstd, float* workspace,
                                      const GroupNormSiluGrads& grads, const Allocate& allocate,
                                      void* stream) {
  return run_bwd(p, dy, dy_channels_last, mean, rstd, workspace, grads, &allocate, stream);
}

}  // namespace engine

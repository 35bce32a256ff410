// group_norm_silu, forward, contiguous: groups that a thread-block cluster holds (sm_90 and newer).
//   Equations: group_norm_silu.cu; arithmetic: group_norm_silu_planes.h, shared with it.
//
// UNPROVEN: no GPU has run this kernel yet, and the emulation has no clusters. It is compiled and
// its instructions are looked at (tests/test_cuda_compile.py). Nothing takes it but its own op,
// engine::group_norm_silu_fwd_cluster, until a GPU's name stands in CLUSTERS of kernels/native.py.
//
// Grid: a cluster of 2 to 8 blocks per group (n, g), 48 KB of it in each block's registers. A block
// has the statistics of its piece; the blocks read each other's from distributed shared memory,
// each merges all of them in the same order, and applies. One launch, the same bits on every run.
// Bytes per element: x read once, y written once: 4 in bf16, 8 in float32 (group_norm_silu.cu reads
// such groups twice: 6, 12). Refuses: channels_last; planes that are not whole, aligned vectors;
// groups that fit one block or do not fit eight.
#include "group_norm_silu_planes.h"

#ifndef ENGINE_CUDA_ON_CPU
#include <cooperative_groups.h>

namespace engine {
namespace {

constexpr int K = 8;                  // vectors per thread
constexpr int kClusterThreads = 384;  // of a block: two of them share a processor
constexpr int kMaxBlocks = 8;         // of a cluster: what every sm_90 can place

template <typename T>
__global__ void __launch_bounds__(kClusterThreads, 2)
    group_norm_silu_fwd_cluster_kernel(GroupNormSilu p,
                                       T* y,         // (N, C, S), like p.x
                                       float* mean,  // (N, G), like rstd
                                       float* rstd, PlaneTile tile) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto cluster = cooperative_groups::this_cluster();
  ENGINE_SHARED(float, sums, [4][32]);
  ENGINE_SHARED(Piece, mine, [1]);
  const PlanePlace at(p, tile, blockIdx.x);
  const Half<const T> half = half_of_x<T>(p, at.c);
  const T* x = half.data + (at.n * half.C + half.c) * p.S;
  PlaneVectors<T, true> vectors(x, p.S, at, tile, K);
  Channel channel = {0.0f, 0.0f, 0.0f};
  if (at.active) channel = load_channel(p, at.n, at.c);
  Slot<T, kVector<T>> slots[K];
#pragma unroll
  for (int k = 0; k < K; ++k) slots[k] = vectors.load(x, k);

  const float count = unit_sum(static_cast<float>(vectors.count(K)), sums[0]);
  const float some = count > 0.0f ? count : 1.0f;
  const float m = unit_sum(piece_sum(slots, vectors, channel.add), sums[1]) / some;
  forget(slots);
  forget(vectors.step);
  const float2 d = centred_sums(slots, vectors, channel.add, m);
  const float d_sum = unit_sum(d.x, sums[2]), d_squares = unit_sum(d.y, sums[3]);
  const float rest = d_sum / some;
  if (threadIdx.x == 0) mine[0] = {count, m + rest, fmaxf(d_squares - d_sum * rest, 0.0f)};
  cluster.sync();
  const Piece all = merge_pieces(tile.c_parts * tile.s_parts, [&](int64_t i) {
    return *cluster.map_shared_rank(&mine[0], static_cast<unsigned>(i));
  });
  // No block may end while another one still reads its piece.
  auto done = cluster.barrier_arrive();

  const float r = 1.0f / sqrtf(all.m2 / all.count + p.eps);
  if (threadIdx.x == 0 && at.part == 0) mean[at.row] = all.mean, rstd[at.row] = r;
  forget(slots);
  forget(vectors.step);
  channel.beta -= (all.mean - m) * channel.gamma * r;
  channel.gamma *= r;
  apply_planes<false>(slots, vectors, channel, m, p.silu, y + (at.n * p.C + at.c) * p.S);
  cluster.barrier_wait(static_cast<decltype(done)&&>(done));
#elif defined(__CUDA_ARCH__)
  __trap();  // code for older chips, run on a newer one: never a result of nothing
#endif
}

// As many blocks as hold a group, of as even size as may be; false where that is one or too many.
bool choose_cluster_tile(const GroupNormSilu& p, int vec, PlaneTile* tile) {
  if (choose_plane_tile(p, vec, K, true, tile)) return false;
  const int64_t group = p.C / p.G, vectors = p.S / vec;
  const int64_t needed = (vectors + K - 1) / K, most = kClusterThreads;
  const int64_t s_parts = (needed + most - 1) / most;
  int64_t lanes = 1;
  while (lanes < needed && lanes < 32) lanes *= 2;
  if (needed > 32) lanes = ((needed + s_parts - 1) / s_parts + 31) / 32 * 32;
  const int64_t channels = s_parts > 1 ? 1 : most / lanes;
  const int64_t c_parts = (group + channels - 1) / channels;
  const int64_t blocks = c_parts * s_parts;
  if (blocks < 2 || blocks > kMaxBlocks) return false;
  tile->s_parts = s_parts;
  tile->c_parts = static_cast<int>(c_parts);
  tile->channels = static_cast<int>((group + c_parts - 1) / c_parts);
  tile->lanes = static_cast<int>(lanes);
  tile->units = p.N * p.G * blocks;
  tile->threads_x = static_cast<int>((tile->channels * lanes + 31) / 32 * 32);
  tile->threads_y = 1;
  return true;
}

template <typename T>
bool launch_fwd_cluster(const GroupNormSilu& p, T* y, float* mean, float* rstd, void* stream) {
  PlaneTile tile;
  if (!choose_cluster_tile(p, kVector<T>, &tile)) return false;
  auto* kernel = group_norm_silu_fwd_cluster_kernel<T>;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(tile.c_parts * tile.s_parts);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks(tile.units, "group_norm_silu");
  config.blockDim = tile.block();
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaFuncAttributes built = {};  // for what the driver runs here: the device alone does not tell
  int clusters = 0;               // that the device can run at once
  if (cudaFuncGetAttributes(&built, kernel) != cudaSuccess || built.ptxVersion < 90) {
    cudaGetLastError();
    return false;
  }
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess || clusters < 1) {
    cudaGetLastError();  // older than sm_90: not an error of the next launch
    return false;
  }
  cudaLaunchKernelEx(&config, kernel, p, y, mean, rstd, tile);
  check_launch("group_norm_silu");
  return true;
}

}  // namespace

bool group_norm_silu_fwd_cluster_cuda(const GroupNormSilu& p, void* y, float* mean, float* rstd,
                                      void* stream) {
  bool served = false;
  if (p.channels_last) return served;
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out = static_cast<T*>(y);
    const bool aligned = aligned16(p.x) && aligned16(p.x2) && aligned16(y);
    if (aligned && p.S % kVector<T> == 0)
      served = launch_fwd_cluster<T>(p, out, mean, rstd, stream);
  });
  return served;
}

}  // namespace engine
#endif

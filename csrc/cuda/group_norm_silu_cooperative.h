// What the cooperative kernels of group_norm_silu share: the order of their turns and the launch.
#pragma once

#include "group_norm_silu.h"
#include "group_norm_silu_waves.h"
#include "launch.h"

#ifndef ENGINE_CUDA_ON_CPU
#include <cooperative_groups.h>
#endif

namespace engine {
namespace {

constexpr int kBlockedThreads = 256;  // of a block: two of them share a processor

// The first group (n * G + g) of a wave.
__device__ __forceinline__ int64_t first_row(const GroupNormSilu& p, const Waves& waves, int wave) {
  const int64_t bundle = wave * waves.bundles, n = bundle / waves.per_sample;
  if (n >= p.N) return p.N * p.G;
  return n * p.G + bundle % waves.per_sample * waves.groups;
}

// Runs piece(stage, i) for all pieces and merge(j) for the `merges` parts j of every group
// j / merges, by a warp each. In turn t a block sums wave t, merges its share of wave t - 1 and
// applies wave t - 2. The barrier of the grid stands before the merge: passing it, a block knows
// that all have summed wave t - 1 and merged wave t - 2. It arrived there a turn earlier, so that
// it seldom waits.
template <typename Pieces, typename Merge>
__device__ __forceinline__ void run_waves(const GroupNormSilu& p, const Waves& waves,
                                          int64_t merges, Pieces&& piece, Merge&& merge) {
  const auto grid = cooperative_groups::this_grid();
  auto token = decltype(grid.barrier_arrive())();
  const int blocks = gridDim.x;
  for (int turn = 0; turn < waves.count + 2; ++turn) {
    for (int apply = 0; apply < 2; ++apply) {
      if (apply && turn > 0) {
        grid.barrier_wait(static_cast<decltype(token)&&>(token));
        const int64_t end = first_row(p, waves, turn) * merges;
        int64_t j = first_row(p, waves, turn - 1) * merges + blockIdx.x;
        j += blocks * (threadIdx.x / 32);
        for (; j < end; j += blocks * (blockDim.x / 32)) merge(j);
      }
      if (apply && turn <= waves.count) token = grid.barrier_arrive();
      const int wave = apply ? turn - 2 : turn;
      if (wave < 0 || wave >= waves.count) continue;
      const int first = wave * waves.length;
      const int last = wave + 1 < waves.count ? first + waves.length : waves.pieces;
      for (int i = first + blockIdx.x; i < last; i += blocks) {
        piece(apply ? Stage::apply : Stage::stats, i);
        __syncthreads();  // the next piece writes to the same shared memory
      }
    }
  }
}

// Of a wide group all parts are a bundle; else a slab is, in which groups are whole.
inline Bundles slab_bundles(const GroupNormSilu& p, const SlabTile& tile, int64_t element_size) {
  const int64_t group = p.C / p.G, width = tile.parts > 1 ? group : tile.width;
  return {p.N, tile.slabs / tile.parts, width / group, tile.parts * tile.s_parts,
          width * p.S * element_size};
}

template <typename Kernel>
CooperativeLimits limits_of(Kernel* kernel, int threads, size_t shared) {
  int device = 0, cooperative = 0, l2 = 0, processors = 0, each = 0;
  const auto read = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, device) == cudaSuccess;
  };
  const bool known =
      cudaGetDevice(&device) == cudaSuccess && read(&cooperative, cudaDevAttrCooperativeLaunch) &&
      read(&l2, cudaDevAttrL2CacheSize) && read(&processors, cudaDevAttrMultiProcessorCount) &&
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared) == cudaSuccess;
  if (!known) cudaGetLastError();  // not an error of the next launch
  if (!known || !cooperative) return {};
  return {l2, static_cast<int64_t>(each) * processors};
}

template <typename... Params, typename... Args>
void launch_cooperative(void (*kernel)(Params...), const char* op, int64_t grid, int threads,
                        size_t shared, void* stream, Args&&... args) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks(grid, op);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  cudaLaunchKernelEx(&config, kernel, static_cast<Args&&>(args)...);
  check_launch(op);
}

}  // namespace
}  // namespace engine

// 3x3 convolution of stride 1 in float32 on the CPU, gradients of its weights and bias by Winograd
// (forward, and the gradient of x, which is such a convolution: conv2d_winograd.cpp).
//
// With the forward's y = A^T [(G w G^T) * (B^T d B)] A of each 2x2 pixels of y:
//   dw = G^T [sum over tiles of (A dy A^T) * (B^T d B)] G,  db = sum of dy
// 16 products a tile and pair of channels where the sum itself has 36. Entry (1, 1) of A dy A^T is
// the sum of a tile's pixels: db falls out of it.
//
// Unit: one row of the 4x4 entries for 32 channels of y, over all tiles; a thread takes its units
// together, as many as the caches hold sums for. Per block of tiles: the rows of B^T d B and of
// A dy A^T that it needs go to scratch, in L2, and their product (K, tiles) x (tiles, C), summed in
// registers, is added to the workspace: entries (K, C). Then dw = G^T . G.
// Parallel: over units, not over tiles: a sum has one writer and one order, whatever the threads.
// Error: sums of at most 96 terms are summed, so that rounding grows with the larger of 96 and
// tiles / 96, not with the number of tiles.
// Bound: the products, 32 flop per pair of channels and tile, at 2 vectors of FMA a cycle; x and dy
// are read once per row of entries (mostly from L2 after the first), the workspace once a block.
#include "conv2d_winograd_bwd.h"

#include "isa.h"
#define ENGINE_KERNELS "conv2d_winograd_bwd_loops.h"
#include "foreach_isa.h"

namespace engine {
namespace {

constexpr int64_t kSums = 1 << 18;  // floats of sums that a thread adds to at a time: 1 MB of L2

}  // namespace

void conv2d_winograd_bwd_weight_cpu(const Conv2dWinogradGrads& p, float* workspace,
                                    const ParallelFor& parallel_for) {
  const WinogradGradLoops& loops = ENGINE_PICK(winograd_grad_loops)();
  const int64_t tiles = p.N * ((p.H + 1) / 2) * ((p.W + 1) / 2);
  const int64_t blocks = (tiles + kWinogradGradTiles - 1) / kWinogradGradTiles;
  const int64_t block = (tiles + blocks - 1) / blocks;
  const int64_t unit = 4 * kWinogradGradChannels * p.C;  // sums
  const int64_t most = kSums > unit ? kSums / unit : 1;
  const int64_t floats = 4 * winograd_grad_tile_pitch(p.C) + 4 * winograd_grad_tile_pitch(p.K) +
                         (p.C > p.K ? p.C : p.K);
  parallel_for(4 * p.K / kWinogradGradChannels, grain_of(unit * tiles / 8),
               [&](int64_t begin, int64_t end) {
                 float* s = winograd_scratch(floats);
                 for (int64_t i = begin; i < end; i += most) {
                   loops.sums(p, i, i + most < end ? i + most : end, block, workspace, s);
                 }
               });
  parallel_for(p.K, grain_of(16 * p.C),
               [&](int64_t begin, int64_t end) { loops.weights(p, begin, end, workspace); });
}

}  // namespace engine

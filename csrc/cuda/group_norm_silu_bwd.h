// The small launches of the backward of group_norm_silu, and what they share with the large ones
// (group_norm_silu_bwd.cu): the merge of pieces, the gradients of the operands, a transposition.
#pragma once

#include "group_norm_silu_bwd_pieces.h"

namespace engine {

// group_norm_silu_bwd_blocked.cu; dy, dy2 in the layout of x, as bwd_planes has them.
bool group_norm_silu_bwd_blocked_dx(const GroupNormSilu& p, const void* dy, const void* dy2,
                                    void* dx, void* dx2, const float* mean, const float* rstd,
                                    float* workspace, const Allocate& allocate, void* stream);

namespace {

// workspace[i] = sum over pieces, in order.
__global__ void __launch_bounds__(256)
    group_norm_silu_bwd_merge_kernel(const float* pieces,  // (parts, count)
                                     float* workspace, int64_t count, int64_t parts) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= count) return;
  float sum = 0.0f;
  for (int64_t part = 0; part < parts; ++part) sum += pieces[part * count + i];
  workspace[i] = sum;
}

// The first blocks: a warp per group for dadd, dscale, dshift; the rest: 32 channels each for
// dweight, dbias, 8 threads to a channel.
__global__ void __launch_bounds__(256)
    group_norm_silu_bwd_operands_kernel(GroupNormSilu p, const float* rstd,  // (N, G)
                                        const float* workspace,              // (3, N, C)
                                        GroupNormSiluGrads grads, int64_t group_blocks) {
  ENGINE_SHARED(float2, partial, [8][32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t plane = p.N * p.C, group = p.C / p.G;
  if (blockIdx.x < group_blocks) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + warp;
    if (row >= p.N * p.G) return;
    const int64_t n = row / p.G, g = row % p.G;
    const float2 s = grads.dadd ? group_sums(p, workspace, n, g) : make_float2(0.0f, 0.0f);
    for (int64_t c = g * group + lane; c < (g + 1) * group; c += 32) {
      const int64_t i = n * p.C + c;
      const float a = workspace[i], b = workspace[plane + i], x = workspace[2 * plane + i];
      if (grads.dadd) {
        const float share = (s.x + x / static_cast<float>(p.S) * s.y) / static_cast<float>(group);
        grads.dadd[i] = unless_alone(p, rstd[row]) * (load_channel(p, n, c).gamma * a - share);
      }
      if (grads.dscale)
        grads.dscale[i] =
            load_operand(p.weight, n, c, 1.0f) * b + load_operand(p.bias, n, c, 0.0f) * a;
      if (grads.dshift) grads.dshift[i] = a;
    }
    return;
  }
  const int64_t c = (blockIdx.x - group_blocks) * 32 + lane;
  float2 sum = make_float2(0.0f, 0.0f);
  if (c < p.C)
    for (int64_t n = warp; n < p.N; n += 8) {
      const float scale = 1.0f + load_operand(p.scale, n, c, 0.0f);
      sum.x += scale * workspace[plane + n * p.C + c];
      sum.y += scale * workspace[n * p.C + c];
    }
  partial[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || c >= p.C) return;
  for (int w = 1; w < 8; ++w) sum.x += partial[w][lane].x, sum.y += partial[w][lane].y;
  if (grads.dweight) grads.dweight[c] = sum.x;
  if (grads.dbias) grads.dbias[c] = sum.y;
}

// out[n][b][a] = in[n][a][b], in tiles of 32 x 32; the samples and rows of `in` may lie apart.
template <typename Bits>
__global__ void __launch_bounds__(256)
    transpose_kernel(const Bits* in, Bits* out, int64_t in_sample, int64_t in_row, int64_t a_count,
                     int64_t b_count, int64_t a_tiles, int64_t b_tiles) {
  ENGINE_SHARED(Bits, tile, [32][33]);
  const int64_t block = blockIdx.x, n = block / (a_tiles * b_tiles);
  const int64_t a_first = block / b_tiles % a_tiles * 32, b_first = block % b_tiles * 32;
  const int lane = threadIdx.x % 32;
  in += n * in_sample, out += n * a_count * b_count;
  for (int i = threadIdx.x / 32; i < 32; i += 8)
    if (a_first + i < a_count && b_first + lane < b_count)
      tile[i][lane] = in[(a_first + i) * in_row + b_first + lane];
  __syncthreads();
  for (int i = threadIdx.x / 32; i < 32; i += 8)
    if (b_first + i < b_count && a_first + lane < a_count)
      out[(b_first + i) * a_count + a_first + lane] = tile[lane][i];
}

}  // namespace
}  // namespace engine

// One reverse step on the CPU: x0 = clamp(a x + b m, +-clip), x_next = c x0 + d x + s z, with
// (a, b, c, d, s) = coeffs[step] and z given or drawn in place (noise_simd.h). No backward.
// Parallel: over ranges of elements where all tensors lie in memory alike, else over tiles of
// channels x positions, through buffers in the contiguous order that numbers the noise.
// Bound: with given noise memory, 4 elements; else the noise, about 5 clock cycles per element.
#include "reverse_step.h"

#include "isa.h"
#define ENGINE_KERNELS "reverse_step_loops.h"
#include "foreach_isa.h"

namespace engine {

void reverse_step_fwd_cpu(const ReverseStep& p, void* x_next, const ParallelFor& parallel_for) {
  const int64_t index = *p.step;
  Step step{NAN, NAN, NAN, NAN, 0, p.clip};
  if (index >= 0 && index < p.n_steps) {
    const float* row = p.coeffs + index * 5;
    step = {row[0], row[1], row[2], row[3], row[4], p.clip};
  }
  const ReverseStepLoops& loops = ENGINE_PICK(reverse_step_loops)(p.dtype, p.model_out_dtype);
  const bool noise_last = p.noise ? p.noise_channels_last : false;
  const bool any_noise = step.s != 0;
  const bool alike = p.x_channels_last == p.model_out_channels_last &&
                     (!any_noise || p.x_channels_last == noise_last);
  if (alike) {
    parallel_for(p.N * p.C * p.S, any_noise && !p.noise ? 4096 : 32768,
                 [&](int64_t begin, int64_t end) { loops.range(p, step, x_next, begin, end); });
    return;
  }
  const int64_t c_tiles = (p.C + kTileChannels - 1) / kTileChannels;
  const int64_t s_tiles = (p.S + kTilePositions - 1) / kTilePositions;
  parallel_for(p.N * c_tiles * s_tiles, 4, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / (c_tiles * s_tiles);
      const int64_t c0 = item / s_tiles % c_tiles * kTileChannels;
      const int64_t s0 = item % s_tiles * kTilePositions;
      const int64_t c1 = c0 + kTileChannels < p.C ? c0 + kTileChannels : p.C;
      const int64_t s1 = s0 + kTilePositions < p.S ? s0 + kTilePositions : p.S;
      loops.tile(p, step, x_next, n, c0, c1, s0, s1);
    }
  });
}

}  // namespace engine

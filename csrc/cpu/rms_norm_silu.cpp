// Channel RMS norm, modulation and SiLU in one op on the CPU, forward (backward:
// rms_norm_silu_bwd.cpp).
//
// rstd = sqrt(C) / max(|x|, eps), |x| the 2-norm of a pixel's C channels, summed in float;
// y = act(x * rstd * weight * (1 + scale) + shift).
// Saved: rstd, float32, one number per pixel: 4 / C bytes per element, where making it again would
// read x, 2 or 4 bytes per element. Its sign is free: negative where eps was the larger, and its
// gradient then zero; so the backward needs neither eps nor |x|.
// Contiguous: the norm runs across planes. A strip of a few vectors of positions keeps its sums in
// registers while it walks over all channels, twice; the second time they come from a cache.
// Channels last: a few rows at a time, read from memory once and then from L1.
// Parallel: over pieces of samples; a pixel is one writer's, so threads change no bit.
// Bound: 2 elements of x's dtype per element from memory.
#include "rms_norm_silu.h"

#include "isa.h"
#define ENGINE_KERNELS "rms_norm_silu_loops.h"
#include "foreach_isa.h"

namespace engine {

void rms_norm_silu_fwd_cpu(const RmsNormSilu& p, void* y, float* rstd,
                           const ParallelFor& parallel_for) {
  const RmsNormItems items(p);
  const RmsNormLoops& loops = ENGINE_PICK(rms_norm_loops)(p.dtype);
  parallel_for(items.count(), grain_of(items.piece * p.C), [&](int64_t begin, int64_t end) {
    RmsNormParameters s(p, loops.to_float);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / items.pieces, s0 = items.begin(item), s1 = items.end(item);
      s.load(n, p.silu ? loops.silu_scale : 1.0f);
      const char* from = static_cast<const char*>(p.x) + items.skip(item);
      char* to = static_cast<char*>(y) + items.skip(item);
      float* saved = rstd + n * p.S;
      if (p.channels_last) {
        loops.rows(from, to, saved + s0, s1 - s0, p.C, p.eps, s.gain, s.offset, p.silu);
      } else {
        loops.planes(from, to, saved, s0, s1, p.C, p.S, p.eps, s.gain, s.offset, p.silu);
      }
    }
  });
}

}  // namespace engine

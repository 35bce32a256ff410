// Channel RMS norm, modulation and SiLU on the CPU, backward (forward: rms_norm_silu.cpp).
//
// xhat = x * |rstd|; dv = dy * act'(v); A, B = sums over S of dv, dv * xhat per (n, c);
// dx = |rstd| * (g * dv - xhat * P), g = weight * (1 + scale), P the pixel's mean over C of
// g * dv * xhat, 0 where rstd < 0 (|x| < eps: rstd is a constant there, as in F.normalize);
// dshift = A; dscale = weight * B; dweight = sum over n of (1 + scale) * B.
// C = 1: dx is 0 exactly, or |rstd| * g * dv where rstd < 0.
// dv costs a sigmoid, so the first pass over a few pixels keeps it for the second, in L1 or L2.
// Parallel: as the forward. A piece's A and B have one writer, and are added in a fixed order.
// Bound: 3 elements of x's dtype per element from memory, 4 / C bytes of rstd; in 16-bit types
// arithmetic.
#include <vector>

#include "isa.h"
#include "rms_norm_silu.h"
#include "transpose.h"
#define ENGINE_KERNELS "rms_norm_silu_bwd_loops.h"
#include "foreach_isa.h"

namespace engine {
namespace {

// One buffer per thread, for good: fresh memory would cost a page fault per 4 KB in every call.
float* kept_buffer(int64_t floats) {
  thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < floats) buffer.resize(floats);
  return buffer.data();
}

// dweight, dscale, dshift of the channels [c0, c1) from A and B of all pieces.
void channel_gradients(const RmsNormItems& items, const RmsNormGradLoops& loops, const float* AB,
                       const RmsNormSiluGrads& grads, int64_t c0, int64_t c1) {
  const RmsNormSilu& p = items.p;
  const int64_t count = c1 - c0;
  std::vector<float> weight(count, 1.0f), scale(count, 0.0f);
  std::vector<double> A(count), B(count), dweight(count, 0.0);
  const auto read = [&](const Operand& from, int64_t n, float* to) {
    if (!from.data) return;
    const int64_t skip = (n * from.row_stride + c0) * size_of(from.dtype);
    loops.to_float(to, static_cast<const char*>(from.data) + skip, from.dtype, count);
  };
  read(p.weight, 0, weight.data());
  for (int64_t n = 0; n < p.N; ++n) {
    read(p.scale, n, scale.data());
    for (int64_t c = 0; c < count; ++c) A[c] = B[c] = 0;
    for (int64_t k = n * items.pieces; k < (n + 1) * items.pieces; ++k) {
      const float *a = AB + 2 * k * p.C + c0, *b = a + p.C;
      for (int64_t c = 0; c < count; ++c) A[c] += a[c], B[c] += b[c];
    }
    for (int64_t c = 0; c < count; ++c) {
      const int64_t at = n * p.C + c0 + c;
      dweight[c] += (1.0 + scale[c]) * B[c];
      if (grads.dscale) grads.dscale[at] = static_cast<float>(weight[c] * B[c]);
      if (grads.dshift) grads.dshift[at] = static_cast<float>(A[c]);
    }
  }
  for (int64_t c = 0; grads.dweight && c < count; ++c) {
    grads.dweight[c0 + c] = static_cast<float>(dweight[c]);
  }
}

}  // namespace

void rms_norm_silu_bwd_cpu(const RmsNormSilu& p, const void* dy, bool dy_channels_last,
                           const float* rstd, float* workspace, const RmsNormSiluGrads& grads,
                           const ParallelFor& parallel_for) {
  std::unique_ptr<char[]> copy;
  if (dy_channels_last != p.channels_last) {  // rare: bring dy into the layout of x
    copy = other_layout(dy, dy_channels_last, size_of(p.dtype), p.N, p.C, p.S, parallel_for);
    dy = copy.get();
  }
  const RmsNormItems items(p);
  const RmsNormGradLoops& loops = ENGINE_PICK(rms_norm_grad_loops)(p.dtype);
  const int64_t C = p.C;
  parallel_for(items.count(), grain_of(items.piece * C), [&](int64_t begin, int64_t end) {
    RmsNormParameters s(p, loops.to_float);
    std::vector<double> sums(2 * C);
    float* kept = kept_buffer(p.channels_last ? loops.rows_kept(C) : loops.planes_kept(C));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / items.pieces, s0 = items.begin(item), s1 = items.end(item);
      s.load(n, 1.0f);
      const char* x = static_cast<const char*>(p.x) + items.skip(item);
      const char* dout = static_cast<const char*>(dy) + items.skip(item);
      char* dx = static_cast<char*>(grads.dx) + items.skip(item);
      const float* saved = rstd + n * p.S;
      for (double& sum : sums) sum = 0;
      if (p.channels_last) {
        loops.rows(x, dout, dx, saved + s0, s1 - s0, C, s.gain, s.offset, p.silu, sums.data(),
                   kept);
      } else {
        loops.planes(x, dout, dx, saved, s0, s1, C, p.S, s.gain, s.offset, p.silu, sums.data(),
                     kept);
      }
      float* to = workspace + 2 * item * C;
      for (int64_t c = 0; c < 2 * C; ++c) to[c] = static_cast<float>(sums[c]);
    }
  });
  if (!grads.dweight && !grads.dscale && !grads.dshift) return;
  parallel_for(C, grain_of(2 * items.count()), [&](int64_t begin, int64_t end) {
    channel_gradients(items, loops, workspace, grads, begin, end);
  });
}

}  // namespace engine

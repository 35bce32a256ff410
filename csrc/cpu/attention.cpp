// Attention on the CPU, forward (backward: attention_bwd.cpp).
//
// out = softmax(q k^T * scale) v by online softmax, all in float32: per block of queries and keys
// s = q k^T; m' = max(m, max s); p = exp((s - m') scale); total = total f + sum p;
// o = o f + p v, f = exp((m - m') scale); at the end out = o / total. A negative scale turns q.
// Saved: lse = m scale + ln total, float32, where the backward will follow.
// Queries lie along lanes, two vectors of them: maxima and sums then run down the vectors, and both
// products are a broadcast number of K or V times a vector, kTileRows x 2 sums in registers.
// Parallel: over blocks of queries of all heads; a query is one writer's, so threads change no bit.
// K and V become floats once per head and thread.
// Bound: 2 D / W multiplications and one exponential per score; at D = 8 about half is the
// exponential.
#include "attention.h"

#include "group_norm_silu_units.h"
#include "isa.h"
#define ENGINE_KERNELS "attention_loops.h"
#include "foreach_isa.h"

namespace engine {

void attention_fwd_cpu(const Attention& p, const AttentionView& out, float* lse,
                       const ParallelFor& parallel_for) {
  const AttentionLoops& loops = ENGINE_PICK(attention_loops)(p.dtype);
  const int64_t size = size_of(p.dtype), blocks = (p.S + loops.queries - 1) / loops.queries;
  const int64_t head = p.Sk * p.D + kSlack;
  parallel_for(p.N * p.H * blocks, grain_of(4 * p.Sk * (p.D + 8)), [&](int64_t begin, int64_t end) {
    float* K = reinterpret_cast<float*>(
        attention_scratch((2 * head + loops.scratch(p.D)) * sizeof(float)));
    float *V = K + head, *rest = V + head;
    int64_t held = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t nh = item / blocks, n = nh / p.H, h = nh % p.H;
      if (nh != held) {
        loops.to_float(K, rows_of(p.k, n, h, 0, size), p.Sk, p.D);
        loops.to_float(V, rows_of(p.v, n, h, 0, size), p.Sk, p.D);
        held = nh;
      }
      const int64_t s0 = item % blocks * loops.queries;
      const int64_t rows = p.S - s0 < loops.queries ? p.S - s0 : loops.queries;
      loops.block(rows_of(p.q, n, h, s0, size), rows, K, V, p.Sk, p.D, p.scale,
                  rows_of(out, n, h, s0, size), lse ? lse + nh * p.S + s0 : nullptr, rest);
    }
  });
}

}  // namespace engine

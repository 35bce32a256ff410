// Attention on the CPU, forward (backward: attention_bwd.cpp).
//
// out = softmax(q k^T * scale) v by online softmax, all in float32: per block of queries and keys
// s = q k^T; m' = max(m, max s); p = exp((s - m') scale); total = total f + sum p;
// o = o f + p v, f = exp((m - m') scale); at the end out = o / total. A negative scale turns q.
// Saved: lse = m scale + ln total, float32, where the backward will follow.
// Queries lie along lanes, two vectors of them: maxima and sums then run down the vectors, and both
// products are a broadcast number of K or V times a vector, kTileRows x 2 sums in registers.
// Parallel: over blocks of queries of all heads; a query is one writer's, so threads change no bit.
// 16-bit K and V become floats once per head and thread. The next head's lines are prefetched: its
// rows lie apart.
// Bound: 2 D / W multiplications and one exponential per score; at D = 8 about half is the
// exponential.
#include "attention.h"

#include "attention_amx.h"
#include "group_norm_silu_units.h"
#include "isa.h"
#define ENGINE_KERNELS "attention_loops.h"
#include "foreach_isa.h"

namespace engine {
namespace {

// float32 is read in place by few blocks of queries; many are faster on rows side by side.
template <class Copy>
FloatRows float_rows(const AttentionRows& rows, const Attention& p, Copy copy, float* to) {
  if (p.dtype == DType::f32 && rows.d == 1 && p.S <= 128) {
    return {static_cast<const float*>(rows.data), rows.s};
  }
  copy(to, rows, p.Sk, p.D);
  return {to, p.D};
}

}  // namespace

void attention_fwd_cpu(const Attention& p, const AttentionView& out, float* lse,
                       const ParallelFor& parallel_for) {
  if (p.dtype == DType::bf16 && attention_amx_available()) {
    return attention_fwd_amx(p, out, lse, parallel_for);
  }
  const AttentionLoops& loops = ENGINE_PICK(attention_loops)(p.dtype);
  const int64_t size = size_of(p.dtype), blocks = (p.S + loops.queries - 1) / loops.queries;
  const int64_t head = room(p.Sk * p.D), items = p.N * p.H * blocks;
  parallel_for(items, grain_of(4 * p.Sk * (p.D + 8)), [&](int64_t begin, int64_t end) {
    float* scratch =
        reinterpret_cast<float*>(thread_scratch((2 * head + loops.scratch(p.D)) * sizeof(float)));
    float *K_copy = scratch, *V_copy = K_copy + head, *rest = V_copy + head;
    FloatRows K, V;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t nh = item / blocks, n = nh / p.H, h = nh % p.H, block = item % blocks;
      if (item == begin || block == 0) {
        K = float_rows(rows_of(p.k, n, h, 0, size), p, loops.to_float, K_copy);
        V = float_rows(rows_of(p.v, n, h, 0, size), p, loops.to_float, V_copy);
      }
      const int64_t s0 = block * loops.queries;
      const int64_t rows = p.S - s0 < loops.queries ? p.S - s0 : loops.queries;
      const AttentionRows to = rows_of(out, n, h, s0, size);
      prefetch_rows<true>(to, rows, p.D, size);
      if ((nh + 1) * blocks < end) {  // a share of the next head
        const int64_t n1 = (nh + 1) / p.H, h1 = (nh + 1) % p.H;
        const auto share = [&](const AttentionView& view, int64_t length) {
          const int64_t from = length * block / blocks,
                        count = length * (block + 1) / blocks - from;
          prefetch_rows(rows_of(view, n1, h1, from, size), count, p.D, size);
        };
        share(p.q, p.S), share(p.k, p.Sk), share(p.v, p.Sk);
      }
      loops.block(rows_of(p.q, n, h, s0, size), rows, K, V, p.Sk, p.D, p.scale, to,
                  lse ? lse + nh * p.S + s0 : nullptr, rest);
    }
  });
}

}  // namespace engine

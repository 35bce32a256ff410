// Attention on the CPU, backward (forward: attention.cpp).
//
// p = exp(s scale - lse), s = q k^T; delta = sum over d of dout * out; dp = dout v^T;
// ds = p (dp - delta); dv = p^T dout; dk = scale ds^T q; dq = scale ds k. All in float32.
// Keys lie along lanes, two vectors of them: lse and delta are then one number per vector, and dk,
// dv of a block of keys are sums in registers and L1; dq is added to block by block of keys.
// Parallel: over heads; where they are few, over parts of the keys too, each with a dq of its own,
// added in order. The parts follow from the shape alone, so threads change no bit.
// Read: q, k, v, dout, out, lse. Written: dq, dk, dv, in any layout.
// Bound: 5 D / W multiplications (the last in whole vectors of D) and one exponential per score.
#include <memory>

#include "attention.h"
#include "attention_amx.h"
#include "group_norm_silu_units.h"
#include "isa.h"
#define ENGINE_KERNELS "attention_bwd_loops.h"
#include "foreach_isa.h"

namespace engine {
namespace {

constexpr int64_t kTasks = 32;      // wanted
constexpr int64_t kPartKeys = 128;  // at least, of a part: its dq costs as much as about 1 / 5 key

int64_t parts_of(const Attention& p) {
  const int64_t most = (p.Sk + kPartKeys - 1) / kPartKeys;
  const int64_t wanted = (kTasks + p.N * p.H - 1) / (p.N * p.H);
  return most < wanted ? most : wanted;
}

}  // namespace

void attention_bwd_cpu(const Attention& p, const AttentionGrads& grads,
                       const ParallelFor& parallel_for) {
  if (p.dtype == DType::bf16 && attention_amx_available()) {
    return attention_bwd_amx(p, grads, parallel_for);
  }
  const AttentionGradLoops& loops = ENGINE_PICK(attention_grad_loops)(p.dtype);
  const int64_t size = size_of(p.dtype), parts = parts_of(p), ld = loops.pitch(p.D);
  const int64_t blocks = (p.Sk + loops.keys - 1) / loops.keys;
  const int64_t head = room(p.S * p.D), sums = p.S * ld;
  std::unique_ptr<float[]> partial(parts > 1 ? new float[p.N * p.H * parts * sums] : nullptr);
  const int64_t cost = p.S * (p.Sk / parts + 1) * (p.D + 8) / 4;
  parallel_for(p.N * p.H * parts, grain_of(cost), [&](int64_t begin, int64_t end) {
    const int64_t floats = 2 * head + room(p.S) + sums + loops.scratch(p.D);
    float* Q = reinterpret_cast<float*>(thread_scratch(floats * sizeof(float)));
    float *dO = Q + head, *delta = dO + head, *kept = delta + room(p.S), *rest = kept + sums;
    int64_t held = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t nh = item / parts, part = item % parts, n = nh / p.H, h = nh % p.H;
      if (nh != held) {
        loops.to_float(Q, rows_of(p.q, n, h, 0, size), p.S, p.D);
        loops.to_float(dO, rows_of(grads.dout, n, h, 0, size), p.S, p.D);
        loops.dots(delta, dO, rows_of(grads.out, n, h, 0, size), p.S, p.D);
        held = nh;
      }
      float* dQ = parts > 1 ? partial.get() + item * sums : kept;
      const int64_t from = blocks * part / parts, to = blocks * (part + 1) / parts;
      for (int64_t block = from; block < to; ++block) {
        const int64_t k0 = block * loops.keys;
        const int64_t rows = p.Sk - k0 < loops.keys ? p.Sk - k0 : loops.keys;
        const auto at = [&](const AttentionView& view) { return rows_of(view, n, h, k0, size); };
        loops.block(Q, dO, grads.lse + nh * p.S, delta, p.S, p.D, p.scale, at(p.k), at(p.v), rows,
                    at(grads.dk), at(grads.dv), dQ, block == from, rest);
      }
      if (parts == 1) {
        loops.finish(rows_of(grads.dq, n, h, 0, size), dQ, 1, 0, p.S, p.D, p.scale);
      }
    }
  });
  if (parts == 1) return;
  parallel_for(p.N * p.H * p.S, grain_of(parts * p.D), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t nh = row / p.S, s = row % p.S;
      loops.finish(rows_of(grads.dq, nh / p.H, nh % p.H, s, size),
                   partial.get() + nh * parts * sums + s * ld, parts, sums, 1, p.D, p.scale);
    }
  });
}

}  // namespace engine

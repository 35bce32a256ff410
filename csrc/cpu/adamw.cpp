// AdamW's step on the CPU, all tensors in one pass: clipping, moments, weights, their average (EMA)
// and their copy in bfloat16, which PyTorch makes in five; and before it the sum of the gradients'
// squares, of which the norm and so the clipping follow. kernels.h has the equations.
//
// Parallel: over chunks of 4096 elements, of whatever tensor. Each chunk's squares are summed by
// one thread, in float, and the chunks' sums in order, in double: the same bits from any number of
// threads. A square that overflows makes the sum infinite, a NaN makes it NaN.
// Bits: on x86 those of torch.optim.AdamW(fused=True), after a multiplication of the gradients by
// grad_scale in float32, and of torch.lerp: its operations, in its order, its fma included.
// Refused: float16 gradients, weights in another type than float32.
// Bound: memory, 28 to 38 bytes per element where the average and the copy are there: gradient (2
// or 4), m, v, weight and average read, the last four and the copy (2) written; the sum before it
// reads the gradient. PyTorch's passes move 72 beside the casts of weights and gradients.
#include "adamw.h"

#include <algorithm>
#include <vector>

#include "isa.h"
#define ENGINE_KERNELS "adamw_loops.h"
#include "foreach_isa.h"

namespace engine {
namespace {

constexpr int64_t kChunk = 4096;

struct Chunk {
  int64_t tensor, begin, end;
};

template <class T>
std::vector<Chunk> chunks_of(const T* tensors, int64_t count) {
  std::vector<Chunk> chunks;
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t begin = 0; begin < tensors[k].n; begin += kChunk) {
      chunks.push_back({k, begin, std::min(begin + kChunk, tensors[k].n)});
    }
  }
  return chunks;
}

AdamWFactors factors(const AdamW& p, double step) {
  AdamWFactors f;
  f.grad_scale = p.grad_scale;
  f.keep = static_cast<float>(1 - p.lr * p.weight_decay);
  f.m_weight = static_cast<float>(1 - p.beta1);
  f.beta2 = static_cast<float>(p.beta2);
  f.v_weight = static_cast<float>(1 - p.beta2);
  f.root = static_cast<float>(std::sqrt(1 - std::pow(p.beta2, step)));
  f.eps = static_cast<float>(p.eps);
  f.rate = static_cast<float>(-p.lr / (1 - std::pow(p.beta1, step)));
  f.average_weight = p.average_weight;
  return f;
}

}  // namespace

void adamw_step_cpu(const AdamW& p, const AdamWTensor* tensors, int64_t count,
                    const ParallelFor& parallel_for) {
  const AdamWLoops& loops = ENGINE_PICK(adamw_loops)();
  std::vector<AdamWFactors> all(count);
  for (int64_t k = 0; k < count; ++k) {
    const bool same = k > 0 && tensors[k].step == tensors[k - 1].step;
    all[k] = same ? all[k - 1] : factors(p, tensors[k].step);
  }
  const std::vector<Chunk> chunks = chunks_of(tensors, count);
  parallel_for(chunks.size(), grain_of(4 * kChunk), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Chunk& c = chunks[i];
      loops.step(all[c.tensor], tensors[c.tensor], c.begin, c.end);
    }
  });
}

double grad_squares_cpu(const Gradient* grads, int64_t count, const ParallelFor& parallel_for) {
  const AdamWLoops& loops = ENGINE_PICK(adamw_loops)();
  const std::vector<Chunk> chunks = chunks_of(grads, count);
  std::vector<double> sums(chunks.size());
  parallel_for(chunks.size(), grain_of(kChunk), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Chunk& c = chunks[i];
      sums[i] = loops.squares(grads[c.tensor], c.begin, c.end);
    }
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace engine

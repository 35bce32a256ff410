// The forward process on the CPU: x_t = a x0 + b eps, and the loss between a network's output and
// target = p x0 + q eps, with (a, b, p, q) = coeffs[t[n]] and eps drawn where it is used.
//
// Forward of the loss: loss[n] = weights[n] / M * sum l(model_out - target), and on request its
// gradient, in one pass: here, unlike on a GPU, a second draw costs more than memory. Backward
// without it: dmodel_out = dloss[n] * weights[n] / M * l'(model_out - target), eps drawn again.
// Parallel: over chunks of 2048 elements of a sample in the contiguous order that numbers the
// noise. Chunk sums are added in order: the same bits from any number of threads.
// Bound: arithmetic of the noise, about 5 clock cycles per element with AVX-512; with given noise
// memory, x0 and 4 bytes read, x_t written (the loss: x0, eps and model_out read).
#include "forward_noise.h"

#include "isa.h"
#define ENGINE_KERNELS "forward_noise_loops.h"
#include "foreach_isa.h"

namespace engine {
namespace {

// body(loops, n, begin, end, chunk): chunk counts through all samples.
template <class Body>
void on_chunks(const ForwardNoise& p, const ParallelFor& parallel_for, Body&& body) {
  const ForwardNoiseLoops& loops = ENGINE_PICK(forward_noise_loops)();
  const int64_t M = p.C * p.S, chunks = forward_noise_chunks(p);
  parallel_for(p.N * chunks, grain_of(4 * (M < kForwardNoiseChunk ? M : kForwardNoiseChunk)),
               [&](int64_t i0, int64_t i1) {
                 for (int64_t i = i0; i < i1; ++i) {
                   const int64_t begin = i % chunks * kForwardNoiseChunk,
                                 end = begin + kForwardNoiseChunk < M ? begin + kForwardNoiseChunk
                                                                      : M;
                   body(loops, i / chunks, begin, end, i);
                 }
               });
}

float weight_of(const ForwardNoise& p, const ForwardNoiseLoss& l, int64_t n) {
  return (l.weights ? l.weights[n] : 1.0f) / static_cast<float>(p.C * p.S);
}

}  // namespace

void forward_noise_fwd_cpu(const ForwardNoise& p, void* x_t, DType dtype, bool channels_last,
                           const ParallelFor& parallel_for) {
  on_chunks(p, parallel_for,
            [&](const ForwardNoiseLoops& loops, int64_t n, int64_t begin, int64_t end, int64_t) {
              loops.x_t(p, n, begin, end, x_t, dtype, channels_last);
            });
}

void forward_noise_loss_fwd_cpu(const ForwardNoise& p, const ForwardNoiseLoss& l, double* workspace,
                                float* loss, bool mean, void* grad,
                                const ParallelFor& parallel_for) {
  const int64_t chunks = forward_noise_chunks(p);
  const float share = mean ? 1.0f / static_cast<float>(p.N) : 1.0f;
  on_chunks(p, parallel_for,
            [&](const ForwardNoiseLoops& loops, int64_t n, int64_t begin, int64_t end, int64_t i) {
              workspace[i] = loops.loss(p, l, n, begin, end, share * weight_of(p, l, n), grad);
            });
  double all = 0;
  for (int64_t n = 0; n < p.N; ++n) {
    double total = 0;
    for (int64_t k = 0; k < chunks; ++k) total += workspace[n * chunks + k];
    total *= weight_of(p, l, n);
    if (!mean) loss[n] = static_cast<float>(total);
    all += total;
  }
  if (mean) *loss = static_cast<float>(all / static_cast<double>(p.N));
}

void forward_noise_loss_bwd_cpu(const ForwardNoise& p, const ForwardNoiseLoss& l,
                                const float* dloss, void* dmodel_out,
                                const ParallelFor& parallel_for) {
  on_chunks(p, parallel_for,
            [&](const ForwardNoiseLoops& loops, int64_t n, int64_t begin, int64_t end, int64_t) {
              loops.grad(p, l, n, begin, end, dloss[n] * weight_of(p, l, n), dmodel_out);
            });
}

}  // namespace engine

// forward_noise: x_t = a x0 + b eps; the loss of a network's output against p x0 + q eps.
//
// (a, b, p, q) = coeffs[t[n]]; eps is normal number offset + i of (seed, step, stream 2), drawn in
// place, or given. loss[n] = weights[n] / M * sum l(r), r = model_out - target, M = C * S; backward
// dmodel_out = dloss[n] * weights[n] / M * l'(r) with eps drawn again: nothing is saved.
//
// Grid: one block per chunk of 2048 elements of a sample in the contiguous order that numbers the
// noise, 8 consecutive elements a thread; contiguous tensors by 16-byte accesses where aligned,
// channels_last ones element by element (pictures have 1 to 4 channels, the lines stay in L1). A
// chunk's sum has one writer; a second launch adds a sample's chunks in order: no atomics.
// Bytes per element: x0 read (1 as uint8) and x_t written; the loss reads x0 and model_out, its
// backward also writes dmodel_out. A t outside [0, T) gives NaN. Nothing is refused.
#include "noise.h"

namespace engine {
namespace {

constexpr int kThreads = static_cast<int>(kForwardNoiseChunk) / kPerThread;

struct Coefficients {
  float a, b, p, q;
};
__device__ __forceinline__ Coefficients coefficients(const ForwardNoise& p, int64_t n) {
  const int64_t t = p.t[n];
  if (t < 0 || t >= p.T) {
    const float nan = __uint_as_float(0x7FC00000u);
    return {nan, nan, nan, nan};
  }
  const float* row = p.coeffs + 4 * t;
  return {row[0], row[1], row[2], row[3]};
}

// Where element i of a sample lies.
__device__ __forceinline__ int64_t place(const ForwardNoise& p, bool channels_last, int64_t i) {
  return channels_last ? i % p.S * p.C + i / p.S : i;
}

// Elements first ... first + 7 of sample n; zero beyond its end.
template <typename T>
__device__ __forceinline__ void read8(const ForwardNoise& p, const void* data, bool channels_last,
                                      int64_t n, int64_t first, float* values) {
  const int64_t M = p.C * p.S;
  const T* sample = static_cast<const T*>(data) + n * M;
  if (channels_last && p.C > 1) {
#pragma unroll
    for (int j = 0; j < kPerThread; ++j)
      values[j] = first + j < M ? to_float(sample[place(p, true, first + j)]) : 0.0f;
    return;
  }
  const auto slot = load_slot<T, kPerThread>(sample, first, M);
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) values[j] = slot.get(j);
}

__device__ __forceinline__ void read(const ForwardNoise& p, const void* data, DType dtype,
                                     bool channels_last, int64_t n, int64_t first, float* values) {
  if (dtype == DType::f32) return read8<float>(p, data, channels_last, n, first, values);
  if (dtype == DType::bf16) return read8<bf16>(p, data, channels_last, n, first, values);
  if (dtype == DType::f16) return read8<f16>(p, data, channels_last, n, first, values);
  const int64_t M = p.C * p.S;
  const uint8_t* sample = static_cast<const uint8_t*>(data) + n * M;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j)
    values[j] = first + j < M ? sample[place(p, channels_last, first + j)] / 127.5f - 1.0f : 0.0f;
}

template <typename T>
__device__ __forceinline__ void write(const ForwardNoise& p, T* data, bool channels_last, int64_t n,
                                      int64_t first, const float* values) {
  const int64_t M = p.C * p.S;
  T* sample = data + n * M;
  if (channels_last && p.C > 1) {
#pragma unroll
    for (int j = 0; j < kPerThread; ++j)
      if (first + j < M) sample[place(p, true, first + j)] = from_float<T>(values[j]);
    return;
  }
  Slot<T, kPerThread> slot;
#pragma unroll
  for (int i = 0; i < slot.WORDS; ++i) slot.set(i, values + i * slot.PER_WORD);
  store_slot(slot, sample, first, M);
}

__device__ __forceinline__ void epsilon(const ForwardNoise& p, int64_t n, int64_t first,
                                        float* values) {
  if (p.noise) return read(p, p.noise, DType::f32, p.noise_channels_last, n, first, values);
  numbered_normals(*p.seed, static_cast<uint32_t>(*p.step), philox::kTrainingNoise,
                   p.offset + n * p.C * p.S + first, values);
}

// The block's sample and the thread's first element in it.
struct Where {
  int64_t n, chunk, first;
};
__device__ __forceinline__ Where where(const ForwardNoise& p, int64_t chunks) {
  const int64_t n = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  return {n, chunk, chunk * kForwardNoiseChunk + threadIdx.x * kPerThread};
}

// r <- model_out - target
__device__ __forceinline__ void residuals(const ForwardNoise& p, const ForwardNoiseLoss& l,
                                          const Where& at, float* r) {
  float x[kPerThread], eps[kPerThread];
  const Coefficients row = coefficients(p, at.n);
  read(p, l.model_out, l.dtype, l.channels_last, at.n, at.first, r);
  read(p, p.x0, p.x0_dtype, p.x0_channels_last, at.n, at.first, x);
  epsilon(p, at.n, at.first, eps);
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) r[j] -= row.p * x[j] + row.q * eps[j];
}

__device__ __forceinline__ float scale_of(const ForwardNoise& p, const ForwardNoiseLoss& l,
                                          int64_t n) {
  return (l.weights ? l.weights[n] : 1.0f) / static_cast<float>(p.C * p.S);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    forward_noise_kernel(ForwardNoise p, T* x_t, bool channels_last, int64_t chunks) {
  const Where at = where(p, chunks);
  if (at.first >= p.C * p.S) return;
  float x[kPerThread], eps[kPerThread];
  const Coefficients row = coefficients(p, at.n);
  read(p, p.x0, p.x0_dtype, p.x0_channels_last, at.n, at.first, x);
  epsilon(p, at.n, at.first, eps);
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) x[j] = row.a * x[j] + row.b * eps[j];
  write(p, x_t, channels_last, at.n, at.first, x);
}

__global__ void __launch_bounds__(kThreads)
    forward_noise_loss_kernel(ForwardNoise p, ForwardNoiseLoss l, double* workspace,
                              int64_t chunks) {
  ENGINE_SHARED(double, sums, [kThreads]);
  const Where at = where(p, chunks);
  float r[kPerThread];
  residuals(p, l, at, r);
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const float size = fabsf(r[j]);
    const float value = l.loss == Loss::l1   ? size
                        : l.loss == Loss::l2 ? r[j] * r[j]
                        : size < 1.0f        ? 0.5f * r[j] * r[j]
                                             : size - 0.5f;
    if (at.first + j < p.C * p.S) sum += value;
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
    __syncthreads();
  }
  if (threadIdx.x == 0) workspace[at.n * chunks + at.chunk] = sums[0];
}

__global__ void __launch_bounds__(kThreads)
    forward_noise_loss_sum_kernel(ForwardNoise p, ForwardNoiseLoss l, const double* workspace,
                                  float* loss, int64_t chunks) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= p.N) return;
  double total = 0;
  for (int64_t k = 0; k < chunks; ++k) total += workspace[n * chunks + k];
  loss[n] = static_cast<float>(total * scale_of(p, l, n));
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    forward_noise_grad_kernel(ForwardNoise p, ForwardNoiseLoss l, const float* dloss, T* dmodel_out,
                              int64_t chunks) {
  const Where at = where(p, chunks);
  if (at.first >= p.C * p.S) return;
  const float scale = dloss[at.n] * scale_of(p, l, at.n);
  float r[kPerThread];
  residuals(p, l, at, r);
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    if (l.loss == Loss::l2)
      r[j] += r[j];
    else if (l.loss == Loss::l1)
      r[j] = r[j] > 0.0f ? 1.0f : r[j] < 0.0f ? -1.0f : r[j];
    else
      r[j] = r[j] > 1.0f ? 1.0f : r[j] < -1.0f ? -1.0f : r[j];  // NaN passes
    r[j] *= scale;
  }
  write(p, dmodel_out, l.channels_last, at.n, at.first, r);
}

}  // namespace

void forward_noise_fwd_cuda(const ForwardNoise& p, void* x_t, DType dtype, bool channels_last,
                            void* stream) {
  const int64_t chunks = forward_noise_chunks(p);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    ENGINE_LAUNCH(forward_noise_kernel<T>, blocks(p.N * chunks, "forward_noise"), kThreads, 0,
                  stream, p, static_cast<T*>(x_t), channels_last, chunks);
  });
  check_launch("forward_noise");
}

void forward_noise_loss_fwd_cuda(const ForwardNoise& p, const ForwardNoiseLoss& l,
                                 double* workspace, float* loss, void* stream) {
  const int64_t chunks = forward_noise_chunks(p);
  ENGINE_LAUNCH(forward_noise_loss_kernel, blocks(p.N * chunks, "forward_noise_loss"), kThreads, 0,
                stream, p, l, workspace, chunks);
  ENGINE_LAUNCH(forward_noise_loss_sum_kernel,
                blocks((p.N + kThreads - 1) / kThreads, "forward_noise_loss"), kThreads, 0, stream,
                p, l, static_cast<const double*>(workspace), loss, chunks);
  check_launch("forward_noise_loss");
}

void forward_noise_loss_bwd_cuda(const ForwardNoise& p, const ForwardNoiseLoss& l,
                                 const float* dloss, void* dmodel_out, void* stream) {
  const int64_t chunks = forward_noise_chunks(p);
  with_dtype(l.dtype, [&](auto zero) {
    using T = decltype(zero);
    ENGINE_LAUNCH(forward_noise_grad_kernel<T>, blocks(p.N * chunks, "forward_noise_loss_bwd"),
                  kThreads, 0, stream, p, l, dloss, static_cast<T*>(dmodel_out), chunks);
  });
  check_launch("forward_noise_loss_bwd");
}

}  // namespace engine

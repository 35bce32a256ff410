// reverse_step: x0 = clamp(a x + b m, -clip, clip); x_next = c x0 + d x + s z,
//               (a, b, c, d, s) = coeffs[step], m = model_out.
//
// z is `noise`, or normal number offset + i (csrc/philox.h), i the index in contiguous (N, C, S)
// order whatever the layouts; it is neither drawn nor read where s == 0. NaN passes the clamp. A
// step outside [0, n_steps) gives NaN everywhere. step, coeffs and seed are read from device
// memory, so that a captured launch can be replayed. No backward: sampling needs none.
//
// Grid: all tensors contiguous: one thread per 8 elements, 16-byte accesses where aligned. Some
// channels_last: one thread per quad of normals inside a plane (n, c), channels fastest, so that
// neighbouring threads touch neighbouring elements and every normal of a quad is used.
// Bytes per element: x, model_out (and noise) read once, x_next written once: 6 in bf16, 12 in
// float32. Nothing is saved, nothing refused. Variants: reverse_step_general.cu.
#include "noise.h"

namespace engine {
namespace {

constexpr int kThreads = 256;

struct Row {
  float a, b, c, d, s;
  bool valid;
};

__device__ __forceinline__ Row coefficients(const ReverseStep& p, int64_t step) {
  if (step < 0 || step >= p.n_steps) return {0, 0, 0, 0, 0, false};
  const float* row = p.coeffs + p.columns * step;
  return {row[0], row[1], row[2], row[3], row[4], true};
}

__device__ __forceinline__ float next(const Row& row, float clip, float x, float m, float z) {
  if (!row.valid) return __uint_as_float(0x7FC00000u);
  float x0 = row.a * x + row.b * m;
  x0 = x0 > clip ? clip : x0 < -clip ? -clip : x0;  // comparisons with NaN are false
  return row.c * x0 + row.d * x + row.s * z;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    reverse_step_contiguous_kernel(ReverseStep p, T* x_next, int head) {
  const int64_t count = p.N * p.C * p.S;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t first = thread * kPerThread - head;
  if (first >= count) return;
  const int64_t step = *p.step;
  const Row row = coefficients(p, step);
  const auto x = load_slot<T, kPerThread>(static_cast<const T*>(p.x), first, count);
  float m[kPerThread], z[kPerThread] = {};
  load_floats(p.model_out, p.model_out_dtype, first, count, m);
  if (row.s != 0.0f) {
    if (p.noise) {
      const auto noise = load_slot<T, kPerThread>(static_cast<const T*>(p.noise), first, count);
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) z[j] = noise.get(j);
    } else {
      numbered_normals(*p.seed, static_cast<uint32_t>(step), philox::kStepNoise, p.offset + first,
                       z);
    }
  }
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) m[j] = next(row, p.clip, x.get(j), m[j], z[j]);
  Slot<T, kPerThread> result;
#pragma unroll
  for (int i = 0; i < result.WORDS; ++i) result.set(i, m + i * result.PER_WORD);
  store_slot(result, x_next, first, count);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    reverse_step_channels_last_kernel(ReverseStep p, T* x_next, int64_t quads) {
  // quads: of a plane, ceil(S / 4) + 1, since a plane may begin inside a quad.
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t c = thread % p.C, n = thread / p.C / quads;
  if (n >= p.N) return;
  const int64_t plane = (n * p.C + c) * p.S;  // number of the plane's first element, without offset
  const int64_t quad = ((p.offset + plane) >> 2) + thread / p.C % quads;
  const int64_t s_first = 4 * quad - p.offset - plane;  // -3 ... S + 3
  if (s_first >= p.S) return;
  const int64_t step = *p.step;
  const Row row = coefficients(p, step);
  float z[4] = {};
  if (row.s != 0.0f && !p.noise)
    philox::normal_quad(*p.seed, static_cast<uint32_t>(step), philox::kStepNoise,
                        static_cast<uint64_t>(quad), z);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t s = s_first + j;
    if (s < 0 || s >= p.S) continue;
    const int64_t contiguous = plane + s, last = (n * p.S + s) * p.C + c;
    const int64_t at = p.x_channels_last ? last : contiguous;
    const float x = to_float(static_cast<const T*>(p.x)[at]);
    const float m = load_as_float(p.model_out, p.model_out_dtype,
                                  p.model_out_channels_last ? last : contiguous);
    if (row.s != 0.0f && p.noise)
      z[j] = to_float(static_cast<const T*>(p.noise)[p.noise_channels_last ? last : contiguous]);
    x_next[at] = from_float<T>(next(row, p.clip, x, m, z[j]));
  }
}

}  // namespace

void reverse_step_fwd_cuda(const ReverseStep& p, void* x_next, void* stream) {
  const int64_t count = p.N * p.C * p.S;
  if (count == 0) return;
  const bool contiguous =
      !p.x_channels_last && !p.model_out_channels_last && !(p.noise && p.noise_channels_last);
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (contiguous) {
      const int head = static_cast<int>(reinterpret_cast<uintptr_t>(p.x) % 16 / sizeof(T));
      const int64_t threads = (count + head + kPerThread - 1) / kPerThread;
      ENGINE_LAUNCH(reverse_step_contiguous_kernel<T>,
                    blocks((threads + kThreads - 1) / kThreads, "reverse_step"), kThreads, 0,
                    stream, p, static_cast<T*>(x_next), head);
    } else {
      const int64_t quads = (p.S + 3) / 4 + 1;
      const int64_t threads = p.N * quads * p.C;
      ENGINE_LAUNCH(reverse_step_channels_last_kernel<T>,
                    blocks((threads + kThreads - 1) / kThreads, "reverse_step"), kThreads, 0,
                    stream, p, static_cast<T*>(x_next), quads);
    }
  });
  check_launch("reverse_step");
}

}  // namespace engine

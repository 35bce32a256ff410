// The variants of one reverse step; kernels.h has the equations (ReverseStepGeneral). No backward.
//
// Step: a grid of blocks per sample. Where all operands are planes without gaps, one thread per 8
//   elements, 16-byte accesses where aligned; else one thread per quad of normals inside a plane
//   (n, c), channels fastest, so that neighbouring threads touch neighbouring elements. Which
//   operands there are is the same for all threads: a branch that costs an instruction where the
//   memory costs hundreds, so it is taken at run time; the plain step has kernels of its own.
// Threshold: one block per sample selects the order statistic by radix, 11 + 11 + 9 bits of |x0|,
//   counted in shared memory: integers, so the order of the atomics does not show. x0 is computed
//   again in each of 3 or 4 passes; a sample's operands stay in the L2 cache.
// Bytes per element: each operand read once, each result written once. Nothing saved or refused.
// x_next may be x itself: a thread reads its elements before it writes them.
#include "noise.h"

namespace engine {
namespace {

constexpr int kThreads = 256, kThresholdThreads = 512;

struct Row {
  float a, b, c, d, s, e, g0, g1, lo, hi;
};

__device__ __forceinline__ Row row_of(const ReverseStepGeneral& p, int64_t step) {
  const float nan = __uint_as_float(0x7FC00000u);
  if (step < 0 || step >= p.n_steps) return {nan, nan, nan, nan, 0, 0, 0, 0, 0, 0};
  const float* row = p.coeffs + p.columns * step;
  Row r = {row[0], row[1], row[2], row[3], row[4], 0, 0, 0, 0, 0};
  if (p.columns == 10) r.e = row[5], r.g0 = row[6], r.g1 = row[7], r.lo = row[8], r.hi = row[9];
  return r;
}

// limit, divisor: threshold twice, or clip and 1.
__device__ __forceinline__ float bounded(float x0, float limit, float divisor) {
  x0 = x0 > limit ? limit : x0 < -limit ? -limit : x0;  // comparisons with NaN are false
  return x0 / divisor;
}

__device__ __forceinline__ float log_variance(const Row& row, float v) {
  return 0.5f * (row.hi + row.lo) + 0.5f * (row.hi - row.lo) * v;
}

template <typename T>
__device__ __forceinline__ void store_floats(const float* values, void* data, int64_t first,
                                             int64_t count) {
  Slot<T, kPerThread> slot;
#pragma unroll
  for (int i = 0; i < slot.WORDS; ++i) slot.set(i, values + i * slot.PER_WORD);
  store_slot(slot, static_cast<T*>(data), first, count);
}

// Eight elements of a sample of an operand whose planes have no gaps.
__device__ __forceinline__ void load_planes(const StepOperand& o, int64_t n, int64_t first,
                                            int64_t count, float* values) {
  const int64_t bytes = o.dtype == DType::f32 ? 4 : 2;
  load_floats(static_cast<const char*>(o.data) + n * o.sample * bytes, o.dtype, first, count,
              values);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    reverse_step_general_planes_kernel(ReverseStepGeneral p, int64_t blocks_of_sample) {
  const int64_t count = p.C * p.S, n = blockIdx.x / blocks_of_sample;
  const T* x_sample = static_cast<const T*>(p.x.data) + n * p.x.sample;
  const int head = static_cast<int>(reinterpret_cast<uintptr_t>(x_sample) % 16 / sizeof(T));
  const int64_t thread = blockIdx.x % blocks_of_sample * kThreads + threadIdx.x;
  const int64_t first = thread * kPerThread - head;
  if (first >= count) return;
  const int64_t step = *p.step;
  const Row row = row_of(p, step);
  const auto x = load_slot<T, kPerThread>(x_sample, first, count);
  float x0[kPerThread], other[kPerThread];
#define ENGINE_EACH _Pragma("unroll") for (int j = 0; j < kPerThread; ++j)
  load_planes(p.model_out, n, first, count, x0);
  if (p.uncond.data) {
    load_planes(p.uncond, n, first, count, other);
    ENGINE_EACH x0[j] = other[j] + p.guidance * (x0[j] - other[j]);
  }
  ENGINE_EACH x0[j] = row.a * x.get(j) + row.b * x0[j];
  if (p.grad.data && row.g0 != 0.0f) {
    load_planes(p.grad, n, first, count, other);
    ENGINE_EACH x0[j] += row.g0 * other[j];
  }
  const float limit = p.threshold ? p.threshold[n] : p.clip;
  const float divisor = p.threshold ? limit : 1.0f;
  ENGINE_EACH x0[j] = bounded(x0[j], limit, divisor);
  if (p.x0) store_floats<T>(x0, static_cast<T*>(p.x0) + n * count, first, count);
  ENGINE_EACH x0[j] = row.c * x0[j] + row.d * x.get(j);  // x_next from here on
  if (p.x0_prev.data && row.e != 0.0f) {
    load_planes(p.x0_prev, n, first, count, other);
    ENGINE_EACH x0[j] += row.e * other[j];
  }
  const bool noisy = row.s != 0.0f, pushed = p.grad.data && row.g1 != 0.0f;
  float log_var[kPerThread] = {};
  if (p.v.data && (noisy || pushed)) {
    if (row.lo != row.hi) load_planes(p.v, n, first, count, log_var);
    ENGINE_EACH log_var[j] = log_variance(row, log_var[j]);
  }
  if (pushed) {
    load_planes(p.grad, n, first, count, other);
    ENGINE_EACH x0[j] += row.g1 * (p.v.data ? expf(log_var[j]) : 1.0f) * other[j];
  }
  if (noisy) {
    if (p.noise.data) {
      load_planes(p.noise, n, first, count, other);
    } else {
      numbered_normals(*p.seed, static_cast<uint32_t>(step), philox::kStepNoise,
                       p.offset + n * count + first, other);
    }
    ENGINE_EACH x0[j] += row.s * (p.v.data ? expf(0.5f * log_var[j]) : 1.0f) * other[j];
  }
#undef ENGINE_EACH
  store_floats<T>(x0, static_cast<T*>(p.x_next) + n * count, first, count);
  if (!p.model_in) return;
  if (p.model_in_dtype == DType::f32)
    store_floats<float>(x0, static_cast<float*>(p.model_in) + n * count, first, count);
  else if (p.model_in_dtype == DType::bf16)
    store_floats<bf16>(x0, static_cast<bf16*>(p.model_in) + n * count, first, count);
  else
    store_floats<f16>(x0, static_cast<f16*>(p.model_in) + n * count, first, count);
}

__device__ __forceinline__ float load_at(const StepOperand& o, int64_t n, int64_t c, int64_t s) {
  const int64_t inside = o.channels_last ? s * o.pitch + c : c * o.pitch + s;
  return load_as_float(o.data, o.dtype, n * o.sample + inside);
}

__device__ __forceinline__ float unbounded_x0(const ReverseStepGeneral& p, const Row& row, float x,
                                              int64_t n, int64_t c, int64_t s) {
  float out = load_at(p.model_out, n, c, s);
  if (p.uncond.data) {
    const float uncond = load_at(p.uncond, n, c, s);
    out = uncond + p.guidance * (out - uncond);
  }
  float x0 = row.a * x + row.b * out;
  if (p.grad.data && row.g0 != 0.0f) x0 += row.g0 * load_at(p.grad, n, c, s);
  return x0;
}

// An element of any layouts; z: its normal, unless noise is given.
template <typename T>
__device__ __forceinline__ void step_element(const ReverseStepGeneral& p, const Row& row, int64_t n,
                                             int64_t c, int64_t s, float z) {
  const float x = load_at(p.x, n, c, s);
  float x0 = unbounded_x0(p, row, x, n, c, s);
  const float limit = p.threshold ? p.threshold[n] : p.clip;
  x0 = bounded(x0, limit, p.threshold ? limit : 1.0f);
  const int64_t at = n * p.C * p.S + (p.channels_last ? s * p.C + c : c * p.S + s);
  if (p.x0) static_cast<T*>(p.x0)[at] = from_float<T>(x0);
  float x_next = row.c * x0 + row.d * x;
  if (p.x0_prev.data && row.e != 0.0f) x_next += row.e * load_at(p.x0_prev, n, c, s);
  const bool noisy = row.s != 0.0f, pushed = p.grad.data && row.g1 != 0.0f;
  float log_var = 0.0f;
  if (p.v.data && (noisy || pushed))
    log_var = log_variance(row, row.lo != row.hi ? load_at(p.v, n, c, s) : 0.0f);
  if (pushed) x_next += row.g1 * (p.v.data ? expf(log_var) : 1.0f) * load_at(p.grad, n, c, s);
  if (noisy) {
    if (p.noise.data) z = load_at(p.noise, n, c, s);
    x_next += row.s * (p.v.data ? expf(0.5f * log_var) : 1.0f) * z;
  }
  static_cast<T*>(p.x_next)[at] = from_float<T>(x_next);
  if (!p.model_in) return;
  if (p.model_in_dtype == DType::f32)
    static_cast<float*>(p.model_in)[at] = x_next;
  else if (p.model_in_dtype == DType::bf16)
    static_cast<bf16*>(p.model_in)[at] = from_float<bf16>(x_next);
  else
    static_cast<f16*>(p.model_in)[at] = from_float<f16>(x_next);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    reverse_step_general_quads_kernel(ReverseStepGeneral p, int64_t quads) {
  // quads: of a plane, ceil(S / 4) + 1, since a plane may begin inside a quad.
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t c = thread % p.C, n = thread / p.C / quads;
  if (n >= p.N) return;
  const int64_t plane = (n * p.C + c) * p.S;  // number of the plane's first element, without offset
  const int64_t quad = ((p.offset + plane) >> 2) + thread / p.C % quads;
  const int64_t s_first = 4 * quad - p.offset - plane;  // -3 ... S + 3
  if (s_first >= p.S) return;
  const int64_t step = *p.step;
  const Row row = row_of(p, step);
  float z[4] = {};
  if (row.s != 0.0f && !p.noise.data)
    philox::normal_quad(*p.seed, static_cast<uint32_t>(step), philox::kStepNoise,
                        static_cast<uint64_t>(quad), z);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t s = s_first + j;
    if (s >= 0 && s < p.S) step_element<T>(p, row, n, c, s, z[j]);
  }
}

// The bits of |x0| of element i, in the order in which x lies in memory.
__device__ __forceinline__ uint32_t magnitude_bits(const ReverseStepGeneral& p, const Row& row,
                                                   int64_t n, int64_t i) {
  const int64_t c = p.x.channels_last ? i % p.C : i / p.S;
  const int64_t s = p.x.channels_last ? i / p.C : i % p.S;
  const float x = load_at(p.x, n, c, s);
  return __float_as_uint(unbounded_x0(p, row, x, n, c, s)) & 0x7FFFFFFFu;
}

__global__ void __launch_bounds__(kThresholdThreads)
    reverse_step_threshold_kernel(ReverseStepGeneral p, int rank, float fraction,
                                  float* threshold) {
  constexpr int kBins = 2048, kParts = 32, kPart = kBins / kParts;
  ENGINE_SHARED(int, counts, [kBins]);
  ENGINE_SHARED(int, parts, [kParts]);
  ENGINE_SHARED(int, found, [3]);         // bin, elements below it, elements in it
  ENGINE_SHARED(uint32_t, extreme, [2]);  // 0 if there is a NaN; the least bits above
  const int64_t n = blockIdx.x, count = p.C * p.S;
  const int t = threadIdx.x;
  const Row row = row_of(p, *p.step);
  if (t == 0) extreme[0] = 1, extreme[1] = 0x7F800000u;
  uint32_t prefix = 0;
  int left = rank;  // among the elements that begin with prefix
  for (int level = 0; level < 3; ++level) {
    const int shift = level == 0 ? 20 : level == 1 ? 9 : 0;
    const int width = level == 2 ? 9 : 11;
    for (int i = t; i < kBins; i += kThresholdThreads) counts[i] = 0;
    __syncthreads();
    for (int64_t i = t; i < count; i += kThresholdThreads) {
      const uint32_t bits = magnitude_bits(p, row, n, i);
      if (bits > 0x7F800000u) atomicMin(&extreme[0], 0u);
      if (level == 0 || bits >> (shift + width) == prefix)
        atomicAdd(&counts[bits >> shift & ((1u << width) - 1)], 1);
    }
    __syncthreads();
    if (t < kParts) {
      int sum = 0;  // rotated, so that the threads of the warp use different banks
      for (int i = 0; i < kPart; ++i) sum += counts[t * kPart + (i + t) % kPart];
      parts[t] = sum;
    }
    __syncthreads();
    if (t == 0) {
      int below = 0, part = 0;
      while (below + parts[part] <= left) below += parts[part++];
      int bin = part * kPart;
      while (below + counts[bin] <= left) below += counts[bin++];
      found[0] = bin, found[1] = below, found[2] = counts[bin];
    }
    __syncthreads();
    prefix = prefix << width | static_cast<uint32_t>(found[0]);
    left -= found[1];
  }
  const bool again = left + 1 < found[2];  // the next order statistic is the same number
  if (fraction != 0.0f && !again) {
    for (int64_t i = t; i < count; i += kThresholdThreads) {
      const uint32_t bits = magnitude_bits(p, row, n, i);
      if (bits > prefix) atomicMin(&extreme[1], bits);
    }
  }
  __syncthreads();
  if (t != 0) return;
  const float low = __uint_as_float(prefix), high = __uint_as_float(again ? prefix : extreme[1]);
  const float value = fraction == 0.0f || high == low ? low : low + fraction * (high - low);
  // An infinite bound would turn an overflow into a black picture.
  const bool usable = extreme[0] && value < __uint_as_float(0x7F800000u);
  threshold[n] = !usable ? __uint_as_float(0x7FC00000u) : value < 1.0f ? 1.0f : value;
}

bool planes_without_gaps(const ReverseStepGeneral& p) {
  const StepOperand* all[] = {&p.x, &p.model_out, &p.v, &p.uncond, &p.grad, &p.x0_prev, &p.noise};
  for (const StepOperand* o : all)
    if (o->data && (o->channels_last || o->pitch != p.S)) return false;
  return !p.channels_last;
}

}  // namespace

void reverse_step_general_fwd_cuda(const ReverseStepGeneral& p, void* stream) {
  const int64_t count = p.C * p.S;
  if (p.N * count == 0) return;
  with_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (planes_without_gaps(p)) {
      const int64_t threads = (count + 16 / sizeof(T) - 1 + kPerThread - 1) / kPerThread;
      const int64_t blocks_of_sample = (threads + kThreads - 1) / kThreads;
      ENGINE_LAUNCH(reverse_step_general_planes_kernel<T>,
                    blocks(p.N * blocks_of_sample, "reverse_step"), kThreads, 0, stream, p,
                    blocks_of_sample);
    } else {
      const int64_t quads = (p.S + 3) / 4 + 1;
      const int64_t threads = p.N * quads * p.C;
      ENGINE_LAUNCH(reverse_step_general_quads_kernel<T>,
                    blocks((threads + kThreads - 1) / kThreads, "reverse_step"), kThreads, 0,
                    stream, p, quads);
    }
  });
  check_launch("reverse_step");
}

void reverse_step_threshold_fwd_cuda(const ReverseStepGeneral& p, int64_t rank, float fraction,
                                     float* threshold, void* stream) {
  ENGINE_LAUNCH(reverse_step_threshold_kernel, blocks(p.N, "reverse_step"), kThresholdThreads, 0,
                stream, p, static_cast<int>(rank), fraction, threshold);
  check_launch("reverse_step");
}

}  // namespace engine

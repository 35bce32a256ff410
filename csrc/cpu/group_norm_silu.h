// The loops of group_norm_silu.cpp that are compiled per instruction set, for one dtype of x.
// t, a, b, ... are arrays of float parameters; d = x + t centres a value, v = d * a + b is the
// argument of the activation.
#pragma once

#include <cstdint>

namespace engine {

struct GroupNormLoops {
  // With silu, apply and columns_apply want a and b multiplied by this.
  float silu_scale;

  // Contiguous: x is one group's slab of rows of S elements, each row a channel; [i0, i1) is a
  // range of the slab and the parameters are per row.
  double (*sum)(const void* x, int64_t i0, int64_t i1);
  // out[2] <- sums of d and d^2
  void (*stats)(const void* x, int64_t i0, int64_t i1, int64_t S, const float* t, double* out);
  // `ahead`: x (and dy) of what the caller will read next, fetched on the way; null for none
  void (*apply)(const void* x, void* y, int64_t i0, int64_t i1, int64_t S, const float* t,
                const float* a, const float* b, bool silu, const void* ahead);
  // out[3 * row + k] += sums of (dv, dv * d, d), dv the gradient of v
  void (*grad_sums)(const void* x, const void* dy, int64_t i0, int64_t i1, int64_t S,
                    const float* t, const float* a, const float* b, bool silu, double* out);
  // dx <- dv * p - (d * r + q)
  void (*grad_apply)(const void* x, const void* dy, void* dx, int64_t i0, int64_t i1, int64_t S,
                     const float* t, const float* a, const float* b, const float* p, const float* q,
                     const float* r, bool silu, const void* x_ahead, const void* dy_ahead);

  // Channels last: x is `rows` rows of C elements and the parameters are per element of a row.
  void (*columns_sum)(const void* x, int64_t rows, int64_t C, double* out);  // out[c] +=
  // out[c], out[C + c] += sums of d and d^2
  void (*columns_stats)(const void* x, int64_t rows, int64_t C, const float* t, double* out);
  void (*columns_apply)(const void* x, void* y, int64_t rows, int64_t C, const float* t,
                        const float* a, const float* b, bool silu, const void* ahead);
  // out[k * C + c] += sums of (dv, dv * d, d)
  void (*columns_grad_sums)(const void* x, const void* dy, int64_t rows, int64_t C, const float* t,
                            const float* a, const float* b, bool silu, double* out);
  void (*columns_grad_apply)(const void* x, const void* dy, void* dx, int64_t rows, int64_t C,
                             const float* t, const float* a, const float* b, const float* p,
                             const float* q, const float* r, bool silu, const void* x_ahead,
                             const void* dy_ahead);
};

}  // namespace engine

// The loops of group_norm_silu.cpp and group_norm_silu_bwd.cpp that are compiled per instruction
// set, for one dtype of x. t, a, b, ... are arrays of float parameters; d = x + t centres a value,
// v = d * a + b is the argument of the activation.
//
// Contiguous ("slab"): x is one group's slab of rows of S elements, each row a channel; [i0, i1) is
// a range of the slab and the parameters are per row.
// Channels last ("columns"): x is `rows` rows of C elements and the parameters are per element of a
// row. Rows of y and dy lie y_row elements apart: C, or more where x is half of a pair.
// `ahead`: x (and dy) of what the caller will read next, fetched on the way; null for none.
#pragma once

#include <cstdint>

#include "../kernels.h"

namespace engine {

struct GroupNormLoops {
  // With silu, apply and columns_apply want a and b multiplied by this.
  float silu_scale;

  void (*to_float)(float* to, const void* from, DType dtype, int64_t n);

  // A first mean, of a few vectors spread over the slab: good enough to centre by, if the caller
  // looks at how well it did.
  double (*slab_pilot)(const void* x, int64_t length);
  // out[2] += sums of d and d^2
  void (*slab_stats)(const void* x, int64_t i0, int64_t i1, int64_t S, const float* t, double* out);
  void (*slab_apply)(const void* x, void* y, int64_t i0, int64_t i1, int64_t S, const float* t,
                     const float* a, const float* b, bool silu, const void* ahead);

  // out[c] <- sums over the few rows k * stride (in elements)
  void (*columns_pilot)(const void* x, int64_t rows, int64_t stride, int64_t C, float* out);
  // out[c], out[out_row + c] += sums of d and d^2
  void (*columns_stats)(const void* x, int64_t rows, int64_t C, const float* t, double* out,
                        int64_t out_row);
  void (*columns_apply)(const void* x, void* y, int64_t rows, int64_t C, int64_t y_row,
                        const float* t, const float* a, const float* b, bool silu,
                        const void* ahead);
};

// dv, the gradient of v, costs a sigmoid, so the first pass may leave it in `dv` for the second:
// floats, rows `dv_row` elements apart. float32 keeps it in dx itself (dv_row the length of a row);
// 16-bit types in a buffer with rows of whole Pairs (padded_row). Null: it is computed again.
struct GroupNormGradLoops {
  int64_t pair;  // elements of a Pair

  void (*to_float)(float* to, const void* from, DType dtype, int64_t n);

  // out[k * out_row + row] += sums of (dv, dv * d, d), the last of them if with_x
  void (*slab_sums)(const void* x, const void* dy, int64_t i0, int64_t i1, int64_t S,
                    const float* t, const float* a, const float* b, bool silu, bool with_x,
                    double* out, int64_t out_row, float* dv, int64_t dv_row);
  // dx <- dv * a - (d * r + q) + add; add: like dx, null for none
  void (*slab_apply)(const void* x, const void* dy, void* dx, int64_t i0, int64_t i1, int64_t S,
                     const float* t, const float* a, const float* b, const float* q, const float* r,
                     bool silu, const float* dv, int64_t dv_row, const void* add,
                     const void* x_ahead, const void* dy_ahead);

  // out[k * y_row + c] += sums of (dv, dv * d, d)
  void (*columns_sums)(const void* x, const void* dy, int64_t rows, int64_t C, int64_t y_row,
                       const float* t, const float* a, const float* b, bool silu, bool with_x,
                       double* out, float* dv, int64_t dv_row);
  void (*columns_apply)(const void* x, const void* dy, void* dx, int64_t rows, int64_t C,
                        int64_t y_row, const float* t, const float* a, const float* b,
                        const float* q, const float* r, bool silu, const float* dv, int64_t dv_row,
                        const void* add);
};

}  // namespace engine

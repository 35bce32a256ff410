// The loops of GroupNormGradLoops (group_norm_silu.h) for one instruction set.
#include "group_norm_silu_simd.h"

// Where the second pass takes dv from: dy itself (no activation), a sigmoid, or the first pass.
enum class Dv { kIdentity, kSilu, kStored };

ENGINE_INLINE Pair negative(Pair v) { return {-v.a, -v.b}; }

// dv of a Pair of T, in the order of T's Pairs; n of its elements count, 0 for all. In float32 dv
// lies in dx, where nothing beyond a row may be touched; else rows are padded.
template <class T>
ENGINE_INLINE void keep_dv(float* dv, Pair v, int64_t n) {
  store2_tail(dv, v, std::is_same_v<T, float> ? n : 0);
}
template <class T>
ENGINE_INLINE Pair kept_dv(const float* dv, int64_t n) {
  return load2_tail(dv, std::is_same_v<T, float> ? n : 0);
}

// ---- Contiguous ---------------------------------------------------------------------------------

// Rows of one vector, as 4 x 4 pictures have: four at a time, or each would wait for its own chain.
// Each row is here as a whole, so its sums are set, not added to.
template <class T, bool kSilu, bool kX>
void slab_sums_vectors(const T* x, const T* dy, int64_t row, int64_t end, const float* t,
                       const float* a, const float* b, double* out, int64_t out_row, float* dv_rows,
                       int64_t dv_row) {
  for (; row < end; row += 4) {
    const int64_t n = end - row < 4 ? end - row : 4;
    F d[4], dv[4];
    ENGINE_UNROLL
    for (int k = 0; k < 4; ++k) {
      const int64_t i = row + (k < n ? k : 0);  // what is not there is the first once more
      d[k] = load(x + i * W) + set1(t[i]);
      dv[k] = load(dy + i * W);
      if constexpr (kSilu) dv[k] = silu_gradient<T>(fma(d[k], set1(a[i]), set1(b[i])), dv[k]);
      if (kSilu && dv_rows) write(dv_rows + i * dv_row, dv[k]);
    }
    double sums[3][4];
    sum_four(dv[0], dv[1], dv[2], dv[3], sums[0]);
    sum_four(dv[0] * d[0], dv[1] * d[1], dv[2] * d[2], dv[3] * d[3], sums[1]);
    if constexpr (kX) sum_four(d[0], d[1], d[2], d[3], sums[2]);
    for (int k = 0; k < (kX ? 3 : 2); ++k) {
      __builtin_memcpy(out + k * out_row + row, sums[k], n * sizeof(double));
    }
  }
}

template <class T, bool kSilu, bool kX>
void slab_sums(const T* x, const T* dy, int64_t i0, int64_t i1, int64_t S, const float* t,
               const float* a, const float* b, double* out, int64_t out_row, float* dv_rows,
               int64_t dv_row) {
  if (S == W) {
    const int64_t row = i0 / W, end = i1 / W;
    return slab_sums_vectors<T, kSilu, kX>(x, dy, row, end, t, a, b, out, out_row, dv_rows, dv_row);
  }
  for (int64_t row = i0 / S; i0 < i1; ++row) {
    const Pair shift = set2(t[row]), gain = set2(a[row]), bias = set2(b[row]);
    const int64_t row_end = (row + 1) * S < i1 ? (row + 1) * S : i1;
    float* dvs = kSilu && dv_rows ? dv_rows + row * (dv_row - S) : nullptr;
    while (i0 < row_end) {
      const int64_t end = row_end - i0 > kFlush * W2 ? i0 + kFlush * W2 : row_end;
      Pair sum0 = set2(0), sum1 = set2(0), sum2 = set2(0);
      for (; i0 + W2 <= end; i0 += W2) {
        const Pair d = load2(x + i0) + shift;
        const Pair dv = gradient<T, kSilu>(fma(d, gain, bias), load2(dy + i0));
        if (dvs) keep_dv<T>(dvs + i0, dv, 0);
        sum0 = sum0 + dv;
        sum1 = fma(dv, d, sum1);
        if constexpr (kX) sum2 = sum2 + d;
      }
      const int64_t n = end - i0;
      if (n > 0) {
        const Pair d = keep<T>(load2(x + i0, n) + shift, n);
        const Pair dv = keep<T>(gradient<T, kSilu>(fma(d, gain, bias), load2(dy + i0, n)), n);
        if (dvs) keep_dv<T>(dvs + i0, dv, n);
        sum0 = sum0 + dv;
        sum1 = fma(dv, d, sum1);
        if constexpr (kX) sum2 = sum2 + d;
      }
      i0 = end;
      const Two totals = sum_two(sum0.a + sum0.b, sum1.a + sum1.b);
      out[row] += totals.a;
      out[out_row + row] += totals.b;
      if constexpr (kX) out[2 * out_row + row] += total(sum2);
    }
  }
}
template <class T>
void slab_sums(const void* x, const void* dy, int64_t i0, int64_t i1, int64_t S, const float* t,
               const float* a, const float* b, bool silu, bool with_x, double* out, int64_t out_row,
               float* dv, int64_t dv_row) {
  const auto run = silu ? (with_x ? slab_sums<T, true, true> : slab_sums<T, true, false>)
                        : (with_x ? slab_sums<T, false, true> : slab_sums<T, false, false>);
  run(static_cast<const T*>(x), static_cast<const T*>(dy), i0, i1, S, t, a, b, out, out_row, dv,
      dv_row);
}

template <class T, Dv kDv>
ENGINE_INLINE Pair second_dv(Pair d, Pair gain, Pair bias, const T* dy, const float* dv,
                             int64_t n) {
  if constexpr (kDv == Dv::kStored) return kept_dv<T>(dv, n);
  return gradient<T, kDv == Dv::kSilu>(fma(d, gain, bias), load2_tail(dy, n));
}

template <class T, Dv kDv>
void slab_grad_vectors(const T* x, const T* dy, T* dx, int64_t row, int64_t end, const float* t,
                       const float* a, const float* b, const float* q, const float* r,
                       const float* dv_rows, int64_t dv_row, const T* add) {
  for (; row < end; ++row) {
    const F d = load(x + row * W) + set1(t[row]), gain = set1(a[row]);
    F dv;
    if constexpr (kDv == Dv::kStored) dv = load(dv_rows + row * dv_row);
    if constexpr (kDv == Dv::kIdentity) dv = load(dy + row * W);
    if constexpr (kDv == Dv::kSilu)
      dv = silu_gradient<T>(fma(d, gain, set1(b[row])), load(dy + row * W));
    F grad = fma(gain, dv, fma(d, set1(-r[row]), set1(-q[row])));
    if (add) grad = grad + load(add + row * W);
    store(dx + row * W, grad);
  }
}

template <class T, Dv kDv>
void slab_grad(const T* x, const T* dy, T* dx, int64_t i0, int64_t i1, int64_t S, const float* t,
               const float* a, const float* b, const float* q, const float* r, const float* dv_rows,
               int64_t dv_row, const T* add, const T* x_ahead, const T* dy_ahead) {
  if (S == W) {
    const int64_t row = i0 / W, end = i1 / W;
    return slab_grad_vectors<T, kDv>(x, dy, dx, row, end, t, a, b, q, r, dv_rows, dv_row, add);
  }
  for (int64_t row = i0 / S; i0 < i1; ++row) {
    const Pair shift = set2(t[row]), gain = set2(a[row]), bias = set2(b[row]);
    const Pair minus_q = set2(-q[row]), minus_r = set2(-r[row]);
    const int64_t end = (row + 1) * S < i1 ? (row + 1) * S : i1;
    const float* dvs = kDv == Dv::kStored ? dv_rows + row * (dv_row - S) : nullptr;
    for (; i0 < end; i0 += W2) {
      const int64_t n = end - i0 < W2 ? end - i0 : 0;
      if (x_ahead) {
        prefetch2(x_ahead + i0);
        prefetch2(dy_ahead + i0);
      }
      if constexpr (!std::is_same_v<T, float>) prefetch_store2(dx + i0 + 16 * W2);
      const Pair d = load2_tail(x + i0, n) + shift;
      const Pair dv = second_dv<T, kDv>(d, gain, bias, dy + i0, dvs ? dvs + i0 : nullptr, n);
      Pair grad = fma(gain, dv, fma(d, minus_r, minus_q));
      if (add) grad = grad + load2_tail(add + i0, n);
      store2_tail(dx + i0, grad, n);
    }
    i0 = end;
  }
}
template <class T>
void slab_grad(const void* x, const void* dy, void* dx, int64_t i0, int64_t i1, int64_t S,
               const float* t, const float* a, const float* b, const float* q, const float* r,
               bool silu, const float* dv, int64_t dv_row, const void* add, const void* x_ahead,
               const void* dy_ahead) {
  const auto run = !silu ? slab_grad<T, Dv::kIdentity>
                   : dv  ? slab_grad<T, Dv::kStored>
                         : slab_grad<T, Dv::kSilu>;
  run(static_cast<const T*>(x), static_cast<const T*>(dy), static_cast<T*>(dx), i0, i1, S, t, a, b,
      q, r, dv, dv_row, static_cast<const T*>(add), static_cast<const T*>(x_ahead),
      static_cast<const T*>(dy_ahead));
}

// ---- Channels last ------------------------------------------------------------------------------

#if ENGINE_LEVEL == 2
constexpr int kGradBlock = 2;
#else
constexpr int kGradBlock = 1;
#endif

template <class T, bool kSilu, bool kX, int K>
ENGINE_INLINE void columns_sums_block(const T* x, const T* dy, int64_t rows, int64_t C,
                                      int64_t y_row, int64_t n, const float* t, const float* a,
                                      const float* b, double* out0, double* out1, double* out2,
                                      float* dvs, int64_t dv_row) {
  Pair shift[K], gain[K], bias[K], sum0[K] = {}, sum1[K] = {}, sum2[K] = {};
  parameters<T, K>(shift, t, n);
  parameters<T, K>(gain, a, n);
  parameters<T, K>(bias, b, n);
  for (int64_t s = 0; s < rows;) {
    const int64_t end = rows - s > kFlush ? s + kFlush : rows;
    for (; s < end; ++s) {
      ENGINE_UNROLL
      for (int k = 0; k < K; ++k) {
        const int64_t i = s * C + k * W2;
        const Pair d = load2_tail(x + i, n) + shift[k];
        const Pair dv =
            gradient<T, kSilu>(fma(d, gain[k], bias[k]), load2_tail(dy + s * y_row + k * W2, n));
        if (kSilu && dvs) keep_dv<T>(dvs + s * dv_row + k * W2, dv, n);
        sum0[k] = sum0[k] + dv;
        sum1[k] = fma(dv, d, sum1[k]);
        if constexpr (kX) sum2[k] = sum2[k] + d;
      }
    }
    flush<T, K>(out0, sum0, n);
    flush<T, K>(out1, sum1, n);
    if constexpr (kX) flush<T, K>(out2, sum2, n);
  }
}
template <class T, bool kSilu, bool kX>
void columns_sums(const T* x, const T* dy, int64_t rows, int64_t C, int64_t y_row, const float* t,
                  const float* a, const float* b, double* out, float* dv, int64_t dv_row) {
#define ENGINE_CALL(K, c, n)                                                                 \
  columns_sums_block<T, kSilu, kX, K>(x + c, dy + c, rows, C, y_row, n, t + c, a + c, b + c, \
                                      out + c, out + y_row + c, out + 2 * y_row + c,         \
                                      dv ? dv + c : nullptr, dv_row)
  ENGINE_COLUMNS(C, kGradBlock, ENGINE_CALL)
#undef ENGINE_CALL
}
template <class T>
void columns_sums(const void* x, const void* dy, int64_t rows, int64_t C, int64_t y_row,
                  const float* t, const float* a, const float* b, bool silu, bool with_x,
                  double* out, float* dv, int64_t dv_row) {
  const auto run = silu ? (with_x ? columns_sums<T, true, true> : columns_sums<T, true, false>)
                        : (with_x ? columns_sums<T, false, true> : columns_sums<T, false, false>);
  run(static_cast<const T*>(x), static_cast<const T*>(dy), rows, C, y_row, t, a, b, out, dv,
      dv_row);
}

template <class T, Dv kDv, int K>
ENGINE_INLINE void columns_grad_block(const T* x, const T* dy, T* dx, int64_t rows, int64_t C,
                                      int64_t y_row, int64_t n, const float* t, const float* a,
                                      const float* b, const float* q, const float* r,
                                      const float* dvs, int64_t dv_row, const T* add) {
  Pair shift[K], gain[K], bias[K], minus_q[K], minus_r[K];
  parameters<T, K>(shift, t, n);
  parameters<T, K>(gain, a, n);
  parameters<T, K>(bias, b, n);
  parameters<T, K>(minus_q, q, n);
  parameters<T, K>(minus_r, r, n);
  ENGINE_UNROLL
  for (int k = 0; k < K; ++k) minus_q[k] = negative(minus_q[k]), minus_r[k] = negative(minus_r[k]);
  for (int64_t s = 0; s < rows; ++s) {
    ENGINE_UNROLL
    for (int k = 0; k < K; ++k) {
      const int64_t i = s * C + k * W2;
      if constexpr (!std::is_same_v<T, float>) prefetch_store2(dx + i + 8 * C);
      const Pair d = load2_tail(x + i, n) + shift[k];
      const float* kept = dvs ? dvs + s * dv_row + k * W2 : nullptr;
      const Pair dv = second_dv<T, kDv>(d, gain[k], bias[k], dy + s * y_row + k * W2, kept, n);
      Pair grad = fma(gain[k], dv, fma(d, minus_r[k], minus_q[k]));
      if (add) grad = grad + load2_tail(add + i, n);
      store2_tail(dx + i, grad, n);
    }
  }
}
template <class T, Dv kDv>
void columns_grad(const T* x, const T* dy, T* dx, int64_t rows, int64_t C, int64_t y_row,
                  const float* t, const float* a, const float* b, const float* q, const float* r,
                  const float* dv, int64_t dv_row, const T* add) {
#define ENGINE_CALL(K, c, n)                                                                   \
  columns_grad_block<T, kDv, K>(x + c, dy + c, dx + c, rows, C, y_row, n, t + c, a + c, b + c, \
                                q + c, r + c, dv ? dv + c : nullptr, dv_row,                   \
                                add ? add + c : nullptr)
  ENGINE_COLUMNS(C, kGradBlock, ENGINE_CALL)
#undef ENGINE_CALL
}
template <class T>
void columns_grad(const void* x, const void* dy, void* dx, int64_t rows, int64_t C, int64_t y_row,
                  const float* t, const float* a, const float* b, const float* q, const float* r,
                  bool silu, const float* dv, int64_t dv_row, const void* add) {
  const auto run = !silu ? columns_grad<T, Dv::kIdentity>
                   : dv  ? columns_grad<T, Dv::kStored>
                         : columns_grad<T, Dv::kSilu>;
  run(static_cast<const T*>(x), static_cast<const T*>(dy), static_cast<T*>(dx), rows, C, y_row, t,
      a, b, q, r, dv, dv_row, static_cast<const T*>(add));
}

template <class T>
constexpr GroupNormGradLoops grad_loops_of() {
  return {W2, to_float, slab_sums<T>, slab_grad<T>, columns_sums<T>, columns_grad<T>};
}
static const GroupNormGradLoops& group_norm_grad_loops(DType dtype) {
  static const GroupNormGradLoops table[] = {grad_loops_of<float>(), grad_loops_of<bf16>(),
                                             grad_loops_of<f16>()};
  return table[static_cast<int>(dtype)];
}

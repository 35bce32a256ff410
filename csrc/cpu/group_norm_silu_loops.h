// The loops of GroupNormLoops (group_norm_silu.h) for one instruction set.
#include "group_norm_silu_simd.h"

constexpr int64_t kPilot = 8;  // vectors that the first mean of a slab looks at

// ---- Contiguous ---------------------------------------------------------------------------------

template <class T>
double slab_pilot(const void* data, int64_t length) {
  const T* x = static_cast<const T*>(data);
  if (length < W2) return total(load2(x, length)) / static_cast<double>(length);
  const int64_t vectors = length / W2 < kPilot ? length / W2 : kPilot;
  const int64_t step = length / vectors;
  Pair sums = load2(x);
  for (int64_t k = 1; k < vectors; ++k) sums = sums + load2(x + k * step);
  return total(sums) / static_cast<double>(vectors * W2);
}

template <class T>
void slab_stats(const void* data, int64_t i0, int64_t i1, int64_t S, const float* t, double* out) {
  const T* x = static_cast<const T*>(data);
  Pair s1 = set2(0), s2 = set2(0), r1 = set2(0), r2 = set2(0);
  double total1 = 0, total2 = 0;
  int64_t terms = 0;
  for (int64_t row = i0 / S; i0 < i1; ++row) {
    const Pair shift = set2(t[row]);
    const int64_t row_end = (row + 1) * S < i1 ? (row + 1) * S : i1;
    while (i0 < row_end) {
      const int64_t room = 2 * (kFlush - terms) * W2;
      const int64_t end = row_end - i0 > room ? i0 + room : row_end;
      terms += (end - i0 + 2 * W2 - 1) / (2 * W2);
      for (; i0 + 2 * W2 <= end; i0 += 2 * W2) {
        const Pair d = load2(x + i0) + shift, e = load2(x + i0 + W2) + shift;
        s1 = s1 + d;
        s2 = fma(d, d, s2);
        r1 = r1 + e;
        r2 = fma(e, e, r2);
      }
      for (; i0 < end; i0 += W2) {
        const int64_t n = end - i0;
        const Pair d = n >= W2 ? load2(x + i0) + shift : keep<T>(load2(x + i0, n) + shift, n);
        s1 = s1 + d;
        s2 = fma(d, d, s2);
      }
      i0 = end;
      if (terms >= kFlush) {
        total1 += total(s1 + r1);
        total2 += total(s2 + r2);
        s1 = s2 = r1 = r2 = set2(0);
        terms = 0;
      }
    }
  }
  out[0] += total1 + total(s1 + r1);
  out[1] += total2 + total(s2 + r2);
}

// Rows of one vector, as 4 x 4 pictures have: two at a time, or each would wait for its own chain.
template <class T, bool kSilu>
void slab_apply_vectors(const T* x, T* y, int64_t row, int64_t end, const float* t, const float* a,
                        const float* b) {
  const auto value = [&](int64_t k) {
    return fma(load(x + k * W) + set1(t[k]), set1(a[k]), set1(b[k]));
  };
  for (; row + 2 <= end; row += 2) {
    const Pair v = activate<T, kSilu>(Pair{value(row), value(row + 1)});
    store(y + row * W, v.a);
    store(y + row * W + W, v.b);
  }
  if (row < end) store(y + row * W, activate<T, kSilu>(value(row)));
}

template <class T, bool kSilu>
void slab_apply(const T* x, T* y, int64_t i0, int64_t i1, int64_t S, const float* t, const float* a,
                const float* b, const T* ahead) {
  if (S == W) return slab_apply_vectors<T, kSilu>(x, y, i0 / W, i1 / W, t, a, b);
  for (int64_t row = i0 / S; i0 < i1; ++row) {
    const Pair shift = set2(t[row]), gain = set2(a[row]), bias = set2(b[row]);
    const int64_t end = (row + 1) * S < i1 ? (row + 1) * S : i1;
    for (; i0 + W2 <= end; i0 += W2) {
      if (ahead) prefetch2(ahead + i0);
      prefetch_store2(y + i0 + 16 * W2);
      store2(y + i0, activate<T, kSilu>(fma(load2(x + i0) + shift, gain, bias)));
    }
    const int64_t n = end - i0;
    if (n > 0) {
      store2(y + i0, activate<T, kSilu>(fma(load2(x + i0, n) + shift, gain, bias)), n);
    }
    i0 = end;
  }
}
template <class T>
void slab_apply(const void* x, void* y, int64_t i0, int64_t i1, int64_t S, const float* t,
                const float* a, const float* b, bool silu, const void* ahead) {
  const auto run = silu ? slab_apply<T, true> : slab_apply<T, false>;
  run(static_cast<const T*>(x), static_cast<T*>(y), i0, i1, S, t, a, b,
      static_cast<const T*>(ahead));
}

// ---- Channels last ------------------------------------------------------------------------------

#if ENGINE_LEVEL == 2
constexpr int kBlock = 4;
#else
constexpr int kBlock = 2;
#endif

template <class T>
void columns_pilot(const void* data, int64_t rows, int64_t stride, int64_t C, float* out) {
  const T* x = static_cast<const T*>(data);
  for (int64_t c = 0; c < C; c += W2) {
    const int64_t n = C - c < W2 ? C - c : 0;
    Pair sums = set2(0);
    for (int64_t k = 0; k < rows; ++k) sums = sums + load2_tail(x + k * stride + c, n);
    if (n == 0) {
      unorder2<T>(out + c, sums);
    } else {
      float values[W2];
      unorder2<T>(values, sums);
      for (int64_t i = 0; i < n; ++i) out[c + i] = values[i];
    }
  }
}

template <class T, int K>
ENGINE_INLINE void columns_stats_block(const T* x, int64_t rows, int64_t C, int64_t n,
                                       const float* t, double* out1, double* out2) {
  Pair shift[K], s1[K] = {}, s2[K] = {};
  parameters<T, K>(shift, t, n);
  for (int64_t s = 0; s < rows;) {
    const int64_t end = rows - s > kFlush ? s + kFlush : rows;
    for (; s < end; ++s) {
      ENGINE_UNROLL
      for (int k = 0; k < K; ++k) {
        const Pair d = load2_tail(x + s * C + k * W2, n) + shift[k];
        s1[k] = s1[k] + d;
        s2[k] = fma(d, d, s2[k]);
      }
    }
    flush<T, K>(out1, s1, n);
    flush<T, K>(out2, s2, n);
  }
}
template <class T>
void columns_stats(const void* data, int64_t rows, int64_t C, const float* t, double* out,
                   int64_t out_row) {
  const T* x = static_cast<const T*>(data);
#define ENGINE_CALL(K, c, n) \
  columns_stats_block<T, K>(x + c, rows, C, n, t + c, out + c, out + out_row + c)
  ENGINE_COLUMNS(C, kBlock, ENGINE_CALL)
#undef ENGINE_CALL
}

template <class T, bool kSilu, int K>
ENGINE_INLINE void columns_apply_block(const T* x, T* y, int64_t rows, int64_t C, int64_t y_row,
                                       int64_t n, const float* t, const float* a, const float* b,
                                       const T* ahead) {
  Pair shift[K], gain[K], bias[K];
  parameters<T, K>(shift, t, n);
  parameters<T, K>(gain, a, n);
  parameters<T, K>(bias, b, n);
  for (int64_t s = 0; s < rows; ++s) {
    ENGINE_UNROLL
    for (int k = 0; k < K; ++k) {
      const int64_t i = s * C + k * W2;
      if (ahead) prefetch2(ahead + i);
      const int64_t j = s * y_row + k * W2;
      prefetch_store2(y + j + 8 * y_row);
      const Pair v = fma(load2_tail(x + i, n) + shift[k], gain[k], bias[k]);
      store2_tail(y + j, activate<T, kSilu>(v), n);
    }
  }
}
template <class T, bool kSilu>
void columns_apply(const T* x, T* y, int64_t rows, int64_t C, int64_t y_row, const float* t,
                   const float* a, const float* b, const T* ahead) {
#define ENGINE_CALL(K, c, n)                                                             \
  columns_apply_block<T, kSilu, K>(x + c, y + c, rows, C, y_row, n, t + c, a + c, b + c, \
                                   ahead ? ahead + c : nullptr)
  ENGINE_COLUMNS(C, kBlock, ENGINE_CALL)
#undef ENGINE_CALL
}
template <class T>
void columns_apply(const void* x, void* y, int64_t rows, int64_t C, int64_t y_row, const float* t,
                   const float* a, const float* b, bool silu, const void* ahead) {
  const auto run = silu ? columns_apply<T, true> : columns_apply<T, false>;
  run(static_cast<const T*>(x), static_cast<T*>(y), rows, C, y_row, t, a, b,
      static_cast<const T*>(ahead));
}

template <class T>
constexpr GroupNormLoops loops_of() {
  return {kSiluScale<T>, to_float,         slab_pilot<T>,    slab_stats<T>,
          slab_apply<T>, columns_pilot<T>, columns_stats<T>, columns_apply<T>};
}
static const GroupNormLoops& group_norm_loops(DType dtype) {
  static const GroupNormLoops table[] = {loops_of<float>(), loops_of<bf16>(), loops_of<f16>()};
  return table[static_cast<int>(dtype)];
}

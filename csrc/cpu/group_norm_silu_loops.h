// The loops of group_norm_silu.h for one instruction set; see there for what they compute.

// Sums that a vector of floats collects are handed on to doubles after this many terms per lane.
constexpr int64_t kFlush = 128;

struct Sums2 {
  Pair first, second;
};

template <class T, bool kSilu>
ENGINE_INLINE Pair activate(Pair v) {
  if constexpr (kSilu) return {silu_scaled<T>(v.a), silu_scaled<T>(v.b)};
  return v;
}

// dv = dy * s * (1 + v * (1 - s)) = dy * (v * s * (1 - s) + s)
template <class T, bool kSilu>
ENGINE_INLINE Pair gradient(Pair v, Pair dy) {
  if constexpr (!kSilu) return dy;
  const Pair s = sigmoid2<T>(v), rest = {1.0f - s.a, 1.0f - s.b};
  return dy * fma(v * s, rest, s);
}

ENGINE_INLINE Pair negative(Pair v) { return {-v.a, -v.b}; }
ENGINE_INLINE double total(Pair v) { return sum(v.a + v.b); }

// ---- Contiguous ---------------------------------------------------------------------------------

template <class T>
double slab_sum(const void* data, int64_t i0, int64_t i1) {
  const T* x = static_cast<const T*>(data);
  double result = 0;
  while (i0 < i1) {
    const int64_t end = i1 - i0 > 2 * kFlush * W2 ? i0 + 2 * kFlush * W2 : i1;
    Pair even = set2(0), odd = set2(0);
    for (; i0 + 2 * W2 <= end; i0 += 2 * W2) {
      even = even + load2(x + i0);
      odd = odd + load2(x + i0 + W2);
    }
    for (; i0 < end; i0 += W2) {
      even = even + (end - i0 >= W2 ? load2(x + i0) : load2(x + i0, end - i0));
    }
    result += total(even + odd);
  }
  return result;
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
  out[0] = total1 + total(s1 + r1);
  out[1] = total2 + total(s2 + r2);
}

template <class T, bool kSilu>
void slab_apply(const T* x, T* y, int64_t i0, int64_t i1, int64_t S, const float* t, const float* a,
                const float* b, const T* ahead) {
  for (int64_t row = i0 / S; i0 < i1; ++row) {
    const Pair shift = set2(t[row]), gain = set2(a[row]), bias = set2(b[row]);
    const int64_t end = (row + 1) * S < i1 ? (row + 1) * S : i1;
    for (; i0 + W2 <= end; i0 += W2) {
      if (ahead) prefetch2(ahead + i0);
      store2(y + i0, activate<T, kSilu>(fma(load2(x + i0) + shift, gain, bias)));
    }
    if (i0 < end) {
      const int64_t n = end - i0;
      store2(y + i0, activate<T, kSilu>(fma(load2(x + i0, n) + shift, gain, bias)), n);
      i0 = end;
    }
  }
}
template <class T>
void slab_apply(const void* x, void* y, int64_t i0, int64_t i1, int64_t S, const float* t,
                const float* a, const float* b, bool silu, const void* ahead) {
  const auto run = silu ? slab_apply<T, true> : slab_apply<T, false>;
  run(static_cast<const T*>(x), static_cast<T*>(y), i0, i1, S, t, a, b,
      static_cast<const T*>(ahead));
}

template <class T, bool kSilu>
void slab_grad_sums(const T* x, const T* dy, int64_t i0, int64_t i1, int64_t S, const float* t,
                    const float* a, const float* b, double* out) {
  for (int64_t row = i0 / S; i0 < i1; ++row) {
    const Pair shift = set2(t[row]), gain = set2(a[row]), bias = set2(b[row]);
    const int64_t row_end = (row + 1) * S < i1 ? (row + 1) * S : i1;
    while (i0 < row_end) {
      const int64_t end = row_end - i0 > kFlush * W2 ? i0 + kFlush * W2 : row_end;
      Pair sum0 = set2(0), sum1 = set2(0), sum2 = set2(0);
      for (; i0 + W2 <= end; i0 += W2) {
        const Pair d = load2(x + i0) + shift;
        const Pair dv = gradient<T, kSilu>(fma(d, gain, bias), load2(dy + i0));
        sum0 = sum0 + dv;
        sum1 = fma(dv, d, sum1);
        sum2 = sum2 + d;
      }
      if (i0 < end) {
        const int64_t n = end - i0;
        const Pair d = keep<T>(load2(x + i0, n) + shift, n);
        const Pair dv = keep<T>(gradient<T, kSilu>(fma(d, gain, bias), load2(dy + i0, n)), n);
        sum0 = sum0 + dv;
        sum1 = fma(dv, d, sum1);
        sum2 = sum2 + d;
        i0 = end;
      }
      out[3 * row] += total(sum0);
      out[3 * row + 1] += total(sum1);
      out[3 * row + 2] += total(sum2);
    }
  }
}
template <class T>
void slab_grad_sums(const void* x, const void* dy, int64_t i0, int64_t i1, int64_t S,
                    const float* t, const float* a, const float* b, bool silu, double* out) {
  const auto run = silu ? slab_grad_sums<T, true> : slab_grad_sums<T, false>;
  run(static_cast<const T*>(x), static_cast<const T*>(dy), i0, i1, S, t, a, b, out);
}

template <class T, bool kSilu>
void slab_grad_apply(const T* x, const T* dy, T* dx, int64_t i0, int64_t i1, int64_t S,
                     const float* t, const float* a, const float* b, const float* p, const float* q,
                     const float* r, const T* x_ahead, const T* dy_ahead) {
  for (int64_t row = i0 / S; i0 < i1; ++row) {
    const Pair shift = set2(t[row]), gain = set2(a[row]), bias = set2(b[row]);
    const Pair slope = set2(p[row]), minus_q = set2(-q[row]), minus_r = set2(-r[row]);
    const int64_t end = (row + 1) * S < i1 ? (row + 1) * S : i1;
    for (; i0 < end; i0 += W2) {
      const int64_t n = end - i0;
      const bool whole = n >= W2;
      if (x_ahead) {
        prefetch2(x_ahead + i0);
        prefetch2(dy_ahead + i0);
      }
      const Pair d = (whole ? load2(x + i0) : load2(x + i0, n)) + shift;
      const Pair dv =
          gradient<T, kSilu>(fma(d, gain, bias), whole ? load2(dy + i0) : load2(dy + i0, n));
      const Pair result = fma(slope, dv, fma(d, minus_r, minus_q));
      whole ? store2(dx + i0, result) : store2(dx + i0, result, n);
    }
    i0 = end;
  }
}
template <class T>
void slab_grad_apply(const void* x, const void* dy, void* dx, int64_t i0, int64_t i1, int64_t S,
                     const float* t, const float* a, const float* b, const float* p, const float* q,
                     const float* r, bool silu, const void* x_ahead, const void* dy_ahead) {
  const auto run = silu ? slab_grad_apply<T, true> : slab_grad_apply<T, false>;
  run(static_cast<const T*>(x), static_cast<const T*>(dy), static_cast<T*>(dx), i0, i1, S, t, a, b,
      p, q, r, static_cast<const T*>(x_ahead), static_cast<const T*>(dy_ahead));
}

// ---- Channels last ------------------------------------------------------------------------------

// Columns are taken in blocks of K pairs whose sums stay in registers; n is the number of columns
// of the last, partial pair (K = 1), or 0.
#if ENGINE_LEVEL == 2
constexpr int kBlock = 4, kGradBlock = 2;
#else
constexpr int kBlock = 2, kGradBlock = 1;
#endif

template <class T>
ENGINE_INLINE Pair load2_tail(const T* p, int64_t n) {
  return n == 0 ? load2(p) : load2(p, n);
}

template <class T, int K>
ENGINE_INLINE void parameters(Pair* to, const float* from, int64_t n) {
  ENGINE_UNROLL
  for (int k = 0; k < K; ++k) to[k] = order2<T>(from + k * W2, n == 0 ? W2 : n);
}

template <class T, int K>
ENGINE_INLINE void flush(double* out, Pair* sums, int64_t n) {
  ENGINE_UNROLL
  for (int k = 0; k < K; ++k) {
    float values[W2];
    unorder2<T>(values, sums[k]);
    for (int64_t i = 0; i < (n == 0 ? W2 : n); ++i) out[k * W2 + i] += values[i];
    sums[k] = set2(0);
  }
}

// Calls block<K> on every block of columns of a row.
#define ENGINE_COLUMNS(C, K_MAX, CALL)                              \
  {                                                                 \
    int64_t c = 0;                                                  \
    for (; c + K_MAX * W2 <= C; c += K_MAX * W2) CALL(K_MAX, c, 0); \
    for (; c + W2 <= C; c += W2) CALL(1, c, 0);                     \
    if (c < C) CALL(1, c, C - c);                                   \
  }

template <class T, int K>
ENGINE_INLINE void columns_sum_block(const T* x, int64_t rows, int64_t C, int64_t n, double* out) {
  Pair sums[K] = {};
  for (int64_t s = 0; s < rows;) {
    const int64_t end = rows - s > kFlush ? s + kFlush : rows;
    for (; s < end; ++s) {
      ENGINE_UNROLL
      for (int k = 0; k < K; ++k) sums[k] = sums[k] + load2_tail(x + s * C + k * W2, n);
    }
    flush<T, K>(out, sums, n);
  }
}
template <class T>
void columns_sum(const void* data, int64_t rows, int64_t C, double* out) {
  const T* x = static_cast<const T*>(data);
#define ENGINE_CALL(K, c, n) columns_sum_block<T, K>(x + c, rows, C, n, out + c)
  ENGINE_COLUMNS(C, kBlock, ENGINE_CALL)
#undef ENGINE_CALL
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
void columns_stats(const void* data, int64_t rows, int64_t C, const float* t, double* out) {
  const T* x = static_cast<const T*>(data);
#define ENGINE_CALL(K, c, n) \
  columns_stats_block<T, K>(x + c, rows, C, n, t + c, out + c, out + C + c)
  ENGINE_COLUMNS(C, kBlock, ENGINE_CALL)
#undef ENGINE_CALL
}

template <class T, bool kSilu, int K>
ENGINE_INLINE void columns_apply_block(const T* x, T* y, int64_t rows, int64_t C, int64_t n,
                                       const float* t, const float* a, const float* b,
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
      const Pair v = fma(load2_tail(x + i, n) + shift[k], gain[k], bias[k]);
      const Pair result = activate<T, kSilu>(v);
      n == 0 ? store2(y + i, result) : store2(y + i, result, n);
    }
  }
}
template <class T, bool kSilu>
void columns_apply(const T* x, T* y, int64_t rows, int64_t C, const float* t, const float* a,
                   const float* b, const T* ahead) {
#define ENGINE_CALL(K, c, n)                                                      \
  columns_apply_block<T, kSilu, K>(x + c, y + c, rows, C, n, t + c, a + c, b + c, \
                                   ahead ? ahead + c : nullptr)
  ENGINE_COLUMNS(C, kBlock, ENGINE_CALL)
#undef ENGINE_CALL
}
template <class T>
void columns_apply(const void* x, void* y, int64_t rows, int64_t C, const float* t, const float* a,
                   const float* b, bool silu, const void* ahead) {
  const auto run = silu ? columns_apply<T, true> : columns_apply<T, false>;
  run(static_cast<const T*>(x), static_cast<T*>(y), rows, C, t, a, b, static_cast<const T*>(ahead));
}

template <class T, bool kSilu, int K>
ENGINE_INLINE void columns_grad_sums_block(const T* x, const T* dy, int64_t rows, int64_t C,
                                           int64_t n, const float* t, const float* a,
                                           const float* b, double* out0, double* out1,
                                           double* out2) {
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
        const Pair dv = gradient<T, kSilu>(fma(d, gain[k], bias[k]), load2_tail(dy + i, n));
        sum0[k] = sum0[k] + dv;
        sum1[k] = fma(dv, d, sum1[k]);
        sum2[k] = sum2[k] + d;
      }
    }
    flush<T, K>(out0, sum0, n);
    flush<T, K>(out1, sum1, n);
    flush<T, K>(out2, sum2, n);
  }
}
template <class T, bool kSilu>
void columns_grad_sums(const T* x, const T* dy, int64_t rows, int64_t C, const float* t,
                       const float* a, const float* b, double* out) {
#define ENGINE_CALL(K, c, n)                                                                    \
  columns_grad_sums_block<T, kSilu, K>(x + c, dy + c, rows, C, n, t + c, a + c, b + c, out + c, \
                                       out + C + c, out + 2 * C + c)
  ENGINE_COLUMNS(C, kGradBlock, ENGINE_CALL)
#undef ENGINE_CALL
}
template <class T>
void columns_grad_sums(const void* x, const void* dy, int64_t rows, int64_t C, const float* t,
                       const float* a, const float* b, bool silu, double* out) {
  const auto run = silu ? columns_grad_sums<T, true> : columns_grad_sums<T, false>;
  run(static_cast<const T*>(x), static_cast<const T*>(dy), rows, C, t, a, b, out);
}

template <class T, bool kSilu, int K>
ENGINE_INLINE void columns_grad_apply_block(const T* x, const T* dy, T* dx, int64_t rows, int64_t C,
                                            int64_t n, const float* t, const float* a,
                                            const float* b, const float* p, const float* q,
                                            const float* r, const T* x_ahead, const T* dy_ahead) {
  Pair shift[K], gain[K], bias[K], slope[K], minus_q[K], minus_r[K];
  parameters<T, K>(shift, t, n);
  parameters<T, K>(gain, a, n);
  parameters<T, K>(bias, b, n);
  parameters<T, K>(slope, p, n);
  parameters<T, K>(minus_q, q, n);
  parameters<T, K>(minus_r, r, n);
  ENGINE_UNROLL
  for (int k = 0; k < K; ++k) minus_q[k] = negative(minus_q[k]), minus_r[k] = negative(minus_r[k]);
  for (int64_t s = 0; s < rows; ++s) {
    ENGINE_UNROLL
    for (int k = 0; k < K; ++k) {
      const int64_t i = s * C + k * W2;
      if (x_ahead) {
        prefetch2(x_ahead + i);
        prefetch2(dy_ahead + i);
      }
      const Pair d = load2_tail(x + i, n) + shift[k];
      const Pair dv = gradient<T, kSilu>(fma(d, gain[k], bias[k]), load2_tail(dy + i, n));
      const Pair result = fma(slope[k], dv, fma(d, minus_r[k], minus_q[k]));
      n == 0 ? store2(dx + i, result) : store2(dx + i, result, n);
    }
  }
}
template <class T, bool kSilu>
void columns_grad_apply(const T* x, const T* dy, T* dx, int64_t rows, int64_t C, const float* t,
                        const float* a, const float* b, const float* p, const float* q,
                        const float* r, const T* x_ahead, const T* dy_ahead) {
#define ENGINE_CALL(K, c, n)                                                                    \
  columns_grad_apply_block<T, kSilu, K>(x + c, dy + c, dx + c, rows, C, n, t + c, a + c, b + c, \
                                        p + c, q + c, r + c, x_ahead ? x_ahead + c : nullptr,   \
                                        dy_ahead ? dy_ahead + c : nullptr)
  ENGINE_COLUMNS(C, kGradBlock, ENGINE_CALL)
#undef ENGINE_CALL
}
template <class T>
void columns_grad_apply(const void* x, const void* dy, void* dx, int64_t rows, int64_t C,
                        const float* t, const float* a, const float* b, const float* p,
                        const float* q, const float* r, bool silu, const void* x_ahead,
                        const void* dy_ahead) {
  const auto run = silu ? columns_grad_apply<T, true> : columns_grad_apply<T, false>;
  run(static_cast<const T*>(x), static_cast<const T*>(dy), static_cast<T*>(dx), rows, C, t, a, b, p,
      q, r, static_cast<const T*>(x_ahead), static_cast<const T*>(dy_ahead));
}

// ---- Small operands -----------------------------------------------------------------------------

template <class T>
ENGINE_INLINE void widen_array(float* to, const T* from, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, n - i), n - i);
}
static void to_float(float* to, const void* from, DType dtype, int64_t n) {
  if (dtype == DType::f32) return widen_array(to, static_cast<const float*>(from), n);
  if (dtype == DType::bf16) return widen_array(to, static_cast<const bf16*>(from), n);
  widen_array(to, static_cast<const f16*>(from), n);
}

template <class T>
constexpr GroupNormLoops loops_of() {
  return {kSiluScale<T>,     slab_sum<T>,          slab_stats<T>,        slab_apply<T>,
          slab_grad_sums<T>, slab_grad_apply<T>,   columns_sum<T>,       columns_stats<T>,
          columns_apply<T>,  columns_grad_sums<T>, columns_grad_apply<T>};
}
static const GroupNormLoops& group_norm_loops(DType dtype) {
  static const GroupNormLoops table[] = {loops_of<float>(), loops_of<bf16>(), loops_of<f16>()};
  return table[static_cast<int>(dtype)];
}

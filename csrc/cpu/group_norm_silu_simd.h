// What the forward and the backward loops of GroupNorm and of RMS norm share, for one instruction
// set.
#include "sigmoid_simd.h"

// Sums that a vector of floats collects are handed on to doubles after this many terms per lane.
// Equal terms round alike: after 128 of them rstd of an input of two values was off by 1.4e-6.
constexpr int64_t kFlush = 32;

ENGINE_INLINE double total(Pair v) { return sum(v.a + v.b); }

// v times kSiluScale<T>, if kSilu
template <class T, bool kSilu>
ENGINE_INLINE F activate(F v) {
  if constexpr (kSilu) return silu_scaled<T>(v);
  return v;
}
template <class T, bool kSilu>
ENGINE_INLINE Pair activate(Pair v) {
  return {activate<T, kSilu>(v.a), activate<T, kSilu>(v.b)};
}

// dv = dy * s * (1 + v * (1 - s)) = dy * (v * s * (1 - s) + s)
template <class T>
ENGINE_INLINE F silu_gradient(F v, F dy) {
  const F s = sigmoid<T>(v);
  return dy * fma(v * s, 1.0f - s, s);
}
template <class T, bool kSilu>
ENGINE_INLINE Pair gradient(Pair v, Pair dy) {
  if constexpr (!kSilu) return dy;
  return {silu_gradient<T>(v.a, dy.a), silu_gradient<T>(v.b, dy.b)};
}

// Columns are taken in blocks of K pairs whose sums stay in registers; n is the number of columns
// of the last, partial pair (K = 1), or 0.
template <class T>
ENGINE_INLINE Pair load2_tail(const T* p, int64_t n) {
  return n == 0 ? load2(p) : load2(p, n);
}
template <class T>
ENGINE_INLINE void store2_tail(T* p, Pair v, int64_t n) {
  n == 0 ? store2(p, v) : store2(p, v, n);
}

template <class T, int K>
ENGINE_INLINE void parameters(Pair* to, const float* from, int64_t n) {
  ENGINE_UNROLL
  for (int k = 0; k < K; ++k) to[k] = n == 0 ? order2<T>(from + k * W2) : order2<T>(from, n);
}

template <class T, int K>
ENGINE_INLINE void flush(double* out, Pair* sums, int64_t n) {
  ENGINE_UNROLL
  for (int k = 0; k < K; ++k) {
    float values[W2];
    unorder2<T>(values, sums[k]);
    if (n == 0) {
      for (int64_t i = 0; i < W2; ++i) out[k * W2 + i] += values[i];
    } else {
      for (int64_t i = 0; i < n; ++i) out[i] += values[i];
    }
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

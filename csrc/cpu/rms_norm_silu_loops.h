// The loops of RmsNormLoops (rms_norm_silu.h) for one instruction set.
#include "group_norm_silu_simd.h"

// rstd of W pixels, from their sums of squares.
struct Factors {
  F size, with_sign;
};
ENGINE_INLINE Factors factors(F squares, float root_c, float eps) {
  const F norm = root(squares);
  const F size = set1(root_c) / (norm < eps ? set1(eps) : norm);  // a NaN stays
  return {size, norm < eps ? -size : size};
}

// ---- Contiguous ---------------------------------------------------------------------------------

#if ENGINE_LEVEL == 2
constexpr int kStrip = 4;  // pairs of positions
#else
constexpr int kStrip = 2;
#endif

template <class T, bool kSilu, int K>
ENGINE_INLINE void planes_block(const T* x, T* y, float* rstd, int64_t n, int64_t C, int64_t S,
                                float eps, const float* gain, const float* offset) {
  Pair squares[K] = {};
  for (int64_t c = 0; c < C;) {  // in two levels: roundings of equal terms all go one way
    const int64_t end = C - c > kFlush ? c + kFlush : C;
    Pair sums[K] = {};
    for (; c < end; ++c) {
      ENGINE_UNROLL
      for (int k = 0; k < K; ++k) {
        const Pair v = load2_tail(x + c * S + k * W2, n);
        sums[k] = fma(v, v, sums[k]);
      }
    }
    ENGINE_UNROLL
    for (int k = 0; k < K; ++k) squares[k] = squares[k] + sums[k];
  }
  const float root_c = __builtin_sqrtf(static_cast<float>(C));
  Pair f[K];
  ENGINE_UNROLL
  for (int k = 0; k < K; ++k) {
    const Factors a = factors(squares[k].a, root_c, eps), b = factors(squares[k].b, root_c, eps);
    f[k] = {a.size, b.size};
    float values[W2];
    unorder2<T>(values, {a.with_sign, b.with_sign});
    __builtin_memcpy(rstd + k * W2, values, (n == 0 ? W2 : n) * sizeof(float));
  }
  for (int64_t c = 0; c < C; ++c) {
    const Pair g = set2(gain[c]), b = set2(offset[c]);
    ENGINE_UNROLL
    for (int k = 0; k < K; ++k) {
      const int64_t i = c * S + k * W2;
      const Pair v = fma(load2_tail(x + i, n) * f[k], g, b);
      store2_tail(y + i, activate<T, kSilu>(v), n);
    }
  }
}
template <class T, bool kSilu>
void planes(const T* x, T* y, float* rstd, int64_t length, int64_t C, int64_t S, float eps,
            const float* gain, const float* offset) {
#define ENGINE_CALL(K, s, n) \
  planes_block<T, kSilu, K>(x + s, y + s, rstd + s, n, C, S, eps, gain, offset)
  ENGINE_COLUMNS(length, kStrip, ENGINE_CALL)
#undef ENGINE_CALL
}
template <class T>
void planes(const void* x, void* y, float* rstd, int64_t s0, int64_t s1, int64_t C, int64_t S,
            float eps, const float* gain, const float* offset, bool silu) {
  const auto run = silu ? planes<T, true> : planes<T, false>;
  run(static_cast<const T*>(x) + s0, static_cast<T*>(y) + s0, rstd + s0, s1 - s0, C, S, eps, gain,
      offset);
}

// ---- Channels last ------------------------------------------------------------------------------

#if ENGINE_LEVEL == 2
constexpr int kColumns = 4;
#else
constexpr int kColumns = 2;
#endif

template <class T>
ENGINE_INLINE F row_squares(const T* x, int64_t C) {
  Pair even = set2(0), odd = set2(0);
  int64_t c = 0;
  for (; c + 2 * W2 <= C; c += 2 * W2) {
    const Pair u = load2(x + c), v = load2(x + c + W2);
    even = fma(u, u, even);
    odd = fma(v, v, odd);
  }
  for (; c < C; c += W2) {
    const Pair u = load2_tail(x + c, C - c < W2 ? C - c : 0);
    even = fma(u, u, even);
  }
  const Pair all = even + odd;
  return all.a + all.b;
}

template <class T, bool kSilu, int K>
ENGINE_INLINE void rows_block(const T* x, T* y, int64_t rows, int64_t C, int64_t n, const float* f,
                              const float* gain, const float* offset) {
  Pair g[K], b[K];
  parameters<T, K>(g, gain, n);
  parameters<T, K>(b, offset, n);
  for (int64_t r = 0; r < rows; ++r) {
    const Pair factor = set2(f[r]);
    ENGINE_UNROLL
    for (int k = 0; k < K; ++k) {
      const int64_t i = r * C + k * W2;
      const Pair v = fma(load2_tail(x + i, n) * factor, g[k], b[k]);
      store2_tail(y + i, activate<T, kSilu>(v), n);
    }
  }
}
// W rows at a time: their rstd in one vector.
template <class T, bool kSilu>
void rows(const T* x, T* y, float* rstd, int64_t rows, int64_t C, float eps, const float* gain,
          const float* offset) {
  const float root_c = __builtin_sqrtf(static_cast<float>(C));
  for (int64_t r0 = 0; r0 < rows; r0 += W, x += W * C, y += W * C) {
    const int64_t count = rows - r0 < W ? rows - r0 : W;
    float squares[W] = {}, f[W];
    for (int64_t r = 0; r < count; r += 4) {
      const auto row = [&](int64_t k) {  // what is not there is the first once more
        return row_squares(x + (r + k < count ? r + k : r) * C, C);
      };
      double sums[4];
      sum_four(row(0), row(1), row(2), row(3), sums);
      for (int64_t k = 0; k < 4; ++k) squares[r + k] = static_cast<float>(sums[k]);
    }
    const Factors both = factors(load(squares), root_c, eps);
    store(f, both.size);
    store(rstd + r0, both.with_sign, count);
#define ENGINE_CALL(K, c, n) \
  rows_block<T, kSilu, K>(x + c, y + c, count, C, n, f, gain + c, offset + c)
    ENGINE_COLUMNS(C, kColumns, ENGINE_CALL)
#undef ENGINE_CALL
  }
}
template <class T>
void rows(const void* x, void* y, float* rstd, int64_t count, int64_t C, float eps,
          const float* gain, const float* offset, bool silu) {
  const auto run = silu ? rows<T, true> : rows<T, false>;
  run(static_cast<const T*>(x), static_cast<T*>(y), rstd, count, C, eps, gain, offset);
}

template <class T>
constexpr RmsNormLoops rms_loops_of() {
  return {kSiluScale<T>, to_float, planes<T>, rows<T>};
}
static const RmsNormLoops& rms_norm_loops(DType dtype) {
  static const RmsNormLoops table[] = {rms_loops_of<float>(), rms_loops_of<bf16>(),
                                       rms_loops_of<f16>()};
  return table[static_cast<int>(dtype)];
}

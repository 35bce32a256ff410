// The loops of RmsNormGradLoops (rms_norm_silu.h) for one instruction set.
#include "group_norm_silu_simd.h"

ENGINE_INLINE F absolute(F v) { return as_float(as_bits(v) & 0x7FFFFFFFu); }

// dx = outer * (gain * dv - xhat * pull) of W pixels; dots: sums over C of gain * dv * xhat.
struct Pulls {
  F pull, outer;
};
ENGINE_INLINE Pulls pulls(F rstd, F dots, int64_t C) {
  const F f = absolute(rstd);
  if (C > 1) return {rstd < 0.0f ? F{} : dots / static_cast<float>(C), f};
  return {F{}, rstd < 0.0f ? f : 0.0f * f};  // xhat is a sign: no rounding is left to multiply
}

// ---- Contiguous ---------------------------------------------------------------------------------

#if ENGINE_LEVEL == 2
constexpr int kStrip = 2;  // pairs of positions
#else
constexpr int kStrip = 1;
#endif
static int64_t planes_kept(int64_t C) { return C * kStrip * W2; }

template <class T, bool kSilu, int K>
ENGINE_INLINE void planes_block(const T* x, const T* dy, T* dx, const float* rstd, int64_t n,
                                int64_t C, int64_t S, const float* gain, const float* offset,
                                double* out, float* kept) {
  Pair with_sign[K], f[K], dots[K] = {};
  parameters<T, K>(with_sign, rstd, n);  // 0 beyond n: so is what is summed
  ENGINE_UNROLL
  for (int k = 0; k < K; ++k) f[k] = {absolute(with_sign[k].a), absolute(with_sign[k].b)};
  for (int64_t c = 0; c < C; ++c) {
    const Pair g = set2(gain[c]), b = set2(offset[c]);
    Pair sum0 = set2(0), sum1 = set2(0);
    ENGINE_UNROLL
    for (int k = 0; k < K; ++k) {
      const int64_t i = c * S + k * W2;
      const Pair xhat = load2_tail(x + i, n) * f[k];
      const Pair dv = gradient<T, kSilu>(fma(xhat, g, b), load2_tail(dy + i, n));
      const Pair product = dv * xhat;
      store2(kept + (c * K + k) * W2, dv);
      sum0 = sum0 + dv;
      sum1 = sum1 + product;
      dots[k] = fma(g, product, dots[k]);
    }
    const Two sums = sum_two(sum0.a + sum0.b, sum1.a + sum1.b);
    out[c] += sums.a;
    out[C + c] += sums.b;
  }
  Pair pull[K], outer[K];
  ENGINE_UNROLL
  for (int k = 0; k < K; ++k) {
    const Pulls a = pulls(with_sign[k].a, dots[k].a, C), b = pulls(with_sign[k].b, dots[k].b, C);
    pull[k] = {-a.pull, -b.pull};
    outer[k] = {a.outer, b.outer};
  }
  for (int64_t c = 0; c < C; ++c) {
    const Pair g = set2(gain[c]);
    ENGINE_UNROLL
    for (int k = 0; k < K; ++k) {
      const int64_t i = c * S + k * W2;
      const Pair dv = load2(kept + (c * K + k) * W2);
      const Pair d = fma(load2_tail(x + i, n) * f[k], pull[k], g * dv);
      store2_tail(dx + i, outer[k] * d, n);
    }
  }
}
template <class T, bool kSilu>
void planes(const T* x, const T* dy, T* dx, const float* rstd, int64_t length, int64_t C, int64_t S,
            const float* gain, const float* offset, double* out, float* kept) {
#define ENGINE_CALL(K, s, n) \
  planes_block<T, kSilu, K>(x + s, dy + s, dx + s, rstd + s, n, C, S, gain, offset, out, kept)
  ENGINE_COLUMNS(length, kStrip, ENGINE_CALL)
#undef ENGINE_CALL
}
template <class T>
void planes(const void* x, const void* dy, void* dx, const float* rstd, int64_t s0, int64_t s1,
            int64_t C, int64_t S, const float* gain, const float* offset, bool silu, double* out,
            float* kept) {
  const auto run = silu ? planes<T, true> : planes<T, false>;
  run(static_cast<const T*>(x) + s0, static_cast<const T*>(dy) + s0, static_cast<T*>(dx) + s0,
      rstd + s0, s1 - s0, C, S, gain, offset, out, kept);
}

// ---- Channels last ------------------------------------------------------------------------------

#if ENGINE_LEVEL == 2
constexpr int kGradBlock = 2;
#else
constexpr int kGradBlock = 1;
#endif
static int64_t padded_row(int64_t C) { return (C + W2 - 1) / W2 * W2; }
static int64_t rows_kept(int64_t C) { return W * padded_row(C); }

// dv of some rows, and their dots so far, a vector per row.
template <class T, bool kSilu, int K>
ENGINE_INLINE void rows_dv_block(const T* x, const T* dy, int64_t rows, int64_t C, int64_t n,
                                 const float* f, const float* gain, const float* offset, F* dots,
                                 float* kept, int64_t kept_row) {
  Pair g[K], b[K];
  parameters<T, K>(g, gain, n);
  parameters<T, K>(b, offset, n);
  for (int64_t r = 0; r < rows; ++r) {
    const Pair factor = set2(f[r]);
    Pair dot = {dots[r], F{}};
    ENGINE_UNROLL
    for (int k = 0; k < K; ++k) {
      const int64_t i = r * C + k * W2;
      const Pair xhat = load2_tail(x + i, n) * factor;
      const Pair dv = gradient<T, kSilu>(fma(xhat, g[k], b[k]), load2_tail(dy + i, n));
      store2(kept + r * kept_row + k * W2, dv);
      dot = fma(g[k] * dv, xhat, dot);
    }
    dots[r] = dot.a + dot.b;
  }
}
// dx of the same rows, and their sums per channel.
template <class T, int K>
ENGINE_INLINE void rows_dx_block(const T* x, T* dx, int64_t rows, int64_t C, int64_t n,
                                 const float* f, const float* pull, const float* outer,
                                 const float* gain, const float* kept, int64_t kept_row,
                                 double* out0, double* out1) {
  Pair g[K], sum0[K] = {}, sum1[K] = {};
  parameters<T, K>(g, gain, n);
  for (int64_t r = 0; r < rows; ++r) {
    const Pair factor = set2(f[r]), minus = set2(-pull[r]), by = set2(outer[r]);
    ENGINE_UNROLL
    for (int k = 0; k < K; ++k) {
      const int64_t i = r * C + k * W2;
      const Pair xhat = load2_tail(x + i, n) * factor;
      const Pair dv = load2(kept + r * kept_row + k * W2);
      sum0[k] = sum0[k] + dv;
      sum1[k] = fma(dv, xhat, sum1[k]);
      store2_tail(dx + i, by * fma(xhat, minus, g[k] * dv), n);
    }
  }
  flush<T, K>(out0, sum0, n);
  flush<T, K>(out1, sum1, n);
}

// W rows at a time: their dots in one vector.
template <class T, bool kSilu>
void rows(const T* x, const T* dy, T* dx, const float* rstd, int64_t rows, int64_t C,
          const float* gain, const float* offset, double* out, float* kept) {
  const int64_t kept_row = padded_row(C);
  for (int64_t r0 = 0; r0 < rows; r0 += W, x += W * C, dy += W * C, dx += W * C) {
    const int64_t count = rows - r0 < W ? rows - r0 : W;
    const F with_sign = load(rstd + r0, count);
    F dots[W] = {};
    float f[W], totals[W], pull[W], outer[W];
    store(f, absolute(with_sign));
#define ENGINE_CALL(K, c, n)                                                                      \
  rows_dv_block<T, kSilu, K>(x + c, dy + c, count, C, n, f, gain + c, offset + c, dots, kept + c, \
                             kept_row)
    ENGINE_COLUMNS(C, kGradBlock, ENGINE_CALL)
#undef ENGINE_CALL
    for (int64_t r = 0; r < W; r += 4) {
      double sums[4];
      sum_four(dots[r], dots[r + 1], dots[r + 2], dots[r + 3], sums);
      for (int64_t k = 0; k < 4; ++k) totals[r + k] = static_cast<float>(sums[k]);
    }
    const Pulls p = pulls(with_sign, load(totals), C);
    store(pull, p.pull);
    store(outer, p.outer);
#define ENGINE_CALL(K, c, n)                                                                    \
  rows_dx_block<T, K>(x + c, dx + c, count, C, n, f, pull, outer, gain + c, kept + c, kept_row, \
                      out + c, out + C + c)
    ENGINE_COLUMNS(C, kGradBlock, ENGINE_CALL)
#undef ENGINE_CALL
  }
}
template <class T>
void rows(const void* x, const void* dy, void* dx, const float* rstd, int64_t count, int64_t C,
          const float* gain, const float* offset, bool silu, double* out, float* kept) {
  const auto run = silu ? rows<T, true> : rows<T, false>;
  run(static_cast<const T*>(x), static_cast<const T*>(dy), static_cast<T*>(dx), rstd, count, C,
      gain, offset, out, kept);
}

template <class T>
constexpr RmsNormGradLoops rms_grad_loops_of() {
  return {to_float, planes_kept, rows_kept, planes<T>, rows<T>};
}
static const RmsNormGradLoops& rms_norm_grad_loops(DType dtype) {
  static const RmsNormGradLoops table[] = {rms_grad_loops_of<float>(), rms_grad_loops_of<bf16>(),
                                           rms_grad_loops_of<f16>()};
  return table[static_cast<int>(dtype)];
}

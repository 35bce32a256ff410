// The forward's loops (attention.cpp), for one instruction set.
#include "attention_simd.h"

// Keys at a time: their scores, NV * W queries wide, stay in L1.
constexpr int64_t kKeys = 128;

// P[key][query], scores of `keys` keys -> exp((s - m) * c), c > 0 in units of log 2; m, total and
// factor are per query. factor: what earlier sums are to be multiplied by.
template <class T, int NV>
ENGINE_INLINE void soft_weights(float* P, int64_t keys, float c, F* m, F* total, float* factor) {
  constexpr int L = NV * W;
  F top[2][NV];
  ENGINE_UNROLL
  for (int v = 0; v < NV; ++v) top[0][v] = top[1][v] = m[v];
  int64_t k = 0;
  for (; k + 2 <= keys; k += 2) {
    ENGINE_UNROLL
    for (int i = 0; i < 2 * NV; ++i) {
      top[i / NV][i % NV] = maximum(top[i / NV][i % NV], load(P + k * L + i * W));
    }
  }
  F base[NV], sum[NV];
  ENGINE_UNROLL
  for (int v = 0; v < NV; ++v) {
    F now = maximum(top[0][v], top[1][v]);
    if (k < keys) now = maximum(now, load(P + k * L + v * W));
    // All scores so far are -inf: their weights are 0, and not yet 0 / 0.
    base[v] = now == -__builtin_inff() ? F{} : now;
    store(factor + v * W, exp2_of<T>((m[v] - base[v]) * c));
    sum[v] = total[v] * load(factor + v * W);
    m[v] = now;
  }
  for (k = 0; k < keys; ++k) {
    ENGINE_UNROLL
    for (int v = 0; v < NV; ++v) {
      const F p = exp2_of<T>((load(P + k * L + v * W) - base[v]) * c);
      store(P + k * L + v * W, p);
      sum[v] += p;
    }
  }
  ENGINE_UNROLL
  for (int v = 0; v < NV; ++v) total[v] = sum[v];
}

// out and lse of `rows` <= NV * W queries, which lie along lanes: no sum runs across a vector.
// scratch: 2 * D + kKeys + kTileRows rows of NV * W.
template <class T, int NV>
void attention_block(const AttentionRows& q, int64_t rows, const FloatRows& K, const FloatRows& V,
                     int64_t Sk, int64_t D, float scale, const AttentionRows& out, float* lse,
                     float* scratch) {
  constexpr int L = NV * W;
  float *Q = scratch, *O = Q + D * L, *P = O + D * L;
  // The sign goes to q, so that the largest product has the largest weight.
  // No zero: it would make 0 * -inf of the first maximum.
  const float size = __builtin_fmaxf(__builtin_fabsf(scale), 0x1p-126f), c = size * 1.44269504f;
  rows_to_columns<T, NV>(Q, q, rows, D, __builtin_copysignf(1.0f, scale));
  F m[NV], total[NV];
  float factor[L];
  ENGINE_UNROLL
  for (int v = 0; v < NV; ++v) m[v] = set1(-__builtin_inff()), total[v] = F{};
  const int64_t parts = (Sk + kKeys - 1) / kKeys;
  const int64_t step = ((Sk + parts - 1) / parts + kTileRows - 1) / kTileRows * kTileRows;
  for (int64_t k0 = 0; k0 < Sk; k0 += step) {
    const int64_t keys = Sk - k0 < step ? Sk - k0 : step;
    product<NV, true, Into::zero>(keys, D, K.data + k0 * K.s, K.s, Q, L, P, L);
    soft_weights<T, NV>(P, keys, c, m, total, factor);
    if (k0 == 0) {
      product<NV, false, Into::zero>(D, keys, V.data, V.s, P, L, O, L);
    } else {
      product<NV, false, Into::scaled>(D, keys, V.data + k0 * V.s, V.s, P, L, O, L, factor);
    }
  }
  ENGINE_UNROLL
  for (int v = 0; v < NV; ++v) store(factor + v * W, 1.0f / total[v]);
  columns_to_rows<T, NV>(out, O, rows, D, factor);
  if (lse == nullptr) return;
  ENGINE_UNROLL
  for (int v = 0; v < NV; ++v) {
    const int64_t left = rows - v * W;
    if (left > 0) store_some(lse + v * W, fma(m[v], set1(size), ln(total[v])), left, 1);
  }
}

template <class T>
void attention_queries(const AttentionRows& q, int64_t rows, const FloatRows& K, const FloatRows& V,
                       int64_t Sk, int64_t D, float scale, const AttentionRows& out, float* lse,
                       float* scratch) {
  if (rows > W) {
    attention_block<T, 2>(q, rows, K, V, Sk, D, scale, out, lse, scratch);
  } else {
    attention_block<T, 1>(q, rows, K, V, Sk, D, scale, out, lse, scratch);
  }
}

template <class T>
const AttentionLoops& attention_loops_of() {
  static const AttentionLoops loops = {W2,
                                       [](int64_t D) { return (2 * D + kKeys + kTileRows) * W2; },
                                       &rows_to_float<T>, &attention_queries<T>};
  return loops;
}

inline const AttentionLoops& attention_loops(DType dtype) {
  return dtype == DType::f32    ? attention_loops_of<float>()
         : dtype == DType::bf16 ? attention_loops_of<bf16>()
                                : attention_loops_of<f16>();
}

// The backward's loops (attention_bwd.cpp), for one instruction set.
#include "attention_simd.h"

// Queries at a time: their P and dS, NV * W keys wide, stay in L1.
constexpr int64_t kQueries = 12 * 8;

ENGINE_INLINE int64_t pitch(int64_t D) { return (D + W - 1) / W * W; }

template <class T>
void dots(float* delta, const float* dO, const AttentionRows& out, int64_t rows, int64_t D) {
  const T* p = static_cast<const T*>(out.data);
  for (int64_t r = 0; r < rows; ++r, p += out.s, dO += D) {
    F total{};
    for (int64_t d = 0; d < D; d += W) {
      total = fma(load_some(p + d * out.d, D - d, out.d), load_some(dO + d, D - d, 1), total);
    }
    delta[r] = sum(total);
  }
}

// P[query][key], scores -> exp(s * scale - lse); dS, products of dO and V -> P * (dS - delta).
template <class T, int NV>
ENGINE_INLINE void weight_gradients(float* P, float* dS, int64_t queries, float scale,
                                    const float* lse, const float* delta) {
  for (int64_t q = 0; q < queries; ++q) {
    const F shift = set1(-lse[q]), mean = set1(delta[q]);
    ENGINE_UNROLL
    for (int v = 0; v < NV; ++v) {
      const int64_t at = (q * NV + v) * W;
      // No weight is above 1: where scores are huge, lse's rounding alone would make infinities.
      const F t = minimum(F{}, fma(load(P + at), set1(scale), shift));
      const F p = exp2_of<T>(t * 1.44269504f);
      store(P + at, p);
      store(dS + at, p * (load(dS + at) - mean));
    }
  }
}

template <class T, int NV>
void grad_block(const float* Q, const float* dO, const float* lse, const float* delta, int64_t S,
                int64_t D, float scale, const AttentionRows& k, const AttentionRows& v,
                int64_t rows, const AttentionRows& dk, const AttentionRows& dv, float* dQ,
                bool first, float* scratch) {
  constexpr int L = NV * W;
  float *K = scratch, *V = K + D * L, *dK = V + D * L, *dV = dK + D * L;  // columns
  float *P = dV + D * L, *dS = P + kQueries * L, *K_rows = dS + kQueries * L;
  rows_to_columns<T, NV>(K, k, rows, D, 1.0f);
  rows_to_columns<T, NV>(V, v, rows, D, 1.0f);
  rows_to_float<T>(K_rows, k, rows, D);
  const int64_t ld = pitch(D);
  for (int64_t q0 = 0; q0 < S; q0 += kQueries) {
    const int64_t n = S - q0 < kQueries ? S - q0 : kQueries;
    const float *q = Q + q0 * D, *dout = dO + q0 * D;
    product<NV, true, Into::zero>(n, D, q, D, K, L, P, L);
    product<NV, true, Into::zero>(n, D, dout, D, V, L, dS, L);
    weight_gradients<T, NV>(P, dS, n, scale, lse + q0, delta + q0);
    if (q0 == 0) {
      product<NV, false, Into::zero>(D, n, dout, D, P, L, dV, L);
      product<NV, false, Into::zero>(D, n, q, D, dS, L, dK, L);
    } else {
      product<NV, false, Into::add>(D, n, dout, D, P, L, dV, L);
      product<NV, false, Into::add>(D, n, q, D, dS, L, dK, L);
    }
    for (int64_t d = 0; d < D; d += W2) {
      float* to = dQ + q0 * ld + d;
      if (D - d > W) {
        if (first) {
          product<2, true, Into::zero>(n, rows, dS, L, K_rows + d, D, to, ld);
        } else {
          product<2, true, Into::add>(n, rows, dS, L, K_rows + d, D, to, ld);
        }
      } else {
        if (first) {
          product<1, true, Into::zero>(n, rows, dS, L, K_rows + d, D, to, ld);
        } else {
          product<1, true, Into::add>(n, rows, dS, L, K_rows + d, D, to, ld);
        }
      }
    }
  }
  float factor[L];
  for (int i = 0; i < L; ++i) factor[i] = 1.0f;
  columns_to_rows<T, NV>(dv, dV, rows, D, factor);
  for (int i = 0; i < L; ++i) factor[i] = scale;
  columns_to_rows<T, NV>(dk, dK, rows, D, factor);
}

template <class T>
void attention_keys(const float* Q, const float* dO, const float* lse, const float* delta,
                    int64_t S, int64_t D, float scale, const AttentionRows& k,
                    const AttentionRows& v, int64_t rows, const AttentionRows& dk,
                    const AttentionRows& dv, float* dQ, bool first, float* scratch) {
  const auto block = rows > W ? grad_block<T, 2> : grad_block<T, 1>;
  block(Q, dO, lse, delta, S, D, scale, k, v, rows, dk, dv, dQ, first, scratch);
}

template <class T>
void finish(const AttentionRows& to, const float* from, int64_t parts, int64_t apart, int64_t rows,
            int64_t D, float scale) {
  T* p = static_cast<T*>(to.data);
  const int64_t ld = pitch(D);
  for (int64_t r = 0; r < rows; ++r, p += to.s, from += ld) {
    for (int64_t d = 0; d < D; d += W) {
      F total = load(from + d);
      for (int64_t i = 1; i < parts; ++i) total += load(from + i * apart + d);
      store_some(p + d * to.d, total * scale, D - d, to.d);
    }
  }
}

template <class T>
const AttentionGradLoops& attention_grad_loops_of() {
  static const AttentionGradLoops loops = {
      W2,
      [](int64_t D) { return (5 * D + 2 * kQueries) * W2 + 2 * W2; },
      [](int64_t D) { return pitch(D); },
      &rows_to_float<T>,
      &dots<T>,
      &attention_keys<T>,
      &finish<T>};
  return loops;
}

inline const AttentionGradLoops& attention_grad_loops(DType dtype) {
  return dtype == DType::f32    ? attention_grad_loops_of<float>()
         : dtype == DType::bf16 ? attention_grad_loops_of<bf16>()
                                : attention_grad_loops_of<f16>();
}

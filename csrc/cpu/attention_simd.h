// What the forward's and the backward's attention loops share, for one instruction set (simd.h):
// the matrix product, e^x, and rows of a tensor to and from floats.

// ---- C = A B: a broadcast number of A times a few vectors of B's row ----------------------------

// Rows of C that stay in registers, two vectors each, beside two of B.
#if ENGINE_LEVEL == 2
constexpr int kTileRows = 12;
#elif ENGINE_LEVEL == 1
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif

// Where a product goes: C = AB, C += AB, or C = C * factor + AB, a factor per column.
enum class Into { zero, add, scaled };

// A(m, k) lies at m * lda + k (ALONG: rows along k) or at k * lda + m.
template <int M, int NV, bool ALONG, Into INTO>
ENGINE_INLINE void tile(int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb,
                        float* C, int64_t ldc, const float* factor) {
  F acc[M][NV];
  ENGINE_UNROLL
  for (int m = 0; m < M; ++m) {
    ENGINE_UNROLL
    for (int v = 0; v < NV; ++v) {
      if constexpr (INTO != Into::scaled) acc[m][v] = F{};
      if constexpr (INTO == Into::scaled) {
        acc[m][v] = load(C + m * ldc + v * W) * load(factor + v * W);
      }
    }
  }
  const float *a0 = A, *a1 = A + 4 * lda, *a2 = A + 8 * lda;  // four rows per pointer
  ENGINE_UNROLL_FOUR
  for (int64_t k = 0; k < K; ++k) {
    F b[NV];
    ENGINE_UNROLL
    for (int v = 0; v < NV; ++v) b[v] = load(B + v * W);
    ENGINE_UNROLL
    for (int m = 0; m < M; ++m) {
      const float* a = ALONG ? (m < 4 ? a0 : m < 8 ? a1 : a2) + m % 4 * lda : a0 + m;
      const F x = set1(*a);
      ENGINE_UNROLL
      for (int v = 0; v < NV; ++v) acc[m][v] = fma(x, b[v], acc[m][v]);
    }
    B += ldb;
    if constexpr (ALONG) {
      ++a0, ++a1, ++a2;
    } else {
      a0 += lda;
    }
  }
  ENGINE_UNROLL
  for (int m = 0; m < M; ++m) {
    ENGINE_UNROLL
    for (int v = 0; v < NV; ++v) {
      // Added at the end: a sum of parts, each of few terms.
      if constexpr (INTO == Into::add) acc[m][v] += load(C + m * ldc + v * W);
      store(C + m * ldc + v * W, acc[m][v]);
    }
  }
}

// Tiles of R rows while they last.
template <int R, int NV, bool ALONG, Into INTO>
ENGINE_INLINE void tiles(int64_t& M, int64_t K, const float*& A, int64_t lda, const float* B,
                         int64_t ldb, float*& C, int64_t ldc, const float* factor) {
  for (; M >= R; M -= R, A += R * (ALONG ? lda : 1), C += R * ldc) {
    tile<R, NV, ALONG, INTO>(K, A, lda, B, ldb, C, ldc, factor);
  }
}

// Terms of a product that one sum takes: an error grows by the root of their number. Of 512 in one
// sum it is 1.65 times that of MKL's sums of 192 (AMD EPYC), of four times 128 0.85 times.
constexpr int64_t kTerms = 128;

// C (M, NV * W) from A (M, K) and B (K, NV * W).
template <int NV, bool ALONG, Into INTO>
void product(int64_t M, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb,
             float* C, int64_t ldc, const float* factor = nullptr) {
  const int64_t parts = K > kTerms * 3 / 2 ? (K + kTerms - 1) / kTerms : 1;
  const int64_t now = (K + parts - 1) / parts;
  const int64_t rest = K - now;
  const float* A_rest = A + now * (ALONG ? 1 : lda);
  const int64_t rows = M;
  float* const to = C;
  tiles<kTileRows, NV, ALONG, INTO>(M, now, A, lda, B, ldb, C, ldc, factor);
  if constexpr (kTileRows > 8) tiles<8, NV, ALONG, INTO>(M, now, A, lda, B, ldb, C, ldc, factor);
  if constexpr (kTileRows > 4) tiles<4, NV, ALONG, INTO>(M, now, A, lda, B, ldb, C, ldc, factor);
  tiles<2, NV, ALONG, INTO>(M, now, A, lda, B, ldb, C, ldc, factor);
  tiles<1, NV, ALONG, INTO>(M, now, A, lda, B, ldb, C, ldc, factor);
  if (rest > 0) product<NV, ALONG, Into::add>(rows, rest, A_rest, lda, B + now * ldb, ldb, to, ldc);
}

// ---- e^x ----------------------------------------------------------------------------------------

ENGINE_INLINE F maximum(F a, F b) {  // b where one is NaN
#if ENGINE_LEVEL == 2
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif ENGINE_LEVEL == 1
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(ENGINE_X86)
  return (F)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
ENGINE_INLINE F minimum(F a, F b) {
#if ENGINE_LEVEL == 2
  return (F)_mm512_min_ps((__m512)a, (__m512)b);
#elif ENGINE_LEVEL == 1
  return (F)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(ENGINE_X86)
  return (F)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

// 2^z for z <= 0 or little more, of T's precision; 0 below 2^-126, where results would be
// subnormal, which costs a microcode assist per vector. 2^0 is 1 in float32. NaN stays.
template <class T>
ENGINE_INLINE F exp2_of(F z) {
#if ENGINE_LEVEL == 2
  const F r = (F)_mm512_reduce_ps((__m512)z, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  const F magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const F shifted = (z - 0.5f) + magic;
  const F r = z - (shifted - magic);  // in [0, 1]
#endif
  F e;
  if constexpr (std::is_same_v<T, bf16>) {  // relative error 2^-13.7
    e = fma(r, set1(0.07802452147f), set1(0.2260671556f));
    e = fma(e, r, set1(0.6958335638f));
    e = fma(e, r, set1(0.9999251962f));
  } else if constexpr (std::is_same_v<T, f16>) {  // 2^-18.5
    e = fma(r, set1(0.01353416778f), set1(0.05201146007f));
    e = fma(e, r, set1(0.2414427549f));
    e = fma(e, r, set1(0.6930038333f));
    e = fma(e, r, set1(1.000002623f));
  } else {  // 2^-22.6
    e = fma(r, set1(0.001877576695f), set1(0.008989339694f));
    e = fma(e, r, set1(0.05582631752f));
    e = fma(e, r, set1(0.2401536107f));
    e = fma(e, r, set1(0.6931530833f));
    e = fma(e, r, set1(1.0f));
  }
#if ENGINE_LEVEL == 2
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)z, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (F)_mm512_maskz_scalef_ps(normal, (__m512)e, (__m512)z);
#else
  const F result = z < -126.0f ? F{} : as_float(as_bits(e) + (as_bits(shifted) << 23));
  return z == z ? result : z;
#endif
}

// ln v for v = 0 or v normal; NaN stays.
ENGINE_INLINE F ln(F v) {
  const U bits = as_bits(v);
  const I exponent = (I)(bits - 0x3F3504F3u) >> 23;  // of v / sqrt(1/2)
  const F f = as_float(bits - ((U)exponent << 23));  // in [sqrt(1/2), sqrt(2))
  const F t = (f - 1.0f) / (f + 1.0f), t2 = t * t;
  F e = fma(t2, set1(0.2222222222f), set1(0.2857142857f));  // 2 atanh t
  e = fma(e, t2, set1(0.4f));
  e = fma(e, t2, set1(0.6666666667f));
  e = fma(e * t2, t, t + t);
  e = fma(__builtin_convertvector(exponent, F), set1(0.69314718056f), e);
  e = v == 0.0f ? set1(-__builtin_inff()) : e;
  return v == v ? e : v;
}

// ---- Rows of a tensor ---------------------------------------------------------------------------

// The first n < W elements; the other lanes are 0.
template <class T>
ENGINE_INLINE F load_part(const T* p, int64_t n) {
#if ENGINE_LEVEL == 2
  const __mmask16 first = first16(n);
  if constexpr (std::is_same_v<T, float>) return (F)_mm512_maskz_loadu_ps(first, p);
  const H halves = (H)_mm256_maskz_loadu_epi16(first, p);
  if constexpr (std::is_same_v<T, bf16>) return as_float(widen(halves) << 16);
  return half_to_float(halves);
#else
  T copy[W] = {};
  for (int64_t i = 0; i < n; ++i) copy[i] = p[i];
  return load(copy);
#endif
}
template <class T>
ENGINE_INLINE void store_part(T* p, F v, int64_t n) {
#if ENGINE_LEVEL == 2
  const __mmask16 first = first16(n);
  if constexpr (std::is_same_v<T, float>) {
    _mm512_mask_storeu_ps(p, first, (__m512)v);
  } else {
    T copy[W];
    store(copy, v);
    _mm256_mask_storeu_epi16(p, first, (__m256i)read<H>(copy));
  }
#else
  T copy[W];
  store(copy, v);
  for (int64_t i = 0; i < n; ++i) p[i] = copy[i];
#endif
}

// min(n, W) elements, `stride` apart; the other lanes are 0.
template <class T>
ENGINE_INLINE F load_some(const T* p, int64_t n, int64_t stride) {
  if (stride == 1) return n >= W ? load(p) : load_part(p, n);
  T copy[W] = {};
  for (int64_t i = 0; i < n && i < W; ++i) copy[i] = p[i * stride];
  return load(copy);
}
template <class T>
ENGINE_INLINE void store_some(T* p, F v, int64_t n, int64_t stride) {
  if (stride == 1) return n >= W ? store(p, v) : store_part(p, v, n);
  T copy[W];
  store(copy, v);
  for (int64_t i = 0; i < n && i < W; ++i) p[i * stride] = copy[i];
}

// `rows` rows of D elements, to (rows, D) floats; up to W floats past the end are overwritten.
template <class T>
void rows_to_float(float* to, const AttentionRows& from, int64_t rows, int64_t D) {
  const T* p = static_cast<const T*>(from.data);
  for (int64_t r = 0; r < rows; ++r, p += from.s) {
    for (int64_t d = 0; d < D; d += W) {
      store(to + r * D + d, load_some(p + d * from.d, D - d, from.d));
    }
  }
}

// The first and the second halves of two vectors, element by element.
ENGINE_INLINE void interleave(F a, F b, F& low, F& high) {
#if ENGINE_LEVEL == 2
  const __m512i at = (__m512i)(I{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
  low = (F)_mm512_permutex2var_ps((__m512)a, at, (__m512)b);
  high = (F)_mm512_permutex2var_ps((__m512)a, (__m512i)((I)at + 8), (__m512)b);
#elif ENGINE_LEVEL == 1
  const __m256 u = _mm256_unpacklo_ps((__m256)a, (__m256)b);
  const __m256 v = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  low = (F)_mm256_permute2f128_ps(u, v, 0x20);
  high = (F)_mm256_permute2f128_ps(u, v, 0x31);
#else
  low = F{a[0], b[0], a[1], b[1]};
  high = F{a[2], b[2], a[3], b[3]};
#endif
}

// r[i][j] <-> r[j][i]: log2 W perfect shuffles.
constexpr int kStages = W == 16 ? 4 : W == 8 ? 3 : 2;
ENGINE_INLINE void transpose_tile(F* r) {
  ENGINE_UNROLL
  for (int stage = 0; stage < kStages; ++stage) {
    F s[W];
    ENGINE_UNROLL
    for (int i = 0; i < W / 2; ++i) interleave(r[i], r[i + W / 2], s[2 * i], s[2 * i + 1]);
    ENGINE_UNROLL
    for (int i = 0; i < W; ++i) r[i] = s[i];
  }
}

// `rows` <= NV * W rows of D elements as columns: to[d][row], NV * W apart; columns past them are
// 0.
template <class T, int NV>
void rows_to_columns(float* to, const AttentionRows& from, int64_t rows, int64_t D, float factor) {
  const T* p = static_cast<const T*>(from.data);
  for (int64_t r0 = 0; r0 < NV * W; r0 += W) {
    for (int64_t d0 = 0; d0 < D; d0 += W) {
      F r[W];
      const T* corner = p + r0 * from.s + d0 * from.d;
      const bool side_by_side = from.d == 1 && r0 + W <= rows;
      if (side_by_side && D - d0 >= W) {
        ENGINE_UNROLL
        for (int i = 0; i < W; ++i) r[i] = load(corner + i * from.s);
      } else if (side_by_side) {
        ENGINE_UNROLL
        for (int i = 0; i < W; ++i) r[i] = load_part(corner + i * from.s, D - d0);
      } else {
        for (int i = 0; i < W; ++i) {
          r[i] = r0 + i < rows ? load_some(corner + i * from.s, D - d0, from.d) : F{};
        }
      }
      transpose_tile(r);
      float* at = to + d0 * NV * W + r0;
      if (D - d0 >= W) {
        ENGINE_UNROLL
        for (int i = 0; i < W; ++i) store(at + i * NV * W, r[i] * factor);
      } else {
        for (int i = 0; i < D - d0; ++i) store(at + i * NV * W, r[i] * factor);
      }
    }
  }
}

// The way back: each column times its factor.
template <class T, int NV>
void columns_to_rows(const AttentionRows& to, const float* from, int64_t rows, int64_t D,
                     const float* factor) {
  T* p = static_cast<T*>(to.data);
  for (int64_t r0 = 0; r0 < rows; r0 += W) {
    const F by = load(factor + r0);
    for (int64_t d0 = 0; d0 < D; d0 += W) {
      const float* at = from + d0 * NV * W + r0;
      const bool whole = D - d0 >= W;
      F r[W];
      ENGINE_UNROLL
      for (int i = 0; i < W; ++i) r[i] = whole || d0 + i < D ? load(at + i * NV * W) * by : F{};
      transpose_tile(r);
      T* corner = p + r0 * to.s + d0 * to.d;
      if (whole && to.d == 1 && r0 + W <= rows) {
        ENGINE_UNROLL
        for (int i = 0; i < W; ++i) store(corner + i * to.s, r[i]);
      } else {
        for (int i = 0; i < W && r0 + i < rows; ++i) {
          store_some(corner + i * to.s, r[i], D - d0, to.d);
        }
      }
    }
  }
}

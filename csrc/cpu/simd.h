// Vectors of one instruction set, on GCC's and clang's vector extensions; intrinsics only where the
// compiler needs them. Included by foreach_isa.h inside a namespace per level, so: no guard, no
// #include.
//
// F is a vector of W floats. A Pair holds 2 W consecutive elements of a tensor in an order of its
// own: for bfloat16 the even elements, then the odd ones, which costs one shift and one mask where
// the natural order costs two shuffles. Pairs suit sums, maps and rows with one parameter.

#if ENGINE_LEVEL == 2
constexpr int W = 16;
#elif ENGINE_LEVEL == 1
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int W2 = 2 * W;

typedef float F __attribute__((vector_size(W * 4)));
typedef int32_t I __attribute__((vector_size(W * 4)));
typedef uint32_t U __attribute__((vector_size(W * 4)));
typedef uint64_t U64 __attribute__((vector_size(W * 4)));
typedef uint16_t H __attribute__((vector_size(W * 2)));
typedef uint8_t Bytes __attribute__((vector_size(W)));

struct Pair {
  F a, b;
};

ENGINE_INLINE F set1(float v) { return v - F{}; }
ENGINE_INLINE Pair set2(float v) { return {set1(v), set1(v)}; }
ENGINE_INLINE F as_float(U v) { return (F)v; }
ENGINE_INLINE U as_bits(F v) { return (U)v; }
template <class V, class E>
ENGINE_INLINE V read(const E* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class E>
ENGINE_INLINE void write(E* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// fma and root are the only places where two operations may become one, or need an instruction.
#if ENGINE_LEVEL == 2
ENGINE_INLINE F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
ENGINE_INLINE F root(F a) { return (F)_mm512_sqrt_ps((__m512)a); }
ENGINE_INLINE F clamp(F a, float lo, float hi) {
  return (F)_mm512_min_ps(_mm512_max_ps((__m512)a, _mm512_set1_ps(lo)), _mm512_set1_ps(hi));
}
ENGINE_INLINE float sum(F a) { return _mm512_reduce_add_ps((__m512)a); }
#elif ENGINE_LEVEL == 1
ENGINE_INLINE F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
ENGINE_INLINE F root(F a) { return (F)_mm256_sqrt_ps((__m256)a); }
ENGINE_INLINE F clamp(F a, float lo, float hi) {
  return (F)_mm256_min_ps(_mm256_max_ps((__m256)a, _mm256_set1_ps(lo)), _mm256_set1_ps(hi));
}
ENGINE_INLINE float sum(F a) {
  return ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7]));
}
#else
ENGINE_INLINE F fma(F a, F b, F c) { return a * b + c; }
ENGINE_INLINE F root(F a) {
  for (int i = 0; i < W; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
ENGINE_INLINE F clamp(F a, float lo, float hi) {
  a = a < lo ? set1(lo) : a;
  return a > hi ? set1(hi) : a;
}
ENGINE_INLINE float sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
#endif

// Two sums at once, in two thirds of the operations.
struct Two {
  float a, b;
};
ENGINE_INLINE Two sum_two(F a, F b) {
#if ENGINE_LEVEL == 2
  const __m256 a8 =
      _mm256_add_ps(_mm512_castps512_ps256((__m512)a), _mm512_extractf32x8_ps((__m512)a, 1));
  const __m256 b8 =
      _mm256_add_ps(_mm512_castps512_ps256((__m512)b), _mm512_extractf32x8_ps((__m512)b, 1));
#elif ENGINE_LEVEL == 1
  const __m256 a8 = (__m256)a, b8 = (__m256)b;
#endif
#if ENGINE_LEVEL > 0
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a8, b8), _mm256_unpackhi_ps(a8, b8));
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(ab), _mm256_extractf128_ps(ab, 1));
  const __m128 both = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return {_mm_cvtss_f32(both), _mm_cvtss_f32(_mm_movehdup_ps(both))};
#else
  return {sum(a), sum(b)};
#endif
}

// Four sums at once, in double.
ENGINE_INLINE void sum_four(F a, F b, F c, F d, double* out) {
#if ENGINE_LEVEL == 2
  const __m512 p = (__m512)a, q = (__m512)b, r = (__m512)c, s = (__m512)d;
  const __m512 pq =
      _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x44), _mm512_shuffle_f32x4(p, q, 0xEE));
  const __m512 rs =
      _mm512_add_ps(_mm512_shuffle_f32x4(r, s, 0x44), _mm512_shuffle_f32x4(r, s, 0xEE));
  __m512 all =  // 4 lanes of each
      _mm512_add_ps(_mm512_shuffle_f32x4(pq, rs, 0x88), _mm512_shuffle_f32x4(pq, rs, 0xDD));
  all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4E));
  all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xB1));
  const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  const __m128 sums = _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, all));
  _mm256_storeu_pd(out, _mm256_cvtps_pd(sums));
#else
  const Two ab = sum_two(a, b), cd = sum_two(c, d);
  out[0] = ab.a, out[1] = ab.b, out[2] = cd.a, out[3] = cd.b;
#endif
}

// ---- W elements in natural order ----------------------------------------------------------------

#if ENGINE_LEVEL == 2
ENGINE_INLINE U widen(H h) { return (U)_mm512_cvtepu16_epi32((__m256i)h); }
ENGINE_INLINE H narrow(U v) { return (H)_mm512_cvtepi32_epi16((__m512i)v); }
ENGINE_INLINE F half_to_float(H h) { return (F)_mm512_cvtph_ps((__m256i)h); }
ENGINE_INLINE H float_to_half(F v) {
  return (H)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#else
ENGINE_INLINE U widen(H h) { return __builtin_convertvector(h, U); }
ENGINE_INLINE H narrow(U v) { return __builtin_convertvector(v, H); }
#if ENGINE_LEVEL == 1
ENGINE_INLINE F half_to_float(H h) { return (F)_mm256_cvtph_ps((__m128i)h); }
ENGINE_INLINE H float_to_half(F v) { return (H)_mm256_cvtps_ph((__m256)v, 0); }
#else
ENGINE_INLINE F half_to_float(H h) {
  const U bits = widen(h), rest = (bits & 0x7FFFu) << 13;
  const U magnitude = as_bits(as_float(rest) * 0x1p112f);  // rebiases, subnormals included
  const U special = (U)(rest >= (0x7C00u << 13)) & 0x7F800000u;
  return as_float(magnitude | special | (bits & 0x8000u) << 16);
}
ENGINE_INLINE H float_to_half(F v) {
  const U bits = as_bits(v), sign = bits & 0x80000000u, rest = bits ^ sign;
  const U odd = (rest >> 13) & 1u;
  const U normal = (rest + (0xC8000FFFu + odd)) >> 13;
  const U subnormal = as_bits(as_float(rest) + 0.5f) - 0x3F000000u;  // the adder rounds
  U half = rest < 0x38800000u ? subnormal : normal;
  half = rest >= 0x47800000u ? (U{} + 0x7C00u) : half;
  half = rest > 0x7F800000u ? (U{} + 0x7E00u) : half;
  return narrow(half | sign >> 16);
}
#endif
#endif

// To the nearest bfloat16, ties to even, in the upper half of each lane. NaNs must be plain.
ENGINE_INLINE U round_bf16(F v) {
  const U bits = as_bits(v);
  return bits + (((bits >> 16) & 1u) + 0x7FFFu);
}
// The same, but ties away from zero: as close, and 1 operation instead of 4.
ENGINE_INLINE U round_bf16_away(F v) { return as_bits(v) + 0x8000u; }
// NaNs whose payload would overflow in round_bf16 become the plain one.
ENGINE_INLINE F plain_nan(F v) { return v == v ? v : as_float(U{} + 0x7FC00000u); }

ENGINE_INLINE F load(const float* p) { return read<F>(p); }
ENGINE_INLINE F load(const bf16* p) { return as_float(widen(read<H>(p)) << 16); }
ENGINE_INLINE F load(const f16* p) { return half_to_float(read<H>(p)); }
ENGINE_INLINE F
load(const uint8_t* p) {  // convertvector takes the bytes one at a time: 10 x slower
#if ENGINE_LEVEL == 2
  return (F)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)read<Bytes>(p)));
#elif ENGINE_LEVEL == 1
  return (F)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector(read<Bytes>(p), F);
#endif
}
ENGINE_INLINE void store(float* p, F v) { write(p, v); }
ENGINE_INLINE void store(bf16* p, F v) { write(p, narrow(round_bf16(plain_nan(v)) >> 16)); }
ENGINE_INLINE void store(f16* p, F v) { write(p, float_to_half(v)); }

// One element.
ENGINE_INLINE float value_of(float v) { return v; }
ENGINE_INLINE float value_of(uint8_t v) { return v; }
ENGINE_INLINE float value_of(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, 4);
  return result;
}
ENGINE_INLINE float value_of(f16 v) {
  f16 copy[W] = {v};
  return load(copy)[0];
}

// The first n < W elements; the other lanes are 0.
template <class T>
ENGINE_INLINE F load(const T* p, int64_t n) {
  T copy[W] = {};
  __builtin_memcpy(copy, p, n * sizeof(T));
  return load(copy);
}
template <class T>
ENGINE_INLINE void store(T* p, F v, int64_t n) {
  T copy[W];
  store(copy, v);
  __builtin_memcpy(p, copy, n * sizeof(T));
}

// ---- Pairs --------------------------------------------------------------------------------------

template <class T>
constexpr bool kInterleaved = std::is_same_v<T, bf16>;

template <class T>
ENGINE_INLINE Pair load2(const T* p) {
  return {load(p), load(p + W)};
}
ENGINE_INLINE Pair load2(const bf16* p) {
  const U both = read<U>(p);
  return {as_float(both << 16), as_float(both & 0xFFFF0000u)};
}
template <class T>
ENGINE_INLINE void store2(T* p, Pair v) {
  store(p, v.a);
  store(p + W, v.b);
}
ENGINE_INLINE U pack2(Pair v) {  // a NaN must be plain
  return (round_bf16_away(v.a) >> 16) | (round_bf16_away(v.b) & 0xFFFF0000u);
}
ENGINE_INLINE void store2(bf16* p, Pair v) { write(p, pack2(v)); }

// The first n < 2 W elements; the other lanes are 0.
template <class T>
ENGINE_INLINE Pair load2(const T* p, int64_t n) {
  T copy[W2] = {};
  __builtin_memcpy(copy, p, n * sizeof(T));
  return load2(copy);
}
template <class T>
ENGINE_INLINE void store2(T* p, Pair v, int64_t n) {
  T copy[W2];
  store2(copy, v);
  __builtin_memcpy(p, copy, n * sizeof(T));
}
#if ENGINE_LEVEL == 2
ENGINE_INLINE __mmask16 first16(int64_t n) {
  return (__mmask16)(n >= 16 ? 0xFFFF : n <= 0 ? 0 : (1u << n) - 1);
}
ENGINE_INLINE __mmask32 first32(int64_t n) {
  return (__mmask32)(n >= 32 ? 0xFFFFFFFFu : (1u << n) - 1);
}
ENGINE_INLINE Pair load2(const float* p, int64_t n) {
  return {(F)_mm512_maskz_loadu_ps(first16(n), p),
          (F)_mm512_maskz_loadu_ps(first16(n - 16), p + 16)};
}
ENGINE_INLINE void store2(float* p, Pair v, int64_t n) {
  _mm512_mask_storeu_ps(p, first16(n), (__m512)v.a);
  _mm512_mask_storeu_ps(p + 16, first16(n - 16), (__m512)v.b);
}
ENGINE_INLINE Pair load2(const bf16* p, int64_t n) {
  const U both = (U)_mm512_maskz_loadu_epi16(first32(n), p);
  return {as_float(both << 16), as_float(both & 0xFFFF0000u)};
}
ENGINE_INLINE void store2(bf16* p, Pair v, int64_t n) {
  _mm512_mask_storeu_epi16(p, first32(n), (__m512i)pack2(v));
}
ENGINE_INLINE Pair load2(const f16* p, int64_t n) {
  return {half_to_float((H)_mm256_maskz_loadu_epi16(first16(n), p)),
          half_to_float((H)_mm256_maskz_loadu_epi16(first16(n - 16), p + 16))};
}
ENGINE_INLINE void store2(f16* p, Pair v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first16(n), (__m256i)float_to_half(v.a));
  _mm256_mask_storeu_epi16(p + 16, first16(n - 16), (__m256i)float_to_half(v.b));
}
#endif

// The cache lines of a pair, into L2.
template <class T>
ENGINE_INLINE void prefetch2(const T* p) {
  __builtin_prefetch(p, 0, 2);
  if (sizeof(T) * W2 > 64) __builtin_prefetch(p + W, 0, 2);
}

// The cache line that a store will want, with the right to write it: without, stores that miss wait
// for their lines. 4 to 7 % of a forward pass over more than the caches hold.
template <class T>
ENGINE_INLINE void prefetch_store2(T* p) {
  __builtin_prefetch(p, 1, 3);
  if (sizeof(T) * W2 > 64) __builtin_prefetch(p + W, 1, 3);
}

// Floats in natural order to and from the order of T's pairs.
template <class T>
ENGINE_INLINE Pair order2(const float* p) {
  if constexpr (!kInterleaved<T>) return {load(p), load(p + W)};
#if ENGINE_LEVEL == 2
  const __m512i even = (__m512i)(I{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30});
  const __m512 lo = (__m512)load(p), hi = (__m512)load(p + W);
  return {(F)_mm512_permutex2var_ps(lo, even, hi),
          (F)_mm512_permutex2var_ps(lo, (__m512i)((I)even + 1), hi)};
#else
  Pair v;
  for (int i = 0; i < W; ++i) v.a[i] = p[2 * i], v.b[i] = p[2 * i + 1];
  return v;
#endif
}
// The first n < 2 W of them; the other lanes are 0.
template <class T>
ENGINE_INLINE Pair order2(const float* p, int64_t n) {
  float copy[W2] = {};
  __builtin_memcpy(copy, p, n * sizeof(float));
  return order2<T>(copy);
}
template <class T>
ENGINE_INLINE void unorder2(float* p, Pair v) {
  if constexpr (!kInterleaved<T>) {
    write(p, v.a);
    write(p + W, v.b);
    return;
  }
#if ENGINE_LEVEL == 2
  const __m512i low = (__m512i)(I{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
  write(p, (F)_mm512_permutex2var_ps((__m512)v.a, low, (__m512)v.b));
  write(p + W, (F)_mm512_permutex2var_ps((__m512)v.a, (__m512i)((I)low + 8), (__m512)v.b));
#else
  for (int i = 0; i < W; ++i) p[2 * i] = v.a[i], p[2 * i + 1] = v.b[i];
#endif
}

// Zeroes the lanes of elements n and beyond.
template <class T>
ENGINE_INLINE Pair keep(Pair v, int64_t n) {
  I a, b;
  ENGINE_UNROLL
  for (int i = 0; i < W; ++i) {
    a[i] = kInterleaved<T> ? 2 * i : i;
    b[i] = kInterleaved<T> ? 2 * i + 1 : W + i;
  }
  const I end = I{} + static_cast<int32_t>(n);
  return {as_float(as_bits(v.a) & (U)(a < end)), as_float(as_bits(v.b) & (U)(b < end))};
}

ENGINE_INLINE Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
ENGINE_INLINE Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
ENGINE_INLINE Pair fma(Pair x, Pair y, Pair z) { return {fma(x.a, y.a, z.a), fma(x.b, y.b, z.b)}; }

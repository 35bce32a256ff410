// sigmoid and silu of vectors, for one instruction set (simd.h).

// 1 / (1 + exp(-v)), as exact as results in T need: about 1 ulp for float, 2^-13 for bfloat16,
// 2^-18 for float16. silu(-inf) is NaN, like PyTorch's.
#if ENGINE_LEVEL == 2
ENGINE_INLINE F reciprocal(F d) {  // of a finite number: an estimate and one Newton step
  const __m512 guess = _mm512_rcp14_ps((__m512)d);
  const __m512 error = _mm512_fnmadd_ps((__m512)d, guess, _mm512_set1_ps(1.0f));
  return (F)_mm512_fmadd_ps(guess, error, guess);
}
// 2^z for 16-bit results, as 2^floor(z) 2^(z - floor(z)); vscalefps takes the floor itself, and
// over- and underflows without a clamp.
template <class T>
ENGINE_INLINE F exp2_16(F z) {
  const F r = (F)_mm512_reduce_ps((__m512)z, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  F e;
  if constexpr (std::is_same_v<T, bf16>) {
    e = fma(r, set1(0.0780245220f), set1(0.2260671564f));
    e = fma(e, r, set1(0.6958335402f));
    e = fma(e, r, set1(0.9999252186f));
  } else {
    e = fma(r, set1(0.0135341678f), set1(0.0520114608f));
    e = fma(e, r, set1(0.2414427568f));
    e = fma(e, r, set1(0.6930038345f));
    e = fma(e, r, set1(1.0000025934f));
  }
  return (F)_mm512_scalef_ps((__m512)e, (__m512)z);
}
// 1 / d, of infinity 0
template <class T>
ENGINE_INLINE F reciprocal16(F d) {
  const __m512 guess = _mm512_rcp14_ps((__m512)d);
  if constexpr (std::is_same_v<T, bf16>) return (F)guess;
  const __m512 error = _mm512_fnmadd_ps((__m512)d, guess, _mm512_set1_ps(1.0f));  // NaN: infinity
  const __mmask16 finite = _mm512_cmp_ps_mask(error, error, _CMP_ORD_Q);
  return (F)_mm512_mask_fmadd_ps(guess, finite, error, guess);
}
#else
ENGINE_INLINE F reciprocal(F d) { return 1.0f / d; }
#endif

template <class T>
ENGINE_INLINE F sigmoid(F v) {
#if ENGINE_LEVEL == 2
  if constexpr (!std::is_same_v<T, float>) {
    return reciprocal16<T>(1.0f + exp2_16<T>(v * -1.44269504f));
  }
#endif
  // The argument is clamped at 44, where float's sigmoid is 1 and exp is far from overflow: results
  // that turn subnormal cost a microcode assist per vector. Below -87 the sigmoid is 0.
  const F magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const F x = clamp(v, -44.0f, 44.0f);
  const F shifted = fma(x, set1(-1.44269504f), magic);
  const F n = shifted - magic;
  F r, e;
  if constexpr (std::is_same_v<T, bf16>) {
    r = fma(x, set1(-1.44269504f), -n);
    e = fma(r, set1(0.0551716680f), set1(0.2426111221f));
    e = fma(e, r, set1(0.6932609857f));
    e = fma(e, r, set1(0.9999280735f));
  } else if constexpr (std::is_same_v<T, f16>) {
    r = fma(x, set1(-1.44269504f), -n);
    e = fma(r, set1(0.0095701018f), set1(0.0559178603f));
    e = fma(e, r, set1(0.2402474483f));
    e = fma(e, r, set1(0.6931218147f));
    e = fma(e, r, set1(0.9999992614f));
  } else {
    r = fma(n, set1(-0.693359375f), -x);
    r = fma(n, set1(2.12194440e-4f), r);
    e = fma(r, set1(1.9875691500e-4f), set1(1.3981999507e-3f));
    e = fma(e, r, set1(8.3334519073e-3f));
    e = fma(e, r, set1(4.1665795894e-2f));
    e = fma(e, r, set1(1.6666665459e-1f));
    e = fma(e, r, set1(5.0000001201e-1f));
    e = fma(e, r, set1(1.0f));
    e = fma(e, r, set1(1.0f));
  }
  const F s = reciprocal(1.0f + as_float(as_bits(e) + (as_bits(shifted) << 23)));
  return v < -87.0f ? F{} : s;
}
template <class T>
ENGINE_INLINE Pair sigmoid2(Pair v) {
  return {sigmoid<T>(v.a), sigmoid<T>(v.b)};
}

// silu(v), given v * kSiluScale<T>: where the scale is -log2(e), z = -v log2(e) enters exp2 at once
// and v / (1 + 2^z) = z / (-log2(e) - log2(e) 2^z).
#if ENGINE_LEVEL == 2
template <class T>
constexpr float kSiluScale = std::is_same_v<T, float> ? 1.0f : -1.44269504f;
#else
template <class T>
constexpr float kSiluScale = 1.0f;
#endif
template <class T>
ENGINE_INLINE F silu_scaled(F z) {
#if ENGINE_LEVEL == 2
  if constexpr (!std::is_same_v<T, float>) {
    const F log2e = set1(-1.44269504f);
    return z * reciprocal16<T>(fma(exp2_16<T>(z), log2e, log2e));
  }
#endif
  return z * sigmoid<T>(z);
}

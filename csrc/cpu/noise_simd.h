// The noise contract of philox.h on vectors: the same float operations, one lane per pair of
// normals. Included after simd.h, inside its namespace.

struct NoiseKey {
  uint32_t seed_lo, seed_hi, step, stream;
};

// Products of the low halves of 64-bit lanes; what the upper halves hold does not matter.
ENGINE_INLINE U64 multiply_low(U64 a, U64 b) {
#if ENGINE_LEVEL == 2
  return (U64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif ENGINE_LEVEL == 1
  return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(ENGINE_X86)
  return (U64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

ENGINE_INLINE F noise_radius(U w) {
  const F u = __builtin_convertvector((I)((w >> 9) * 2u + 1u), F) * 5.9604644775390625e-8f;
  const U bits = as_bits(u);
  const F m0 = as_float((bits & 0x007FFFFFu) | 0x3F000000u);
  const I small = m0 < 0.707106781186547524f;  // -1 where true
  const F e = __builtin_convertvector((I)(bits >> 23) - 126 + small, F);
  const F m = (small ? m0 + m0 : m0) - 1.0f;
  const F z = m * m;
  F y = 7.0376836292e-2f * m + -1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m + -1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m + -1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m + -2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  y = (y * m) * z;
  y = y + e * -2.12194440e-4f;
  y = y + -0.5f * z;
  const F log_u = (m + y) + e * 0.693359375f;
  return root(-2.0f * log_u);
}

ENGINE_INLINE void noise_cos_sin(U w, F* cosine, F* sine) {
  const U j = ((w >> 29) + 1u) & ~1u;
  const F t = __builtin_convertvector((I)(w - (j << 29)), F) * 1.4629180792671596e-9f;
  const F zz = t * t;
  F s = -1.9515295891e-4f * zz + 8.3321608736e-3f;
  s = s * zz + -1.6666654611e-1f;
  s = (s * zz) * t + t;
  F c = 2.443315711809948e-5f * zz + -1.388731625493765e-3f;
  c = c * zz + 4.166664568298827e-2f;
  c = (c * zz) * zz;
  c = (c + -0.5f * zz) + 1.0f;
  // q = j / 2 quarter turns: odd ones swap, bit 1 of q + 1 and of q are the signs.
  const I swap = (I)(j & 2u) != 0;
  const U flip_cos = ((j + 2u) & 4u) << 29, flip_sin = (j & 4u) << 29;
  *cosine = as_float(as_bits(swap ? s : c) ^ flip_cos);
  *sine = as_float(as_bits(swap ? c : s) ^ flip_sin);
}

constexpr int kBlocks = 4;  // blocks: 47 us against 67 for 50,000 normals, one at a time

// The key of every round, spread over lanes once per call.
struct RoundKeys {
  U64 k0[10], k1[10], step, stream;
};
ENGINE_INLINE void round_keys(RoundKeys* keys, NoiseKey key) {
  for (uint32_t i = 0; i < 10; ++i) {
    keys->k0[i] = U64{} + (key.seed_lo + i * 0x9E3779B9u);
    keys->k1[i] = U64{} + (key.seed_hi + i * 0xBB67AE85u);
  }
  keys->step = U64{} + key.step;
  keys->stream = U64{} + key.stream;
}

// Words of a block of W / 2 quads, each in the low half of a 64-bit lane.
struct Words {
  U64 x0, x1, x2, x3;
};
ENGINE_INLINE Words first_words(uint64_t quad, const RoundKeys& keys) {
  static const uint64_t lanes[] = {0, 1, 2, 3, 4, 5, 6, 7};
  const U64 counter = read<U64>(lanes) + quad;
  return {counter, counter >> 32, keys.step, keys.stream};
}
ENGINE_INLINE Words next_words(Words w, U64 k0, U64 k1) {
  const U64 p0 = multiply_low(w.x0, U64{} + 0xD2511F53u);
  const U64 p1 = multiply_low(w.x2, U64{} + 0xCD9E8D57u);
  return {(p1 >> 32) ^ w.x1 ^ k0, p1, (p0 >> 32) ^ w.x3 ^ k1, p0};
}

// out[2 W] <- the normals of a block.
ENGINE_INLINE void noise_values(float* out, Words w) {
  // Even 32-bit lanes: words 0 and 1 of a quad; odd lanes: its words 2 and 3.
  const F r = noise_radius((U)((w.x0 & 0xFFFFFFFFu) | w.x2 << 32));
  F c, s;
  noise_cos_sin((U)((w.x1 & 0xFFFFFFFFu) | w.x3 << 32), &c, &s);
  const F even = r * c, odd = r * s;
#if ENGINE_LEVEL == 2
  const __m512i lo = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i hi = _mm512_add_epi32(lo, _mm512_set1_epi32(8));
  _mm512_storeu_ps(out, _mm512_permutex2var_ps((__m512)even, lo, (__m512)odd));
  _mm512_storeu_ps(out + W, _mm512_permutex2var_ps((__m512)even, hi, (__m512)odd));
#elif ENGINE_LEVEL == 1
  const __m256 lo = _mm256_unpacklo_ps((__m256)even, (__m256)odd);
  const __m256 hi = _mm256_unpackhi_ps((__m256)even, (__m256)odd);
  _mm256_storeu_ps(out, _mm256_permute2f128_ps(lo, hi, 0x20));
  _mm256_storeu_ps(out + W, _mm256_permute2f128_ps(lo, hi, 0x31));
#else
  for (int i = 0; i < W; ++i) out[2 * i] = even[i], out[2 * i + 1] = odd[i];
#endif
}

// out[B * 2 W] <- the normals of B blocks, whose rounds alternate: each waits 7 cycles for the one
// before, and the next block's instructions lie too far behind for the processor to see.
template <int B>
ENGINE_INLINE void noise_blocks(float* out, uint64_t quad, const RoundKeys& keys) {
  Words w[B];
  ENGINE_UNROLL
  for (int b = 0; b < B; ++b) w[b] = first_words(quad + b * (W / 2), keys);
  ENGINE_UNROLL
  for (int i = 0; i < 10; ++i) {
    ENGINE_UNROLL
    for (int b = 0; b < B; ++b) w[b] = next_words(w[b], keys.k0[i], keys.k1[i]);
  }
  ENGINE_UNROLL
  for (int b = 0; b < B; ++b) noise_values(out + b * W2, w[b]);
}

// out[n] <- normals number `first` ... first + n - 1.
static void noise_floats(float* out, uint64_t first, int64_t n, NoiseKey key) {
  RoundKeys keys;
  round_keys(&keys, key);
  uint64_t quad = first / 4;
  for (int64_t at = -static_cast<int64_t>(first % 4); at < n; at += W2, quad += W / 2) {
    if (at >= 0 && at + kBlocks * W2 <= n) {
      noise_blocks<kBlocks>(out + at, quad, keys);
      at += (kBlocks - 1) * W2;
      quad += (kBlocks - 1) * (W / 2);
    } else if (at >= 0 && at + W2 <= n) {
      noise_blocks<1>(out + at, quad, keys);
    } else {
      float block[W2];
      noise_blocks<1>(block, quad, keys);
      for (int64_t i = at < 0 ? -at : 0; i < W2 && at + i < n; ++i) out[at + i] = block[i];
    }
  }
}

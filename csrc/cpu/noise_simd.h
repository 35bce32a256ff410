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

// One operation for each of B vectors, then the next: a single vector's chain of about 100 cycles
// would leave the processor's two units half idle.
#define ENGINE_EACH ENGINE_UNROLL for (int b = 0; b < B; ++b)

// r <- sqrt(-2 ln u), u = (2 (w >> 9) + 1) 2^-24; philox.h's radius, with the exponent taken from
// the integer 2 (w >> 9) + 1 itself: scaling by 2^-24 changes nothing else.
template <int B>
ENGINE_INLINE void noise_radius(const U* w, F* r) {
  constexpr uint32_t kRootHalf = 0x3F3504F3u, kScale = 24u << 23;  // bits of sqrt(1/2)
  F e[B], m[B], y[B], z[B];
  U bits[B];
  ENGINE_EACH bits[b] = as_bits(__builtin_convertvector((I)((w[b] >> 8) | 1u), F));
  ENGINE_EACH bits[b] = bits[b] - (kRootHalf + kScale);
  ENGINE_EACH e[b] = __builtin_convertvector((I)bits[b] >> 23, F);
  ENGINE_EACH m[b] = as_float((bits[b] & 0x007FFFFFu) + kRootHalf) - 1.0f;
  ENGINE_EACH z[b] = m[b] * m[b];
  ENGINE_EACH y[b] = 7.0376836292e-2f * m[b] + -1.1514610310e-1f;
  ENGINE_EACH y[b] = y[b] * m[b] + 1.1676998740e-1f;
  ENGINE_EACH y[b] = y[b] * m[b] + -1.2420140846e-1f;
  ENGINE_EACH y[b] = y[b] * m[b] + 1.4249322787e-1f;
  ENGINE_EACH y[b] = y[b] * m[b] + -1.6668057665e-1f;
  ENGINE_EACH y[b] = y[b] * m[b] + 2.0000714765e-1f;
  ENGINE_EACH y[b] = y[b] * m[b] + -2.4999993993e-1f;
  ENGINE_EACH y[b] = y[b] * m[b] + 3.3333331174e-1f;
  ENGINE_EACH y[b] = (y[b] * m[b]) * z[b];
  ENGINE_EACH y[b] = y[b] + e[b] * -2.12194440e-4f;
  ENGINE_EACH y[b] = y[b] + -0.5f * z[b];
  ENGINE_EACH r[b] = root(-2.0f * ((m[b] + y[b]) + e[b] * 0.693359375f));
}

// philox.h's cos_sin. v = w + an eighth of a turn: its top two bits count the quarter turns.
template <int B>
ENGINE_INLINE void noise_cos_sin(const U* w, F* cosine, F* sine) {
  F t[B], zz[B], s[B], c[B];
  U v[B];
  ENGINE_EACH v[b] = w[b] + 0x20000000u;
  ENGINE_EACH t[b] = __builtin_convertvector((I)(w[b] - (v[b] & 0xC0000000u)), F);
  ENGINE_EACH t[b] = t[b] * 1.4629180792671596e-9f;
  ENGINE_EACH zz[b] = t[b] * t[b];
  ENGINE_EACH s[b] = -1.9515295891e-4f * zz[b] + 8.3321608736e-3f;
  ENGINE_EACH c[b] = 2.443315711809948e-5f * zz[b] + -1.388731625493765e-3f;
  ENGINE_EACH s[b] = s[b] * zz[b] + -1.6666654611e-1f;
  ENGINE_EACH c[b] = c[b] * zz[b] + 4.166664568298827e-2f;
  ENGINE_EACH s[b] = (s[b] * zz[b]) * t[b] + t[b];
  ENGINE_EACH c[b] = (c[b] * zz[b]) * zz[b];
  ENGINE_EACH c[b] = (c[b] + -0.5f * zz[b]) + 1.0f;
  ENGINE_EACH {  // odd quarter turns swap; the sign of the cosine is that of the next one's sine
    const I swap = (I)(v[b] & 0x40000000u) != 0;
    const U flip_cos = (v[b] + 0x40000000u) & 0x80000000u, flip_sin = v[b] & 0x80000000u;
    cosine[b] = as_float(as_bits(swap ? s[b] : c[b]) ^ flip_cos);
    sine[b] = as_float(as_bits(swap ? c[b] : s[b]) ^ flip_sin);
  }
}

constexpr int kBlocks = 6;  // 50,000 normals take 48 us in blocks of 1, 39 of 4, 36 of 6
constexpr int64_t kNoiseRun =
    6 * kBlocks * W2;  // normals that a caller draws at a time: 1152 with AVX-512

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

// out[2 W] <- even[0], odd[0], even[1], odd[1], ...
ENGINE_INLINE void store_pairs(float* out, F even, F odd) {
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

// out[B * 2 W] <- the normals of B blocks.
template <int B>
ENGINE_INLINE void noise_blocks(float* out, uint64_t quad, const RoundKeys& keys) {
  Words w[B];
  ENGINE_EACH w[b] = first_words(quad + b * (W / 2), keys);
  ENGINE_UNROLL
  for (int i = 0; i < 10; ++i) {
    ENGINE_EACH w[b] = next_words(w[b], keys.k0[i], keys.k1[i]);
  }
  // Even 32-bit lanes: words 0 and 1 of a quad; odd lanes: its words 2 and 3.
  U r_word[B], angle[B];
  ENGINE_EACH r_word[b] = (U)((w[b].x0 & 0xFFFFFFFFu) | w[b].x2 << 32);
  ENGINE_EACH angle[b] = (U)((w[b].x1 & 0xFFFFFFFFu) | w[b].x3 << 32);
  F r[B], c[B], s[B];
  noise_radius<B>(r_word, r);
  noise_cos_sin<B>(angle, c, s);
  ENGINE_EACH store_pairs(out + b * W2, r[b] * c[b], r[b] * s[b]);
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

// The noise contract: normal number j of (seed, step, stream), the same bits on every device.
//
//   words = Philox4x32-10(counter = (quad lo, quad hi, step, stream), key = (seed lo, seed hi)),
//   quad = j / 4; lanes 0, 1 of the quad come from words 0, 1 and lanes 2, 3 from words 2, 3:
//   r = sqrt(-2 ln u(w_even)), z_even = r cos(2 pi w_odd / 2^32), z_odd = r sin(2 pi w_odd / 2^32).
//
// Every float32 operation is one IEEE multiplication, addition or square root, in this order and
// never contracted to an fma: the intrinsics see to it on the device, -ffp-contract=off on the
// host. ln, sin, cos are Cephes' polynomials; the octant of the angle is taken off in integers.
// Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define ENGINE_HD __host__ __device__ __forceinline__
#else
#define ENGINE_HD inline __attribute__((always_inline))
#endif

namespace engine {
namespace philox {

constexpr uint32_t kStepNoise = 0, kInitialNoise = 1, kTrainingNoise = 2;  // streams

#ifdef __CUDA_ARCH__
ENGINE_HD float mul(float a, float b) { return __fmul_rn(a, b); }
ENGINE_HD float add(float a, float b) { return __fadd_rn(a, b); }
ENGINE_HD float root(float a) { return __fsqrt_rn(a); }
ENGINE_HD uint32_t bits_of(float a) { return __float_as_uint(a); }
ENGINE_HD float float_of(uint32_t a) { return __uint_as_float(a); }
#else
ENGINE_HD float mul(float a, float b) { return a * b; }
ENGINE_HD float add(float a, float b) { return a + b; }
ENGINE_HD float root(float a) { return __builtin_sqrtf(a); }
ENGINE_HD uint32_t bits_of(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof(bits));
  return bits;
}
ENGINE_HD float float_of(uint32_t a) {
  float value;
  std::memcpy(&value, &a, sizeof(value));
  return value;
}
#endif

ENGINE_HD float mul_add(float a, float b, float c) { return add(mul(a, b), c); }  // two roundings

// words[4] <- ten rounds on counter[4] under key[2].
ENGINE_HD void philox4x32_10(const uint32_t* counter, const uint32_t* key, uint32_t* words) {
  uint32_t x0 = counter[0], x1 = counter[1], x2 = counter[2], x3 = counter[3];
  uint32_t k0 = key[0], k1 = key[1];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * x0, p1 = uint64_t{0xCD9E8D57u} * x2;
    x0 = static_cast<uint32_t>(p1 >> 32) ^ x1 ^ k0;
    x1 = static_cast<uint32_t>(p1);
    x2 = static_cast<uint32_t>(p0 >> 32) ^ x3 ^ k1;
    x3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = x0, words[1] = x1, words[2] = x2, words[3] = x3;
}

// sqrt(-2 ln u), u = (2 (w >> 9) + 1) 2^-24 in (0, 1).
ENGINE_HD float radius(uint32_t w) {
  const float u =
      mul(static_cast<float>(static_cast<int32_t>((w >> 9) * 2 + 1)), 5.9604644775390625e-8f);
  // u = 2^e m with m in [1/2, 1), then moved to [sqrt(1/2), sqrt(2)); u is never subnormal.
  const uint32_t bits = bits_of(u);
  const float m0 = float_of((bits & 0x007FFFFFu) | 0x3F000000u);
  const bool small = m0 < 0.707106781186547524f;
  const float e = static_cast<float>(static_cast<int32_t>(bits >> 23) - 126 - (small ? 1 : 0));
  const float m = add(small ? add(m0, m0) : m0, -1.0f);
  const float z = mul(m, m);
  float y = 7.0376836292e-2f;
  y = mul_add(y, m, -1.1514610310e-1f);
  y = mul_add(y, m, 1.1676998740e-1f);
  y = mul_add(y, m, -1.2420140846e-1f);
  y = mul_add(y, m, 1.4249322787e-1f);
  y = mul_add(y, m, -1.6668057665e-1f);
  y = mul_add(y, m, 2.0000714765e-1f);
  y = mul_add(y, m, -2.4999993993e-1f);
  y = mul_add(y, m, 3.3333331174e-1f);
  y = mul(mul(y, m), z);
  y = add(y, mul(e, -2.12194440e-4f));
  y = add(y, mul(-0.5f, z));
  const float log_u = add(add(m, y), mul(e, 0.693359375f));
  return root(mul(-2.0f, log_u));
}

// cos and sin of 2 pi w / 2^32.
ENGINE_HD void cos_sin(uint32_t w, float* cosine, float* sine) {
  const uint32_t j = ((w >> 29) + 1) & ~1u;  // nearest multiple of a quarter turn, in octants
  const int32_t k = static_cast<int32_t>(w - (j << 29));               // |k| <= 2^29
  const float t = mul(static_cast<float>(k), 1.4629180792671596e-9f);  // 2 pi / 2^32
  const float zz = mul(t, t);
  float s = mul_add(-1.9515295891e-4f, zz, 8.3321608736e-3f);
  s = mul_add(s, zz, -1.6666654611e-1f);
  s = mul_add(mul(s, zz), t, t);
  float c = mul_add(2.443315711809948e-5f, zz, -1.388731625493765e-3f);
  c = mul_add(c, zz, 4.166664568298827e-2f);
  c = mul(mul(c, zz), zz);
  c = add(add(c, mul(-0.5f, zz)), 1.0f);
  // Quarter turns q: (c, s), (-s, c), (-c, -s), (s, -c); signs are flipped in the sign bit.
  const uint32_t q = (j >> 1) & 3;
  const bool swap = (q & 1) != 0;
  const uint32_t flip_cos = (q == 1 || q == 2) ? 0x80000000u : 0u;
  const uint32_t flip_sin = (q >= 2) ? 0x80000000u : 0u;
  *cosine = float_of(bits_of(swap ? s : c) ^ flip_cos);
  *sine = float_of(bits_of(swap ? c : s) ^ flip_sin);
}

// z[4] <- the normals that four words give.
ENGINE_HD void normals(const uint32_t* words, float* z) {
  for (int pair = 0; pair < 4; pair += 2) {
    const float r = radius(words[pair]);
    float c, s;
    cos_sin(words[pair + 1], &c, &s);
    z[pair] = mul(r, c);
    z[pair + 1] = mul(r, s);
  }
}

// z[4] <- normal numbers 4 quad ... 4 quad + 3 of (seed, step, stream).
ENGINE_HD void normal_quad(int64_t seed, uint32_t step, uint32_t stream, uint64_t quad, float* z) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  const uint32_t key[2] = {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
  const uint32_t counter[4] = {static_cast<uint32_t>(quad), static_cast<uint32_t>(quad >> 32), step,
                               stream};
  uint32_t words[4];
  philox4x32_10(counter, key, words);
  normals(words, z);
}

}  // namespace philox
}  // namespace engine

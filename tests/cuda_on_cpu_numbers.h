// CUDA's numbers on the CPU: fast functions, bits of floats, 16-bit formats (cuda_on_cpu.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 a) { return __uint_as_float(uint32_t{a.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float a) {
  const uint32_t bits = __float_as_uint(a);
  if (a != a) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

struct __half {
  uint16_t bits;
};
inline float __half2float(__half a) {
  const uint32_t sign = uint32_t{a.bits & 0x8000u} << 16, rest = a.bits & 0x7FFFu;
  if (rest >= 0x7C00) return __uint_as_float(sign | 0x7F800000u | (rest & 0x3FF) << 13);
  const float magnitude = std::ldexp(__uint_as_float(rest << 13), 112);  // exponent bias 127 - 15
  return __uint_as_float(__float_as_uint(magnitude) | sign);
}
inline __half __float2half_rn(float a) {
  const uint32_t sign = (__float_as_uint(a) >> 16) & 0x8000;
  const float magnitude = std::fabs(a);
  if (a != a) return {0x7FFF};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7C00)};
  if (magnitude < 6.103515625e-5f)  // subnormal: a multiple of 2^-24, rounded by the host's mode
    return {
        static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(magnitude * 0x1p24f)))};
  const uint32_t bits = __float_as_uint(magnitude) - (112u << 23);
  return {static_cast<uint16_t>(sign | ((bits + 0xFFF + ((bits >> 13) & 1)) >> 13))};
}

struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __half2 __floats2half2_rn(float a, float b) {
  return {__float2half_rn(a), __float2half_rn(b)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

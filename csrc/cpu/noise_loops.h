// out[i] <- normal number first + i, for one instruction set.
#include "noise_simd.h"

template <class T>
void noise_range(void* data, int64_t n, uint64_t first, NoiseKey key) {
  T* out = static_cast<T*>(data);
  if constexpr (std::is_same_v<T, float>) {
    noise_floats(out, first, n, key);
  } else {
    float chunk[kNoiseRun];
    for (int64_t i0 = 0; i0 < n; i0 += kNoiseRun) {
      const int64_t count = n - i0 < kNoiseRun ? n - i0 : kNoiseRun;
      noise_floats(chunk, first + i0, count, key);
      int64_t i = 0;
      for (; i + W <= count; i += W) store(out + i0 + i, load(chunk + i));
      if (i < count) store(out + i0 + i, load(chunk + i, count - i), count - i);
    }
  }
}

static void noise(void* out, DType dtype, int64_t n, int64_t seed, uint32_t step, uint32_t stream,
                  uint64_t first) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  const NoiseKey key{static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32), step, stream};
  if (dtype == DType::f32) return noise_range<float>(out, n, first, key);
  if (dtype == DType::bf16) return noise_range<bf16>(out, n, first, key);
  noise_range<f16>(out, n, first, key);
}

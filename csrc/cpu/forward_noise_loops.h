// The loops of forward_noise.h for one instruction set.
#include "noise_simd.h"

struct Coefficients {
  float a, b, p, q;
};
static Coefficients coefficients(const ForwardNoise& p, int64_t n) {
  const int64_t t = p.t[n];
  if (t < 0 || t >= p.T) return {NAN, NAN, NAN, NAN};
  const float* row = p.coeffs + 4 * t;
  return {row[0], row[1], row[2], row[3]};
}

// Elements [begin, end) of a sample, as floats in contiguous order.
template <class T>
ENGINE_INLINE void read_run(float* to, const T* sample, bool channels_last, const ForwardNoise& p,
                            int64_t begin, int64_t end) {
  int64_t i = begin;
  if (!channels_last || p.C == 1) {
    for (; i + W <= end; i += W) store(to + i - begin, load(sample + i));
    if (i < end) store(to + i - begin, load(sample + i, end - i), end - i);
    return;
  }
  for (; i < end;) {
    const int64_t c = i / p.S, row_end = (c + 1) * p.S < end ? (c + 1) * p.S : end;
    for (; i < row_end; ++i) to[i - begin] = value_of(sample[(i - c * p.S) * p.C + c]);
  }
}
template <class T>
ENGINE_INLINE void write_run(T* sample, const float* from, bool channels_last,
                             const ForwardNoise& p, int64_t begin, int64_t end) {
  int64_t i = begin;
  if (!channels_last || p.C == 1) {
    for (; i + W <= end; i += W) store(sample + i, load(from + i - begin));
    if (i < end) store(sample + i, load(from + i - begin, end - i), end - i);
    return;
  }
  T rounded[kForwardNoiseChunk];
  for (; i + W <= end; i += W) store(rounded + i - begin, load(from + i - begin));
  if (i < end) store(rounded + i - begin, load(from + i - begin, end - i), end - i);
  for (i = begin; i < end;) {
    const int64_t c = i / p.S, row_end = (c + 1) * p.S < end ? (c + 1) * p.S : end;
    for (; i < row_end; ++i) sample[(i - c * p.S) * p.C + c] = rounded[i - begin];
  }
}

static void read_any(float* to, const void* data, DType dtype, bool channels_last,
                     const ForwardNoise& p, int64_t n, int64_t begin, int64_t end) {
  const int64_t skip = n * p.C * p.S;
  if (dtype == DType::f32) {
    read_run(to, static_cast<const float*>(data) + skip, channels_last, p, begin, end);
  } else if (dtype == DType::bf16) {
    read_run(to, static_cast<const bf16*>(data) + skip, channels_last, p, begin, end);
  } else if (dtype == DType::f16) {
    read_run(to, static_cast<const f16*>(data) + skip, channels_last, p, begin, end);
  } else {
    read_run(to, static_cast<const uint8_t*>(data) + skip, channels_last, p, begin, end);
    for (int64_t i = 0; i < end - begin; i += W) {
      store(to + i, load(to + i) * (1 / 127.5f) - 1.0f);
    }
  }
}
static void write_any(void* data, const float* from, DType dtype, bool channels_last,
                      const ForwardNoise& p, int64_t n, int64_t begin, int64_t end) {
  const int64_t skip = n * p.C * p.S;
  if (dtype == DType::f32) {
    write_run(static_cast<float*>(data) + skip, from, channels_last, p, begin, end);
  } else if (dtype == DType::bf16) {
    write_run(static_cast<bf16*>(data) + skip, from, channels_last, p, begin, end);
  } else {
    write_run(static_cast<f16*>(data) + skip, from, channels_last, p, begin, end);
  }
}

static void read_eps(float* to, const ForwardNoise& p, int64_t n, int64_t begin, int64_t end) {
  if (p.noise) {
    read_any(to, p.noise, DType::f32, p.noise_channels_last, p, n, begin, end);
    return;
  }
  const uint64_t seed = static_cast<uint64_t>(*p.seed);
  const NoiseKey key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
                     static_cast<uint32_t>(*p.step), 2};
  noise_floats(to, static_cast<uint64_t>(p.offset + n * p.C * p.S + begin), end - begin, key);
}

// Whole vectors at a time: buffers are longer than their contents, and what is beyond is ignored.
constexpr int64_t kRoom = kForwardNoiseChunk + W;

static void forward_noise_x_t(const ForwardNoise& p, int64_t n, int64_t begin, int64_t end,
                              void* x_t, DType dtype, bool channels_last) {
  float x[kRoom], eps[kRoom];
  read_any(x, p.x0, p.x0_dtype, p.x0_channels_last, p, n, begin, end);
  read_eps(eps, p, n, begin, end);
  const Coefficients at = coefficients(p, n);
  for (int64_t i = 0; i < end - begin; i += W) {
    store(x + i, fma(set1(at.a), load(x + i), at.b * load(eps + i)));
  }
  write_any(x_t, x, dtype, channels_last, p, n, begin, end);
}

// to[i] <- model_out - target
static void residuals(float* to, const ForwardNoise& p, const ForwardNoiseLoss& l, int64_t n,
                      int64_t begin, int64_t end) {
  float x[kRoom], eps[kRoom];
  const Coefficients at = coefficients(p, n);
  read_any(to, l.model_out, l.dtype, l.channels_last, p, n, begin, end);
  read_any(x, p.x0, p.x0_dtype, p.x0_channels_last, p, n, begin, end);
  read_eps(eps, p, n, begin, end);
  for (int64_t i = 0; i < end - begin; i += W) {
    const F target = fma(set1(at.p), load(x + i), at.q * load(eps + i));
    store(to + i, load(to + i) - target);
  }
}

// l' at r
ENGINE_INLINE F slope_of(F r, Loss loss) {
  if (loss == Loss::l1) return r > 0.0f ? set1(1) : r < 0.0f ? set1(-1) : r;
  if (loss == Loss::huber) return r > 1.0f ? set1(1) : r < -1.0f ? set1(-1) : r;
  return r + r;
}

static double forward_noise_loss(const ForwardNoise& p, const ForwardNoiseLoss& l, int64_t n,
                                 int64_t begin, int64_t end, float scale, void* grad) {
  float r[kRoom];
  const int64_t count = end - begin;
  residuals(r, p, l, n, begin, end);
  for (int64_t i = count; i < count + W; ++i) r[i] = 0;  // costs nothing, sums to nothing
  F sums = F{};
  for (int64_t i = 0; i < count; i += W) {
    const F v = load(r + i), size = v < 0.0f ? -v : v;
    if (l.loss == Loss::l1) {
      sums = sums + size;
    } else if (l.loss == Loss::l2) {
      sums = fma(v, v, sums);
    } else {
      sums = sums + (size < 1.0f ? 0.5f * v * v : size - 0.5f);
    }
    store(r + i, scale * slope_of(v, l.loss));
  }
  if (grad) write_any(grad, r, l.dtype, l.channels_last, p, n, begin, end);
  return sum(sums);
}

static void forward_noise_grad(const ForwardNoise& p, const ForwardNoiseLoss& l, int64_t n,
                               int64_t begin, int64_t end, float scale, void* dmodel_out) {
  float r[kRoom];
  residuals(r, p, l, n, begin, end);
  for (int64_t i = 0; i < end - begin; i += W) {
    store(r + i, scale * slope_of(load(r + i), l.loss));
  }
  write_any(dmodel_out, r, l.dtype, l.channels_last, p, n, begin, end);
}

static const ForwardNoiseLoops& forward_noise_loops() {
  static const ForwardNoiseLoops loops{forward_noise_x_t, forward_noise_loss, forward_noise_grad};
  return loops;
}

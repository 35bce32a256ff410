// The loops of reverse_step.h for one instruction set.
#include "noise_simd.h"

template <class P>  // ReverseStep, ReverseStepGeneral
static NoiseKey step_key(const P& p) {
  const uint64_t seed = static_cast<uint64_t>(*p.seed);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32),
          static_cast<uint32_t>(*p.step), 0};
}

ENGINE_INLINE F step_value(F x, F m, F z, const Step& step) {
  F x0 = fma(set1(step.a), x, step.b * m);
  x0 = x0 > step.clip ? set1(step.clip) : x0;  // a NaN passes
  x0 = x0 < -step.clip ? set1(-step.clip) : x0;
  return fma(set1(step.c), x0, fma(set1(step.d), x, step.s * z));
}

// Z: dtype of the noise; void for none.
template <class T, class M, class Z>
void step_values(const T* x, const M* m, const Z* z, T* out, int64_t n, const Step& step) {
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    F noise = F{};
    if constexpr (!std::is_void_v<Z>) noise = load(z + i);
    store(out + i, step_value(load(x + i), load(m + i), noise, step));
  }
  if (i < n) {
    F noise = F{};
    if constexpr (!std::is_void_v<Z>) noise = load(z + i, n - i);
    store(out + i, step_value(load(x + i, n - i), load(m + i, n - i), noise, step), n - i);
  }
}

template <class T, class M>
void step_range(const ReverseStep& p, const Step& step, void* x_next, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x);
  const M* m = static_cast<const M*>(p.model_out);
  T* out = static_cast<T*>(x_next);
  if (step.s == 0) {
    step_values<T, M, void>(x + begin, m + begin, nullptr, out + begin, end - begin, step);
  } else if (p.noise) {
    step_values(x + begin, m + begin, static_cast<const T*>(p.noise) + begin, out + begin,
                end - begin, step);
  } else {
    float noise[kNoiseRun];
    const NoiseKey key = step_key(p);
    for (int64_t i = begin; i < end; i += kNoiseRun) {
      const int64_t n = end - i < kNoiseRun ? end - i : kNoiseRun;
      noise_floats(noise, static_cast<uint64_t>(p.offset + i), n, key);
      step_values(x + i, m + i, noise, out + i, n, step);
    }
  }
}

static ReverseStepRange reverse_step_range(DType x, DType model_out) {
  static const ReverseStepRange table[3][3] = {
      {step_range<float, float>, step_range<float, bf16>, step_range<float, f16>},
      {step_range<bf16, float>, step_range<bf16, bf16>, step_range<bf16, f16>},
      {step_range<f16, float>, step_range<f16, bf16>, step_range<f16, f16>}};
  return table[static_cast<int>(x)][static_cast<int>(model_out)];
}

// ---- Tiles --------------------------------------------------------------------------------------
// A tile of a tensor <-> floats in contiguous order, rows of s1 - s0 elements. Buffers have kTile
// floats, a multiple of W: loops over them need no end of their own.

template <class T>
ENGINE_INLINE void widen_run(float* to, const T* from, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, n - i), n - i);
}
template <class T>
ENGINE_INLINE void narrow_run(T* to, const float* from, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  if (i < n) store(to + i, load(from + i, n - i), n - i);
}

template <class T>
void read_tile_as(float* tile, const StepOperand& o, const StepTile& at) {
  const int64_t positions = at.s1 - at.s0, channels = at.c1 - at.c0;
  const T* first = static_cast<const T*>(o.data) + at.n * o.sample;
  if (!o.channels_last) {
    first += at.c0 * o.pitch + at.s0;
    for (int64_t c = 0; c < channels; ++c) {
      widen_run(tile + c * positions, first + c * o.pitch, positions);
    }
    return;
  }
  float rows[kTile];  // (positions, channels)
  first += at.s0 * o.pitch + at.c0;
  if (channels == o.pitch) {
    widen_run(rows, first, positions * channels);
  } else {
    for (int64_t s = 0; s < positions; ++s) {
      widen_run(rows + s * channels, first + s * o.pitch, channels);
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t s = 0; s < positions; ++s) tile[c * positions + s] = rows[s * channels + c];
  }
}
static void read_tile(float* tile, const StepOperand& o, const StepTile& at) {
  if (o.dtype == DType::f32) return read_tile_as<float>(tile, o, at);
  if (o.dtype == DType::bf16) return read_tile_as<bf16>(tile, o, at);
  read_tile_as<f16>(tile, o, at);
}

template <class T>
void write_tile_as(const float* tile, void* data, bool channels_last, int64_t C, int64_t S,
                   const StepTile& at) {
  const int64_t positions = at.s1 - at.s0, channels = at.c1 - at.c0;
  T* first = static_cast<T*>(data) + at.n * C * S;
  if (!channels_last) {
    first += at.c0 * S + at.s0;
    for (int64_t c = 0; c < channels; ++c) {
      narrow_run(first + c * S, tile + c * positions, positions);
    }
    return;
  }
  float rows[kTile];
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t s = 0; s < positions; ++s) rows[s * channels + c] = tile[c * positions + s];
  }
  first += at.s0 * C + at.c0;
  if (channels == C) {
    narrow_run(first, rows, positions * channels);
  } else {
    for (int64_t s = 0; s < positions; ++s)
      narrow_run(first + s * C, rows + s * channels, channels);
  }
}
static void write_tile(const float* tile, void* data, DType dtype, const ReverseStepGeneral& p,
                       const StepTile& at) {
  if (dtype == DType::f32) return write_tile_as<float>(tile, data, p.channels_last, p.C, p.S, at);
  if (dtype == DType::bf16) return write_tile_as<bf16>(tile, data, p.channels_last, p.C, p.S, at);
  write_tile_as<f16>(tile, data, p.channels_last, p.C, p.S, at);
}

// e^x to 2 ulp, Cephes' expf: 2^n times a polynomial in what is left of x.
ENGINE_INLINE F exponential(F x) {
  x = x > 88.0f ? set1(88.0f) : x;  // a NaN passes
  x = x < -87.0f ? set1(-87.0f) : x;
  const F shifted = fma(x, set1(1.44269504088896341f), set1(12582912.0f));  // 1.5 2^23: rounds
  const F n = shifted - 12582912.0f;
  const F r = fma(n, set1(2.12194440e-4f), fma(n, set1(-0.693359375f), x));
  F y = fma(r, set1(1.9875691500e-4f), set1(1.3981999507e-3f));
  y = fma(y, r, set1(8.3334519073e-3f));
  y = fma(y, r, set1(4.1665795894e-2f));
  y = fma(y, r, set1(1.6666665459e-1f));
  y = fma(y, r, set1(5.0000001201e-1f));
  y = fma(y, r * r, r) + 1.0f;
  return y * as_float((as_bits(shifted) + 127u) << 23);
}

#define ENGINE_TILE_LOOP for (int64_t i = 0; i < count; i += W)

// x, grad (if there is one) <- the tile; x0 <- a x + b out + g0 grad.
ENGINE_INLINE void tile_x0(const ReverseStepGeneral& p, const StepRow& row, const StepTile& at,
                           float* x, float* grad, float* x0) {
  const int64_t count = (at.c1 - at.c0) * (at.s1 - at.s0);
  read_tile(x, p.x, at);
  read_tile(x0, p.model_out, at);
  if (p.uncond.data) {
    read_tile(grad, p.uncond, at);  // for now
    ENGINE_TILE_LOOP {
      const F uncond = load(grad + i);
      store(x0 + i, fma(set1(p.guidance), load(x0 + i) - uncond, uncond));
    }
  }
  ENGINE_TILE_LOOP store(x0 + i, fma(set1(row.a), load(x + i), row.b * load(x0 + i)));
  if (p.grad.data) {
    read_tile(grad, p.grad, at);
    if (row.g0 != 0) {
      ENGINE_TILE_LOOP store(x0 + i, fma(set1(row.g0), load(grad + i), load(x0 + i)));
    }
  }
}

// rest <- s sqrt(var) z + e x0_prev + g1 var grad; false: it is all zero.
ENGINE_INLINE bool tile_rest(const ReverseStepGeneral& p, const StepRow& row, const StepTile& at,
                             const float* grad, float* rest) {
  const int64_t positions = at.s1 - at.s0, count = (at.c1 - at.c0) * positions;
  const bool noisy = row.s != 0, pushed = p.grad.data && row.g1 != 0;
  const bool extrapolates = p.x0_prev.data && row.e != 0;
  if (!noisy && !pushed && !extrapolates) return false;
  float log_var[kTile], other[kTile];
  if (p.v.data && (noisy || pushed)) {
    const float half = 0.5f * (row.hi - row.lo), middle = 0.5f * (row.hi + row.lo);
    if (half != 0) read_tile(log_var, p.v, at);
    ENGINE_TILE_LOOP {
      const F v = half != 0 ? load(log_var + i) : F{};
      store(log_var + i, fma(set1(half), v, set1(middle)));
    }
  }
  if (noisy) {
    if (p.noise.data) {
      read_tile(rest, p.noise, at);
    } else {
      const NoiseKey key = step_key(p);
      for (int64_t c = at.c0; c < at.c1; ++c) {
        const int64_t first = p.offset + (at.n * p.C + c) * p.S + at.s0;
        noise_floats(rest + (c - at.c0) * positions, static_cast<uint64_t>(first), positions, key);
      }
    }
    ENGINE_TILE_LOOP store(rest + i, row.s * load(rest + i));
    if (p.v.data) {
      ENGINE_TILE_LOOP { store(rest + i, exponential(0.5f * load(log_var + i)) * load(rest + i)); }
    }
  } else {
    ENGINE_TILE_LOOP store(rest + i, F{});
  }
  if (extrapolates) {
    read_tile(other, p.x0_prev, at);
    ENGINE_TILE_LOOP store(rest + i, fma(set1(row.e), load(other + i), load(rest + i)));
  }
  if (pushed) {
    ENGINE_TILE_LOOP {
      const F push = row.g1 * (p.v.data ? exponential(load(log_var + i)) : set1(1.0f));
      store(rest + i, fma(push, load(grad + i), load(rest + i)));
    }
  }
  return true;
}

static void step_tile(const ReverseStepGeneral& p, const StepRow& row, const StepTile& at) {
  const int64_t count = (at.c1 - at.c0) * (at.s1 - at.s0);
  float x[kTile], grad[kTile], x0[kTile], rest[kTile];
  tile_x0(p, row, at, x, grad, x0);
  const float limit = p.threshold ? p.threshold[at.n] : p.clip;
  ENGINE_TILE_LOOP {
    F value = load(x0 + i);
    value = value > limit ? set1(limit) : value;  // a NaN passes
    value = value < -limit ? set1(-limit) : value;
    store(x0 + i, p.threshold ? value / limit : value);
  }
  if (p.x0) write_tile(x0, p.x0, p.dtype, p, at);
  const bool any = tile_rest(p, row, at, grad, rest);
  ENGINE_TILE_LOOP {
    const F tail = any ? load(rest + i) : F{};
    const F kept = fma(set1(row.d), load(x + i), tail);
    store(x + i, fma(set1(row.c), load(x0 + i), kept));
  }
  write_tile(x, p.x_next, p.dtype, p, at);
  if (p.model_in) write_tile(x, p.model_in, p.model_in_dtype, p, at);
}

static void step_magnitude(const ReverseStepGeneral& p, const StepRow& row, const StepTile& at,
                           float* out) {
  const int64_t count = (at.c1 - at.c0) * (at.s1 - at.s0);
  float x[kTile], grad[kTile], x0[kTile];
  tile_x0(p, row, at, x, grad, x0);
  ENGINE_TILE_LOOP store(x0 + i, as_float(as_bits(load(x0 + i)) & 0x7FFFFFFFu));
  __builtin_memcpy(out, x0, count * sizeof(float));
}
#undef ENGINE_TILE_LOOP

constexpr ReverseStepLoops reverse_step_loops = {step_tile, step_magnitude};

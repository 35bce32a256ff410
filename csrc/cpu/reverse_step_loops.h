// The loops of reverse_step.h for one instruction set.
#include "noise_simd.h"

static NoiseKey step_key(const ReverseStep& p) {
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

// A tile of a tensor <-> floats in contiguous order, rows of `positions` elements.
struct TileShape {
  int64_t C, S;               // of the tensor
  int64_t n, c0, c1, s0, s1;  // of the tile
};

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
void read_tile(float* tile, const T* data, bool channels_last, const TileShape& at) {
  const int64_t positions = at.s1 - at.s0, channels = at.c1 - at.c0;
  if (!channels_last) {
    for (int64_t c = 0; c < channels; ++c) {
      widen_run(tile + c * positions, data + (at.n * at.C + at.c0 + c) * at.S + at.s0, positions);
    }
    return;
  }
  float rows[kTile];  // (positions, channels)
  const T* first = data + (at.n * at.S + at.s0) * at.C + at.c0;
  if (channels == at.C) {
    widen_run(rows, first, positions * channels);
  } else {
    for (int64_t s = 0; s < positions; ++s) {
      widen_run(rows + s * channels, first + s * at.C, channels);
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t s = 0; s < positions; ++s) tile[c * positions + s] = rows[s * channels + c];
  }
}

template <class T>
void write_tile(const float* tile, T* data, bool channels_last, const TileShape& at) {
  const int64_t positions = at.s1 - at.s0, channels = at.c1 - at.c0;
  if (!channels_last) {
    for (int64_t c = 0; c < channels; ++c) {
      narrow_run(data + (at.n * at.C + at.c0 + c) * at.S + at.s0, tile + c * positions, positions);
    }
    return;
  }
  float rows[kTile];
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t s = 0; s < positions; ++s) rows[s * channels + c] = tile[c * positions + s];
  }
  T* first = data + (at.n * at.S + at.s0) * at.C + at.c0;
  if (channels == at.C) {
    narrow_run(first, rows, positions * channels);
  } else {
    for (int64_t s = 0; s < positions; ++s) {
      narrow_run(first + s * at.C, rows + s * channels, channels);
    }
  }
}

template <class T, class M>
void step_tile(const ReverseStep& p, const Step& step, void* x_next, int64_t n, int64_t c0,
               int64_t c1, int64_t s0, int64_t s1) {
  const TileShape at{p.C, p.S, n, c0, c1, s0, s1};
  const int64_t positions = s1 - s0, count = (c1 - c0) * positions;
  float x[kTile], m[kTile], noise[kTile];
  read_tile(x, static_cast<const T*>(p.x), p.x_channels_last, at);
  read_tile(m, static_cast<const M*>(p.model_out), p.model_out_channels_last, at);
  if (step.s == 0) {
    step_values<float, float, void>(x, m, nullptr, x, count, step);
  } else {
    if (p.noise) {
      read_tile(noise, static_cast<const T*>(p.noise), p.noise_channels_last, at);
    } else {
      const NoiseKey key = step_key(p);
      for (int64_t c = c0; c < c1; ++c) {
        const int64_t first = p.offset + (n * p.C + c) * p.S + s0;
        noise_floats(noise + (c - c0) * positions, static_cast<uint64_t>(first), positions, key);
      }
    }
    step_values(x, m, noise, x, count, step);
  }
  write_tile(x, static_cast<T*>(x_next), p.x_channels_last, at);
}

template <class T, class M>
constexpr ReverseStepLoops step_loops_of() {
  return {step_range<T, M>, step_tile<T, M>};
}
static const ReverseStepLoops& reverse_step_loops(DType x, DType model_out) {
  static const ReverseStepLoops table[3][3] = {
      {step_loops_of<float, float>(), step_loops_of<float, bf16>(), step_loops_of<float, f16>()},
      {step_loops_of<bf16, float>(), step_loops_of<bf16, bf16>(), step_loops_of<bf16, f16>()},
      {step_loops_of<f16, float>(), step_loops_of<f16, bf16>(), step_loops_of<f16, f16>()}};
  return table[static_cast<int>(x)][static_cast<int>(model_out)];
}

// The loops of adamw.h for one instruction set.

// a + w (b - a), from the end that is nearer, as torch.lerp.
ENGINE_INLINE F lerp(F a, F b, float w) {
  if (w > -0.5f && w < 0.5f) return fma(set1(w), b - a, a);
  return fma(set1(w - 1.0f), b - a, b);
}

// Elements `tail` and beyond take v's multiply and add in the other order: PyTorch's loop over what
// its vectors of 8 leave over does, and with fma the two differ in the last bit.
ENGINE_INLINE F second_moment(const AdamWFactors& f, F v, F g, int64_t tail) {
  const F square = f.v_weight * g, body = fma(square, g, v * f.beta2);
  if (tail >= W) return body;
  const F rest = fma(v, set1(f.beta2), square * g);
  F result = body;
  for (int64_t i = tail; i < W; ++i) result[i] = rest[i];
  return result;
}

struct AdamWState {
  F m, v, weight;
};
ENGINE_INLINE AdamWState adamw(const AdamWFactors& f, F grad, F m, F v, F weight, int64_t tail) {
  const F g = grad * f.grad_scale;
  m = lerp(m, g, f.m_weight);
  v = second_moment(f, v, g, tail);
  const F denominator = root(v) / f.root + f.eps;
  return {m, v, weight * f.keep + f.rate * m / denominator};
}

template <class G>
void adamw_range(const AdamWFactors& f, const AdamWTensor& t, int64_t begin, int64_t end) {
  const G* grad = static_cast<const G*>(t.grad);
  bf16* low = static_cast<bf16*>(t.low);
  int64_t i = begin;
  for (; i + W <= end; i += W) {
    const AdamWState s = adamw(f, load(grad + i), load(t.exp_avg + i), load(t.exp_avg_sq + i),
                               load(t.weight + i), W);
    store(t.exp_avg + i, s.m);
    store(t.exp_avg_sq + i, s.v);
    store(t.weight + i, s.weight);
    if (t.average) {
      store(t.average + i, lerp(load(t.average + i), s.weight, f.average_weight));
    }
    if (low) store(low + i, s.weight);
  }
  if (i == end) return;
  const int64_t n = end - i, vectors_of_8 = t.n - t.n % 8, tail = vectors_of_8 - i;
  const AdamWState s = adamw(f, load(grad + i, n), load(t.exp_avg + i, n),
                             load(t.exp_avg_sq + i, n), load(t.weight + i, n), tail < 0 ? 0 : tail);
  store(t.exp_avg + i, s.m, n);
  store(t.exp_avg_sq + i, s.v, n);
  store(t.weight + i, s.weight, n);
  if (t.average) {
    store(t.average + i, lerp(load(t.average + i, n), s.weight, f.average_weight), n);
  }
  if (low) store(low + i, s.weight, n);
}

static void adamw_step(const AdamWFactors& f, const AdamWTensor& t, int64_t begin, int64_t end) {
  if (t.grad_dtype == DType::f32) return adamw_range<float>(f, t, begin, end);
  adamw_range<bf16>(f, t, begin, end);
}

template <class G>
double squares_range(const G* grad, int64_t begin, int64_t end) {
  F sums[4] = {};
  int64_t i = begin;
  for (; i + 4 * W <= end; i += 4 * W) {
    ENGINE_UNROLL_FOUR
    for (int k = 0; k < 4; ++k) {
      const F g = load(grad + i + k * W);
      sums[k] = fma(g, g, sums[k]);
    }
  }
  for (; i < end; i += W) {
    const F g = end - i < W ? load(grad + i, end - i) : load(grad + i);
    sums[0] = fma(g, g, sums[0]);
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

static double squares(const Gradient& grad, int64_t begin, int64_t end) {
  if (grad.dtype == DType::f32) {
    return squares_range(static_cast<const float*>(grad.data), begin, end);
  }
  return squares_range(static_cast<const bf16*>(grad.data), begin, end);
}

static const AdamWLoops& adamw_loops() {
  static const AdamWLoops loops{adamw_step, squares};
  return loops;
}

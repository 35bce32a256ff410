// The loops of conv2d_winograd_bwd for one instruction set. Included by foreach_isa.h: no guard.

// The product takes ROWS channels of y x up to 3 vectors of channels of x at once.
#if ENGINE_LEVEL == 2
constexpr int WINO_GRAD_ROWS = 8;
#else
constexpr int WINO_GRAD_ROWS = 4;
#endif
constexpr int64_t WINO_GRAD_TILES = kWinogradGradTiles;

// Vectors of the panel that begins where `left` channels of x are left: 3, and at the end 2, as one
// vector alone has too few sums to hide the latency of an fma.
ENGINE_INLINE int64_t winograd_panel(int64_t left) {
  const int64_t n = left / W;
  return n == 1 ? 1 : n == 2 || n == 4 ? 2 : 3;
}

// Pixel (row, column) of an image of `channels`; zeros outside.
struct WinogradPixels {
  const float* image;
  const float* zeros;
  int64_t H, W_, channels;
  ENGINE_INLINE const float* at(int64_t row, int64_t column) const {
    const bool inside = row >= 0 && row < H && column >= 0 && column < W_;
    return inside ? image + (row * W_ + column) * channels : zeros;
  }
};

// Row i of B^T d B of a tile whose first pixel of y is (row, column): entry j at to + j * pitch, in
// panels of channels, each (TILES, panel).
ENGINE_INLINE void winograd_grad_input(const WinogradPixels& x, int i, int64_t row, int64_t column,
                                       int64_t tile, float* v, int64_t pitch) {
  constexpr int FIRST[4] = {0, 1, 2, 1}, SECOND[4] = {2, 2, 1, 3};  // d0-d2, d1+d2, d2-d1, d1-d3
  const F sign = set1(i == 1 ? 1.0f : -1.0f);
  const float *a[4], *b[4];
  for (int j = 0; j < 4; ++j) {
    a[j] = x.at(row - 1 + FIRST[i], column - 1 + j);
    b[j] = x.at(row - 1 + SECOND[i], column - 1 + j);
  }
  int64_t c = 0;
  while (c < x.channels) {
    const int64_t width = winograd_panel(x.channels - c) * W;
    float* to = v + c * WINO_GRAD_TILES + tile * width;
    for (const int64_t end = c + width; c < end; c += W, to += W) {
      F u[4];
      ENGINE_UNROLL
      for (int j = 0; j < 4; ++j) u[j] = fma(sign, load(b[j] + c), load(a[j] + c));
      store(to, u[0] - u[2]);
      store(to + pitch, u[1] + u[2]);
      store(to + 2 * pitch, u[2] - u[1]);
      store(to + 3 * pitch, u[1] - u[3]);
    }
  }
}

// Row i of A dy A^T for the channels [k0, k1) of y, in panels of 16, each (TILES, 16).
ENGINE_INLINE void winograd_grad_output(const WinogradPixels& dy, int i, int64_t row,
                                        int64_t column, int64_t tile, int64_t k0, int64_t k1,
                                        float* m, int64_t pitch) {
  const F sign = set1(i < 2 ? 1.0f : -1.0f);  // dy0, dy0 + dy1, dy0 - dy1, -dy1
  const float *a[2], *b[2];
  for (int j = 0; j < 2; ++j) {
    a[j] = i == 3 ? dy.zeros : dy.at(row, column + j);
    b[j] = i == 0 ? dy.zeros : dy.at(row + 1, column + j);
  }
  for (int64_t k = k0; k < k1; k += W) {
    float* to = m + (k - k0) / 16 * 16 * WINO_GRAD_TILES + tile * 16 + k % 16;
    const F left = fma(sign, load(b[0] + k), load(a[0] + k));
    const F right = fma(sign, load(b[1] + k), load(a[1] + k));
    store(to, left);
    store(to + pitch, left + right);
    store(to + 2 * pitch, left - right);
    store(to + 3 * pitch, F{} - right);
  }
}

// to = or += sum over `tiles` of m (tiles, ROWS of 16) x v (tiles, VECTORS).
template <int VECTORS>
inline void winograd_grad_product(const float* v, const float* m, int64_t tiles, bool begins,
                                  float* to) {
  F sums[WINO_GRAD_ROWS][VECTORS] = {};
  for (int64_t t = 0; t < tiles; ++t) {
    F x[VECTORS];
    ENGINE_UNROLL
    for (int c = 0; c < VECTORS; ++c) x[c] = load(v + (t * VECTORS + c) * W);
    ENGINE_UNROLL
    for (int r = 0; r < WINO_GRAD_ROWS; ++r) {
      const F one = set1(m[t * 16 + r]);
      ENGINE_UNROLL
      for (int c = 0; c < VECTORS; ++c) sums[r][c] = fma(one, x[c], sums[r][c]);
    }
  }
  ENGINE_UNROLL
  for (int r = 0; r < WINO_GRAD_ROWS; ++r) {
    ENGINE_UNROLL
    for (int c = 0; c < VECTORS; ++c) {
      float* at = to + (r * VECTORS + c) * W;
      store(at, begins ? sums[r][c] : load(at) + sums[r][c]);
    }
  }
}

// One entry's sums of a block of tiles for the channels [k0, k1) of y: in the workspace they lie in
// the panels of channels of x, each (K, panel).
inline void winograd_grad_entry(const Conv2dWinogradGrads& p, const float* v, const float* m,
                                int64_t k0, int64_t k1, int64_t tiles, bool begins, float* sums) {
  int64_t width = 0;
  for (int64_t c = 0; c < p.C; c += width) {
    const int64_t vectors = winograd_panel(p.C - c);
    width = vectors * W;
    const float* panel = v + c * WINO_GRAD_TILES;
    const auto product = vectors == 3   ? winograd_grad_product<3>
                         : vectors == 2 ? winograd_grad_product<2>
                                        : winograd_grad_product<1>;
    for (int64_t k = k0; k < k1; k += WINO_GRAD_ROWS) {
      product(panel, m + (k - k0) / 16 * 16 * WINO_GRAD_TILES + k % 16, tiles, begins,
              sums + c * p.K + k * width);
    }
  }
}

// db: entry (1, 1) of A dy A^T is the sum of a tile's 4 pixels.
inline void winograd_grad_bias(const float* m, int64_t channels, int64_t tiles, bool begins,
                               float* db) {
  for (int64_t k = 0; k < channels; k += W) {
    const float* from = m + k / 16 * 16 * WINO_GRAD_TILES + k % 16;
    F sum{};
    for (int64_t t = 0; t < tiles; ++t) sum += load(from + t * 16);
    store(db + k, begins ? sum : load(db + k) + sum);
  }
}

inline void winograd_grad_sums(const Conv2dWinogradGrads& p, int64_t first, int64_t last,
                               int64_t block, float* workspace, float* scratch) {
  const int64_t across = (p.W + 1) / 2, down = (p.H + 1) / 2, tiles = p.N * down * across;
  const int64_t v_pitch = winograd_grad_tile_pitch(p.C), m_pitch = winograd_grad_tile_pitch(p.K);
  const int64_t per_row = p.K / kWinogradGradChannels;
  float *v = scratch, *m = v + 4 * v_pitch, *zeros = m + 4 * m_pitch;
  for (int64_t i = 0; i < (p.C > p.K ? p.C : p.K); ++i) zeros[i] = 0;
  for (int64_t begin = 0; begin < tiles; begin += block) {
    const int64_t count = tiles - begin < block ? tiles - begin : block;
    for (int64_t i = first / per_row; i <= (last - 1) / per_row; ++i) {
      const int64_t from = i * per_row < first ? first : i * per_row;
      const int64_t to = (i + 1) * per_row < last ? (i + 1) * per_row : last;
      const int64_t k0 = (from - i * per_row) * kWinogradGradChannels;
      const int64_t k1 = (to - i * per_row) * kWinogradGradChannels;
      for (int64_t t = 0; t < count; ++t) {
        const int64_t tile = begin + t, n = tile / across / down;
        const int64_t row = tile / across % down * 2, column = tile % across * 2;
        const WinogradPixels x{p.x + n * p.H * p.W * p.C, zeros, p.H, p.W, p.C};
        const WinogradPixels dy{p.dy + n * p.H * p.W * p.K, zeros, p.H, p.W, p.K};
        winograd_grad_input(x, static_cast<int>(i), row, column, t, v, v_pitch);
        winograd_grad_output(dy, static_cast<int>(i), row, column, t, k0, k1, m, m_pitch);
      }
      if (i == 1 && p.dbias) {
        winograd_grad_bias(m + m_pitch, k1 - k0, count, begin == 0, p.dbias + k0);
      }
      for (int j = 0; j < 4; ++j) {
        winograd_grad_entry(p, v + j * v_pitch, m + j * m_pitch, k0, k1, count, begin == 0,
                            workspace + (4 * i + j) * winograd_grad_pitch(p));
      }
    }
  }
}

// G^T of 4 numbers.
ENGINE_INLINE void winograd_gt(const F* u, F* out) {
  const F half = set1(0.5f), plus = (u[1] + u[2]) * half;
  out[0] = u[0] + plus, out[1] = (u[1] - u[2]) * half, out[2] = plus + u[3];
}

inline void winograd_grad_weights(const Conv2dWinogradGrads& p, int64_t first, int64_t last,
                                  const float* workspace) {
  const int64_t pitch = winograd_grad_pitch(p);
  for (int64_t k = first; k < last; ++k) {
    int64_t c = 0;
    while (c < p.C) {
      const int64_t width = winograd_panel(p.C - c) * W;
      const float* from = workspace + c * p.K + k * width;
      for (const int64_t end = c + width; c < end; c += W, from += W) {
        F rows[3][4];
        ENGINE_UNROLL
        for (int j = 0; j < 4; ++j) {
          F u[4], g[3];
          ENGINE_UNROLL
          for (int i = 0; i < 4; ++i) u[i] = load(from + (4 * i + j) * pitch);
          winograd_gt(u, g);
          rows[0][j] = g[0], rows[1][j] = g[1], rows[2][j] = g[2];
        }
        float* to = p.dweight + k * p.k_stride + c * p.c_stride;
        ENGINE_UNROLL
        for (int i = 0; i < 3; ++i) {
          F taps[3];
          winograd_gt(rows[i], taps);
          for (int j = 0; j < 3; ++j) {
            float* at = to + (3 * i + j) * p.tap_stride;
            if (p.c_stride == 1) {
              store(at, taps[j]);
            } else {
              for (int l = 0; l < W; ++l) at[l * p.c_stride] = taps[j][l];
            }
          }
        }
      }
    }
  }
}

inline const WinogradGradLoops& winograd_grad_loops() {
  static const WinogradGradLoops loops{winograd_grad_sums, winograd_grad_weights};
  return loops;
}

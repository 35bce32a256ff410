// The loops of conv2d_winograd for one instruction set. Included by foreach_isa.h, and by
// conv2d_winograd_bf16.cpp with ENGINE_BF16_DOTS: no guard.

// The product takes ROWS tiles x COLUMNS channels of y at once: as many sums as there are registers
// for, beside a row of weights. Weights lie in blocks of 16 channels.
#if ENGINE_LEVEL == 2
constexpr int WINO_ROWS = 12, WINO_LEAST = 4, WINO_VECTORS = 2;
#elif ENGINE_LEVEL == 1
constexpr int WINO_ROWS = 6, WINO_LEAST = 2, WINO_VECTORS = 2;
#else
constexpr int WINO_ROWS = 2, WINO_LEAST = 2, WINO_VECTORS = 4;
#endif
constexpr int WINO_COLUMNS = WINO_VECTORS * W;

#ifdef ENGINE_BF16_DOTS
typedef bf16 WinogradNumber;
// 32 channels of x at a time, summed as two vectors of floats: the even ones, then the odd ones, in
// which order they are stored, and the weights packed (engine/winograd.py): the natural one would
// take two shuffles more.
typedef Pair WinogradVector;
constexpr int WINO_WIDTH = W2;
ENGINE_INLINE Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
ENGINE_INLINE Pair winograd_load(const bf16* p) { return load2(p); }
ENGINE_INLINE void winograd_store(bf16* p, Pair v) {
  write(p, (U)_mm512_cvtne2ps_pbh((__m512)v.b, (__m512)v.a));
}
ENGINE_INLINE void winograd_store(bf16* p, F v) { write(p, (H)_mm512_cvtneps_pbh((__m512)v)); }
#else
typedef float WinogradNumber;
typedef F WinogradVector;
constexpr int WINO_WIDTH = W;
ENGINE_INLINE F winograd_load(const float* p) { return load(p); }
ENGINE_INLINE void winograd_store(float* p, F v) { store(p, v); }
#endif
typedef WinogradNumber WN;
typedef Conv2dWinograd<WN> WinogradCall;

// Tile `index` of all images: its image, and the first of its 2x2 pixels.
struct WinogradTile {
  int64_t n, row, column;
  ENGINE_INLINE WinogradTile(const WinogradCall& p, int64_t index) {
    const int64_t across = (p.W + 1) / 2, down = (p.H + 1) / 2;
    column = index % across * 2;
    row = index / across % down * 2;
    n = index / across / down;
  }
};

// out[16][.] = B^T d B for `channels` channels of one tile, d its 4x4 pixels. Of an image whose
// pixels stand for 2x2 each they are 3x3 pixels a, b, c: rows (a, b, b, c), so that B^T d is
// (a - b, 2 b, 0, b - c), along both axes: 7 entries of 16 are 0 and are left out.
template <bool UP>
ENGINE_INLINE void winograd_input(const WinogradCall& p, const WN* x, int64_t channels,
                                  WinogradTile t, WN* out, int64_t pitch) {
  typedef WinogradVector V;
  constexpr int SIDE = UP ? 3 : 4;
  const int64_t H = UP ? p.H / 2 : p.H, width = UP ? p.W / 2 : p.W;
  const int64_t row = (UP ? t.row / 2 : t.row) - 1, column = (UP ? t.column / 2 : t.column) - 1;
  const WN* from[SIDE][SIDE];  // null: outside, 0
  bool all = true;
  for (int i = 0; i < SIDE; ++i) {
    for (int j = 0; j < SIDE; ++j) {
      const int64_t r = row + i, c = column + j;
      const bool inside = r >= 0 && r < H && c >= 0 && c < width;
      from[i][j] = inside ? x + ((t.n * H + r) * width + c) * channels : nullptr;
      all &= inside;
    }
  }
  for (int64_t c = 0; c < channels; c += WINO_WIDTH) {
    V u[4][SIDE];
    ENGINE_UNROLL
    for (int j = 0; j < SIDE; ++j) {
      V d[SIDE];
      ENGINE_UNROLL
      for (int i = 0; i < SIDE; ++i) {
        d[i] = all || from[i][j] ? winograd_load(from[i][j] + c) : V{};
      }
      if constexpr (UP) {
        u[0][j] = d[0] - d[1], u[1][j] = d[1] + d[1], u[3][j] = d[1] - d[2];
      } else {
        u[0][j] = d[0] - d[2], u[1][j] = d[1] + d[2];
        u[2][j] = d[2] - d[1], u[3][j] = d[1] - d[3];
      }
    }
    ENGINE_UNROLL
    for (int i = 0; i < 4; ++i) {
      WN* to = out + 4 * i * pitch + c;
      if constexpr (UP) {
        if (i == 2) continue;
        winograd_store(to, u[i][0] - u[i][1]);
        winograd_store(to + pitch, u[i][1] + u[i][1]);
        winograd_store(to + 3 * pitch, u[i][1] - u[i][2]);
      } else {
        winograd_store(to, u[i][0] - u[i][2]);
        winograd_store(to + pitch, u[i][1] + u[i][2]);
        winograd_store(to + 2 * pitch, u[i][2] - u[i][1]);
        winograd_store(to + 3 * pitch, u[i][1] - u[i][3]);
      }
    }
  }
}

// m = v u: (ROWS, C) x (C, COLUMNS). u: blocks of 16 channels, `block` apart.
template <int ROWS>
inline void winograd_product(const WN* v, const WN* u, int64_t block, int64_t C, float* m) {
  F sums[ROWS][WINO_VECTORS] = {};
#ifdef ENGINE_BF16_DOTS
  for (int64_t c = 0; c < C; c += 2, u += 32) {  // a pair of channels at a time
    const __m512bh w[] = {(__m512bh)read<U>(u), (__m512bh)read<U>(u + block)};
    ENGINE_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh two = (__m512bh)_mm512_set1_epi32(read<int32_t>(v + r * C + c));
      ENGINE_UNROLL
      for (int k = 0; k < 2; ++k) {
        sums[r][k] = (F)_mm512_dpbf16_ps((__m512)sums[r][k], two, w[k]);
      }
    }
  }
#else
  for (int64_t c = 0; c < C; ++c) {
    F w[WINO_VECTORS];
    ENGINE_UNROLL
    for (int k = 0; k < WINO_VECTORS; ++k) {
      w[k] = load(u + (k * W / 16) * block + c * 16 + k * W % 16);
    }
    ENGINE_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const F one = set1(v[r * C + c]);
      ENGINE_UNROLL
      for (int k = 0; k < WINO_VECTORS; ++k) sums[r][k] = fma(one, w[k], sums[r][k]);
    }
  }
#endif
  ENGINE_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    ENGINE_UNROLL
    for (int k = 0; k < WINO_VECTORS; ++k) store(m + r * WINO_COLUMNS + k * W, sums[r][k]);
  }
}

// Of `count` tiles, the last ones as few as the product can have.
inline void winograd_products(const WN* v, const WN* u, int64_t block, int64_t C, int64_t count,
                              float* m) {
  for (int64_t t = 0; t < count;
       t += WINO_ROWS, v += WINO_ROWS * C, m += WINO_ROWS * WINO_COLUMNS) {
    if constexpr (WINO_LEAST < WINO_ROWS) {
      if (count - t <= WINO_LEAST) return winograd_product<WINO_LEAST>(v, u, block, C, m);
      if (count - t <= 2 * WINO_LEAST) return winograd_product<2 * WINO_LEAST>(v, u, block, C, m);
    }
    winograd_product<WINO_ROWS>(v, u, block, C, m);
  }
}

// y = A^T m A + bias + add, for COLUMNS channels from k0 of one tile.
template <bool UP>
ENGINE_INLINE void winograd_output(const WinogradCall& p, WinogradTile t, const float* m,
                                   int64_t pitch, int64_t k0) {
  const int rows = t.row + 1 < p.H ? 2 : 1, columns = t.column + 1 < p.W ? 2 : 1;
  const int64_t at = ((t.n * p.H + t.row) * p.W + t.column) * p.K + k0;
  ENGINE_UNROLL
  for (int k = 0; k < WINO_VECTORS; ++k) {
    F s[2][4];
    ENGINE_UNROLL
    for (int j = 0; j < 4; ++j) {
      F e[4];
      ENGINE_UNROLL
      for (int i = 0; i < 4; ++i) {
        e[i] = UP && (i == 2 || j == 2) ? F{} : load(m + (4 * i + j) * pitch + k * W);
      }
      s[0][j] = e[0] + e[1] + e[2];
      s[1][j] = e[1] - e[2] - e[3];
    }
    const F bias = p.bias ? load(p.bias + k0 + k * W) : F{};
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) {
        const int64_t to = at + (i * p.W + j) * p.K + k * W;
        const F* e = s[i];
        F value = (j ? e[1] - e[2] - e[3] : e[0] + e[1] + e[2]) + bias;
        if (p.add) value += load(p.add + to);
        winograd_store(p.y + to, value);
      }
    }
  }
}

template <bool UP>
inline void winograd_block(const WinogradCall& p, WinogradPart part, WN* v, float* m) {
  const int64_t count = part.count, padded = (count + WINO_ROWS - 1) / WINO_ROWS * WINO_ROWS;
  const int64_t v_pitch = winograd_pitch<WN>(padded, p.C), C1 = p.C - p.C2;
  const int64_t m_pitch = winograd_pitch(padded, WINO_COLUMNS), block = 16 * 16 * p.C;
  for (int64_t t = 0; t < count; ++t) {
    const WinogradTile tile(p, part.first + t);
    winograd_input<UP>(p, p.x, C1, tile, v + t * p.C, v_pitch);
    if (p.C2) winograd_input<UP>(p, p.x2, p.C2, tile, v + t * p.C + C1, v_pitch);
  }
  for (int64_t k = part.k0; k < part.k1; k += WINO_COLUMNS) {
    const WN* u = p.weight + k / 16 * block + k % 16;
    for (int entry = 0; entry < 16; ++entry) {
      if (UP && (entry / 4 == 2 || entry % 4 == 2)) continue;
      winograd_products(v + entry * v_pitch, u + entry * 16 * p.C, block, p.C, count,
                        m + entry * m_pitch);
    }
    for (int64_t t = 0; t < count; ++t) {
      winograd_output<UP>(p, WinogradTile(p, part.first + t), m + t * WINO_COLUMNS, m_pitch, k);
    }
  }
}

#ifdef ENGINE_BF16_DOTS
constexpr auto winograd_filters = nullptr;
#else
// G u of 3 numbers.
ENGINE_INLINE void winograd_g(F a, F b, F c, F* out) {
  const F half = set1(0.5f), ends = a + c;
  out[0] = a, out[1] = (ends + b) * half, out[2] = (ends - b) * half, out[3] = c;
}

inline void winograd_filters(const WinogradFilters& f, int64_t k0, float* packed) {
  for (int64_t c = 0; c < f.C; ++c) {
    const float* from = f.w + k0 * f.k_stride + c * f.c_stride;
    float taps[9][16];
    for (int tap = 0; tap < 9; ++tap) {
      const float* first = from + (f.flip ? 8 - tap : tap) * f.tap_stride;
      for (int k = 0; k < 16; ++k) taps[tap][k] = first[k * f.k_stride];
    }
    for (int k = 0; k < 16; k += W) {
      F rows[3][4];  // G w, transposed
      ENGINE_UNROLL
      for (int j = 0; j < 3; ++j) {
        winograd_g(load(taps[j] + k), load(taps[3 + j] + k), load(taps[6 + j] + k), rows[j]);
      }
      ENGINE_UNROLL
      for (int i = 0; i < 4; ++i) {
        F entries[4];
        winograd_g(rows[0][i], rows[1][i], rows[2][i], entries);
        ENGINE_UNROLL
        for (int j = 0; j < 4; ++j) store(packed + ((4 * i + j) * f.C + c) * 16 + k, entries[j]);
      }
    }
  }
}

#endif

inline const WinogradLoops<WN>& winograd_loops() {
  static const WinogradLoops<WN> loops{
      WINO_ROWS,       WINO_LEAST, WINO_COLUMNS, winograd_block<false>, winograd_block<true>,
      winograd_filters};
  return loops;
}

// What attention's two AMX files share: the shapes of packed operands, packing, and the vector
// functions; amx.h has the instructions. Compiled for AVX-512 with bfloat16; included once per
// file, after ENGINE_AMX is known to be defined.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "amx.h"
#include "attention.h"

ENGINE_BF16_TARGET

namespace engine {
namespace amx {

// How the head dimension is cut where it is the inner one of a product: `steps` tiles of `bytes`
// per row (`bytes` / 4 rows of a paired tile). One narrow step below 32, else whole tiles.
struct Inner {
  int64_t steps, bytes;
  explicit Inner(int64_t D)
      : steps(D < 32 ? 1 : (D + 31) / 32), bytes(D < 32 ? (D + 1) / 2 * 4 : kLine) {}
  int64_t pairs() const { return bytes / 4; }
};

// Tiles 0 to 3 are results. 4 and 5 are A and B of products along the head dimension, 6 and 7 of
// products along queries or keys.
class Tiles {
 public:
  explicit Tiles(const Inner& inner) {
    TileConfig config;
    config.bytes[4] = static_cast<uint16_t>(inner.bytes);
    config.rows[5] = static_cast<uint8_t>(inner.pairs());
    config.load();
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() { asm volatile("tilerelease"); }
};

// Where the tiles of an operand lie: tile (i, step) at data + i * tile + step * next.
struct Panel {
  const char* data;
  int64_t tile, next, stride;
};

// Tiles m * N + n of the results, m < M <= 2, n < N <= 2: += sum over steps of A[m] B[n]. The order
// reuses the tile just loaded: a load per multiplication.
template <int A, int B, int M, int N>
ENGINE_INLINE void multiply(int64_t steps, Panel a, Panel b) {
  for (int64_t i = 0; i < steps; ++i) {
    const char* a0 = a.data + i * a.next;
    const char* b0 = b.data + i * b.next;
    tile_load<A>(a0, a.stride);
    tile_load<B>(b0, b.stride);
    tile_multiply<0, A, B>();
    if constexpr (N == 2) {
      tile_load<B>(b0 + b.tile, b.stride);
      tile_multiply<1, A, B>();
    }
    if constexpr (M == 2) {
      tile_load<A>(a0 + a.tile, a.stride);
      tile_multiply<N + N - 1, A, B>();
    }
    if constexpr (M == 2 && N == 2) {
      tile_load<B>(b0, b.stride);
      tile_multiply<2, A, B>();
    }
  }
}

// The M x N results as a matrix of float32 with `stride` bytes per row.
template <int M, int N>
ENGINE_INLINE void zero_results() {
  tile_zero<0>();
  if constexpr (M * N > 1) tile_zero<1>();
  if constexpr (M * N > 2) tile_zero<2>(), tile_zero<3>();
}
template <int M, int N>
ENGINE_INLINE void load_results(const char* from, int64_t stride) {
  tile_load<0>(from, stride);
  if constexpr (N == 2) tile_load<1>(from + kLine, stride);
  if constexpr (M == 2) tile_load<N>(from + kTile * stride, stride);
  if constexpr (M == 2 && N == 2) tile_load<3>(from + kTile * stride + kLine, stride);
}
template <int M, int N>
ENGINE_INLINE void store_results(char* to, int64_t stride) {
  tile_store<0>(to, stride);
  if constexpr (N == 2) tile_store<1>(to + kLine, stride);
  if constexpr (M == 2) tile_store<N>(to + kTile * stride, stride);
  if constexpr (M == 2 && N == 2) tile_store<3>(to + kTile * stride + kLine, stride);
}

// ---- packing ------------------------------------------------------------------------------------

// Rows of D bfloat16 elements, `stride` bytes apart.
struct Rows {
  const char* data;
  int64_t stride, count, D;
};

// Elements [d, d + 32) of a row; 0 beyond the matrix.
ENGINE_INLINE __m512i load_words(const Rows& m, int64_t row, int64_t d) {
  const __mmask32 mask = row < m.count ? words_mask(m.D - d) : 0;
  return _mm512_maskz_loadu_epi16(mask, m.data + row * m.stride + 2 * d);
}

// 16 x 16 dwords.
ENGINE_INLINE void transpose(__m512i* r) {
  __m512i t[16];
  ENGINE_UNROLL
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  ENGINE_UNROLL
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  ENGINE_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
  ENGINE_UNROLL
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
  }
}

// A along the head dimension: [step][row][bytes], `rows` a multiple of 16.
inline void pack_rows(const Rows& m, const Inner& inner, int64_t rows, char* to) {
  for (int64_t step = 0; step < inner.steps; ++step) {
    for (int64_t row = 0; row < rows; ++row, to += inner.bytes) {
      const __m512i v = load_words(m, row, 32 * step);
      _mm512_mask_storeu_epi32(to, lanes_mask(inner.pairs()), v);
    }
  }
}

// 4 x 4 dwords in each quarter, of 4 vectors.
ENGINE_INLINE void transpose_quarters(__m512i* r) {
  const __m512i lo01 = _mm512_unpacklo_epi32(r[0], r[1]), hi01 = _mm512_unpackhi_epi32(r[0], r[1]);
  const __m512i lo23 = _mm512_unpacklo_epi32(r[2], r[3]), hi23 = _mm512_unpackhi_epi32(r[2], r[3]);
  r[0] = _mm512_unpacklo_epi64(lo01, lo23), r[1] = _mm512_unpackhi_epi64(lo01, lo23);
  r[2] = _mm512_unpacklo_epi64(hi01, hi23), r[3] = _mm512_unpackhi_epi64(hi01, hi23);
}

// 16 rows, 32 columns from d on, transposed by pairs of columns: r[j] has columns d + 2 j and
// d + 2 j + 1, row i in lane i. Up to 8 columns take an eighth of the shuffles, and make r[0 .. 3].
ENGINE_INLINE void load_columns(const Rows& m, int64_t row, int64_t d, __m512i* r) {
  if (m.D <= 8) {
    const __mmask8 mask = static_cast<__mmask8>((1u << m.D) - 1);
    __m128i rows[16];
    ENGINE_UNROLL
    for (int i = 0; i < 16; ++i) {
      rows[i] = _mm_maskz_loadu_epi16(row + i < m.count ? mask : 0, m.data + (row + i) * m.stride);
    }
    ENGINE_UNROLL
    for (int j = 0; j < 4; ++j) {  // row 4 i + j in quarter i of vector j
      const __m256i lo = _mm256_inserti128_si256(_mm256_castsi128_si256(rows[j]), rows[4 + j], 1);
      const __m256i hi =
          _mm256_inserti128_si256(_mm256_castsi128_si256(rows[8 + j]), rows[12 + j], 1);
      r[j] = _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1);
    }
    return transpose_quarters(r);
  }
  ENGINE_UNROLL
  for (int i = 0; i < 16; ++i) r[i] = load_words(m, row + i, d);
  transpose(r);
}

// 32 rows, 16 columns from d on, paired: r[j] has rows row + 2 j and row + 2 j + 1.
ENGINE_INLINE void load_pairs(const Rows& m, int64_t row, int64_t d, __m512i* r) {
  const __mmask16 mask = lanes_mask(m.D - d);
  ENGINE_UNROLL
  for (int j = 0; j < 16; ++j) {
    const int64_t at = row + 2 * j;
    const char* from = m.data + at * m.stride + 2 * d;
    const __m256i lo = _mm256_maskz_loadu_epi16(at < m.count ? mask : 0, from);
    const __m256i hi = _mm256_maskz_loadu_epi16(at + 1 < m.count ? mask : 0, from + m.stride);
    r[j] = _mm512_or_si512(_mm512_cvtepu16_epi32(lo),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(hi), 16));
  }
}
ENGINE_INLINE void store_tile(char* to, const __m512i* r) {
  ENGINE_UNROLL
  for (int j = 0; j < 16; ++j) _mm512_storeu_si512(to + j * kLine, r[j]);
}

// The transpose as A: tile (columns 16 c .., rows 32 s ..) at to + (c * steps + s) * kTileBytes.
inline void pack_transposed(const Rows& m, int64_t steps, char* to) {
  for (int64_t d = 0; d < m.D; d += kTile) {
    for (int64_t s = 0; s < steps; ++s, to += kTileBytes) {
      __m512i r[16];
      load_pairs(m, 32 * s, d, r);
      transpose(r);
      store_tile(to, r);
    }
  }
}

// A view's head as rows; where its elements are not neighbours, a copy in `dense`.
inline Rows rows_of(const AttentionView& view, int64_t n, int64_t h, int64_t count, int64_t D,
                    char* dense) {
  const char* from = head_of(view, n, h, 2);
  if (view.d == 1) return {from, view.s * 2, count, D};
  uint16_t* to = reinterpret_cast<uint16_t*>(dense);
  for (int64_t s = 0; s < count; ++s) {
    const uint16_t* row = reinterpret_cast<const uint16_t*>(from) + s * view.s;
    for (int64_t d = 0; d < D; ++d) *to++ = row[d * view.d];
  }
  return {dense, D * 2, count, D};
}

// ---- vectors ------------------------------------------------------------------------------------

ENGINE_INLINE __m512 load_floats(const void* p) { return _mm512_loadu_ps(p); }

// 2^z to 8e-5 of it, and P is rounded to 4e-3; 2^-inf = 0, of NaN NaN.
ENGINE_INLINE __m512 exp2(__m512 z) {
  const __m512 r = _mm512_reduce_ps(z, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 e = _mm512_fmadd_ps(r, _mm512_set1_ps(0.0780245220f), _mm512_set1_ps(0.2260671564f));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(0.6958335402f));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(0.9999252186f));
  return _mm512_scalef_ps(e, z);
}

// The same to 1e-7 and exact of 0: for what is multiplied once per block of keys.
inline __m512 exp2_of_factor(__m512 z) {
  const __m512 r = _mm512_reduce_ps(z, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 e = _mm512_fmadd_ps(r, _mm512_set1_ps(0.0018665516f), _mm512_set1_ps(0.0090182797f));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(0.0557990424f));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(0.2401646550f));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(0.6931513042f));
  e = _mm512_fmadd_ps(e, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(e, z);
}

// ln s of s >= 1, to 1e-7 of it or of 1; ln 0 = -inf. With s = 2^e m, 3/4 <= m < 3/2, and
// t = (m - 1) / (m + 1): ln m = 2 (t + t^3 / 3 + t^5 / 5 + ...).
inline __m512 log(__m512 s) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 m = _mm512_getmant_ps(s, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_src);
  const __m512 e = _mm512_getexp_ps(_mm512_div_ps(s, m));
  const __m512 t = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one));
  const __m512 u = _mm512_mul_ps(t, t);
  __m512 v = _mm512_fmadd_ps(u, _mm512_set1_ps(2.0f / 9), _mm512_set1_ps(2.0f / 7));
  v = _mm512_fmadd_ps(v, u, _mm512_set1_ps(2.0f / 5));
  v = _mm512_fmadd_ps(v, u, _mm512_set1_ps(2.0f / 3));
  v = _mm512_fmadd_ps(v, u, _mm512_set1_ps(2.0f));
  return _mm512_fmadd_ps(e, _mm512_set1_ps(0.693147181f), _mm512_mul_ps(v, t));
}

// Two rows of 16 floats as one paired row of bfloat16, rounded to nearest even.
ENGINE_INLINE __m512i pair_up(__m512 even, __m512 odd) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// Elements [d, d + 32) of a row of a head, of which only the existing are written.
ENGINE_INLINE void store_words(const AttentionView& view, char* head, int64_t row, int64_t d,
                               int64_t D, __m512i words) {
  uint16_t* to = reinterpret_cast<uint16_t*>(head) + row * view.s + d * view.d;
  if (view.d == 1) return _mm512_mask_storeu_epi16(to, words_mask(D - d), words);
  uint16_t each[32];
  _mm512_storeu_si512(each, words);
  for (int64_t c = 0; c < 32 && d + c < D; ++c) to[c * view.d] = each[c];
}

// Sixteen rows of a head, columns [d, d + 32), from columns: element (i, c) is
// by_column[c * 16 * pitch + i] * factor[i]. The rows are row + i or, kGap 4, every other four:
// row + 8 (i / 4) + i % 4.
template <int kGap>
void store_transposed(const AttentionView& view, char* head, int64_t row, int64_t rows, int64_t d,
                      int64_t D, const float* by_column, int64_t pitch, __m512 factor) {
  __m512i r[16];
  const int64_t pairs = (D - d + 1) / 2;
  ENGINE_UNROLL
  for (int j = 0; j < 16; ++j) {
    r[j] = _mm512_setzero_si512();
    if (j >= pairs) continue;
    const float* at = by_column + (d + 2 * j) * 16 * pitch;
    r[j] = pair_up(_mm512_mul_ps(load_floats(at), factor),
                   _mm512_mul_ps(load_floats(at + 16 * pitch), factor));
  }
  if (D <= 8) {
    transpose_quarters(r);
    alignas(64) char quarters[4 * kLine];
    for (int j = 0; j < 4; ++j) _mm512_store_si512(quarters + j * kLine, r[j]);
    for (int i = 0; i < 16; ++i) {
      const int64_t at = row + i + i / 4 * kGap;
      const __m128i words = _mm_load_si128((const __m128i*)(quarters + i % 4 * kLine + i / 4 * 16));
      if (at < rows) store_words(view, head, at, 0, D, _mm512_zextsi128_si512(words));
    }
    return;
  }
  transpose(r);
  for (int i = 0; i < 16; ++i) {
    const int64_t at = row + i + i / 4 * kGap;
    if (at < rows) store_words(view, head, at, d, D, r[i]);
  }
}

}  // namespace amx
}  // namespace engine

ENGINE_BF16_TARGET_END

// Attention of bfloat16 by AMX, backward (forward: attention_amx.cpp).
//
//   P = exp(q k^T * scale - lse), delta = rowsum(dout * out), dS = P * (dout v^T - delta)
//   dv = P^T dout,  dk = dS^T q * scale,  dq = dS k * scale
//
// Blocking: per head, up to 256 queries at a time (a chunk, fewer where keys are many), against
// blocks of 32 keys. S^T = K Q^T and dP^T = V dO^T have keys as rows and queries as lanes; rounded
// to bfloat16, their rows are A of dV and dK, whose sums over the chunk stay in tiles, and paired
// by keys B of dQ^T = K^T dS^T, made once all keys of the chunk are through. -delta is what the sum
// of dP starts from. Over several chunks dK and dV add up in float32.
//
// Precision: P and dS are rounded to bfloat16 as factors, all sums are of float32.
//
// Parallel: over heads; threads change no bit.
//
// Read: q, k, v, out, dout, lse. Refused: nothing of bfloat16.
//
// Bound: 15 vector operations for 16 elements of P, and the tiles' five products.
#include "attention.h"
#include "attention_amx.h"
#include "isa.h"

#ifdef ENGINE_AMX
#include <cfloat>
#include <cmath>

#include "attention_amx_tiles.h"

ENGINE_BF16_TARGET

namespace engine {
namespace amx {

struct Backward {
  const Attention& p;
  const AttentionGrads& grads;
  Inner inner{p.D};
  int64_t keys = round_up(p.Sk, 32), columns = round_up(p.D, 16);
  int64_t chunk = chunk_of(p.S, keys);  // queries, a multiple of 32
  bool single = p.S <= chunk;
  float scale = std::fabs(p.scale) > 0 ? std::fabs(p.scale) * 1.44269504f : FLT_MIN;  // of log2

  // dS of a chunk stays in half a MB.
  static int64_t chunk_of(int64_t S, int64_t keys) {
    const int64_t fits = (int64_t{1} << 18) / keys / 32 * 32, most = fits < 256 ? fits : 256;
    const int64_t all = round_up(S, 32), some = most > 32 ? most : 32;
    return all < some ? all : some;
  }

  // Scratch, of the head: K and V by rows, K^T; of the chunk: Q^T and dO^T, Q and dO paired, the
  // exponents' start and -delta; of 32 keys: P and dS; of the chunk: dS paired. dk and dv in
  // float32 are of 32 keys if the chunk is single, else of all.
  char *k, *v, *kt, *q, *dout, *q_paired, *dout_paired, *p_rows, *ds_rows, *ds_paired;
  char *s, *dp, *dk, *dv, *dq, *dense;
  float *start, *delta;
  int64_t place(char* base) {
    char* at = base;
    const auto take = [&](int64_t bytes) {
      char* here = at;
      at += round_up(bytes, kLine);
      return here;
    };
    const int64_t along = inner.steps * inner.bytes;
    k = take(keys * along), v = take(keys * along), kt = take(keys * columns * 2);
    q = take(chunk * along), dout = take(chunk * along);
    q_paired = take(chunk * columns * 2), dout_paired = take(chunk * columns * 2);
    start = reinterpret_cast<float*>(take(chunk * 4));
    delta = reinterpret_cast<float*>(take(chunk * 4));
    p_rows = take(chunk * 32 * 2), ds_rows = take(chunk * 32 * 2);
    ds_paired = take(chunk * keys * 2);
    s = take(32 * 32 * 4), dp = take(32 * 32 * 4), dq = take(columns * 32 * 4);
    dk = take((single ? 32 : keys) * columns * 4), dv = take((single ? 32 : keys) * columns * 4);
    const int64_t longest = keys > p.S ? keys : p.S;
    const bool plain =
        p.q.d == 1 && p.k.d == 1 && p.v.d == 1 && grads.out.d == 1 && grads.dout.d == 1;
    dense = take(plain ? 0 : 3 * longest * p.D * 2);
    return at - base;
  }
};

// The chunk's Q and dO, both ways, and per query the two numbers.
static void pack_chunk(const Backward& f, const Rows& q, const Rows& dout, const Rows& out,
                       const float* lse, int64_t first, int64_t blocks) {
  const __m512i sign = _mm512_set1_epi16(f.p.scale < 0 ? INT16_MIN : 0);
  const int64_t pairs = f.inner.pairs();
  char *to_q = f.q, *to_dout = f.dout;
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t t = 0; t < 2; ++t) {
      const int64_t row = b * 32 + t * kTile;
      __m512 delta = _mm512_setzero_ps();
      for (int64_t step = 0; step < f.inner.steps; ++step) {
        const int64_t skip = (2 * (b * f.inner.steps + step) + t) * pairs * kLine;
        __m512i r[16], o[16];
        load_columns(q, first + row, 32 * step, r);
        for (int64_t j = 0; j < pairs; ++j) {
          _mm512_storeu_si512(to_q + skip + j * kLine, _mm512_xor_si512(r[j], sign));
        }
        load_columns(dout, first + row, 32 * step, r);
        load_columns(out, first + row, 32 * step, o);
        for (int64_t j = 0; j < pairs; ++j) {
          _mm512_storeu_si512(to_dout + skip + j * kLine, r[j]);
          delta = _mm512_dpbf16_ps(delta, (__m512bh)r[j], (__m512bh)o[j]);
        }
      }
      const __mmask16 mask = lanes_mask(q.count - first - row);
      const __m512 start = _mm512_mask_mul_ps(_mm512_set1_ps(INFINITY), mask,
                                              _mm512_maskz_loadu_ps(mask, lse + first + row),
                                              _mm512_set1_ps(1.44269504f));
      _mm512_storeu_ps(f.start + row, start);
      _mm512_storeu_ps(f.delta + row, _mm512_sub_ps(_mm512_setzero_ps(), delta));
    }
  }
  for (int64_t d = 0; d < f.columns; d += kTile) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t skip = (d / kTile * (f.chunk / 32) + b) * kTileBytes;
      __m512i r[16];
      load_pairs(q, first + 32 * b, d, r);
      store_tile(f.q_paired + skip, r);
      load_pairs(dout, first + 32 * b, d, r);
      store_tile(f.dout_paired + skip, r);
    }
  }
}

// log2 P, from scores and lse. A huge score equals lse where rounding cannot tell, and P is never
// above 1.
template <bool kHugeScores>
ENGINE_INLINE __m512 exponent(__m512 s, __m512 scale, __m512 start) {
  const __m512 z = _mm512_fmsub_ps(s, scale, start);
  if constexpr (!kHugeScores) return z;
  const __m512 doubt = _mm512_mul_ps(_mm512_abs_ps(start), _mm512_set1_ps(0x1p-21f));
  const __mmask16 same =
      _mm512_cmp_ps_mask(z, _mm512_sub_ps(_mm512_setzero_ps(), doubt), _CMP_GE_OQ);
  return _mm512_mask_mov_ps(z, same, _mm512_setzero_ps());  // NaN stays
}

// P and dS of 32 keys and 32 queries, from scores and dP - delta: as rows, and dS paired as well.
// The instruction that pairs takes queries 8 i + (0..3) to the first tile, 8 i + (4..7) to the
// second.
template <bool kHugeScores>
void weigh(const Backward& f, const float* starts, char* p_rows, char* ds_rows, int64_t next_rows,
           char* paired, int64_t next_paired) {
  const __m512 scale = _mm512_set1_ps(f.scale);
  const __m512 start[2] = {load_floats(starts), load_floats(starts + kTile)};
  for (int64_t j = 0; j < 16; ++j) {
    __m512i ds_row[2];
    ENGINE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int64_t row = 2 * j + i;
      __m512 p[2], ds[2];
      ENGINE_UNROLL
      for (int t = 0; t < 2; ++t) {
        const int64_t at = (2 * row + t) * kLine;
        p[t] = exp2(exponent<kHugeScores>(load_floats(f.s + at), scale, start[t]));
        ds[t] = _mm512_mul_ps(p[t], load_floats(f.dp + at));
      }
      const int64_t to = row / kTile * next_rows + row % kTile * kLine;
      _mm512_storeu_si512(p_rows + to, (__m512i)_mm512_cvtne2ps_pbh(p[1], p[0]));
      ds_row[i] = (__m512i)_mm512_cvtne2ps_pbh(ds[1], ds[0]);
      _mm512_storeu_si512(ds_rows + to, ds_row[i]);
    }
    _mm512_storeu_si512(paired + j * kLine, _mm512_unpacklo_epi16(ds_row[0], ds_row[1]));
    _mm512_storeu_si512(paired + next_paired + j * kLine,
                        _mm512_unpackhi_epi16(ds_row[0], ds_row[1]));
  }
}

// Block b of the chunk's queries against 32 keys from `key` on.
static void block(const Backward& f, int64_t b, int64_t key) {
  const Inner& inner = f.inner;
  const int64_t stride = 2 * kLine, tile = inner.pairs() * kLine, skip = b * inner.steps * 2 * tile;
  const auto rows = [&](const char* from) {
    return Panel{from + key * inner.bytes, kTile * inner.bytes, f.keys * inner.bytes, inner.bytes};
  };
  zero_results<2, 2>();
  multiply<4, 5, 2, 2>(inner.steps, rows(f.k), {f.q + skip, tile, 2 * tile, kLine});
  store_results<2, 2>(f.s, stride);
  const float *delta = f.delta + 32 * b, *start = f.start + 32 * b;
  tile_load<0>(delta, 0), tile_load<1>(delta + kTile, 0);  // every row the same
  tile_load<2>(delta, 0), tile_load<3>(delta + kTile, 0);
  multiply<4, 5, 2, 2>(inner.steps, rows(f.v), {f.dout + skip, tile, 2 * tile, kLine});
  store_results<2, 2>(f.dp, stride);
  for (int64_t i = f.p.Sk - key; i < 32; ++i) {
    _mm512_storeu_ps(f.s + i * stride, _mm512_set1_ps(-INFINITY));
    _mm512_storeu_ps(f.s + i * stride + kLine, _mm512_set1_ps(-INFINITY));
  }
  int huge = 0;  // infinity is of queries that do not exist
  for (int t = 0; t < 2; ++t) {
    const __m512 size = _mm512_abs_ps(load_floats(start + t * kTile));
    huge |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(1 << 20), _CMP_GT_OQ) &
            _mm512_cmp_ps_mask(size, _mm512_set1_ps(INFINITY), _CMP_LT_OQ);
  }
  char *p_rows = f.p_rows + b * kTileBytes, *ds_rows = f.ds_rows + b * kTileBytes;
  const int64_t next_rows = f.chunk / 32 * kTileBytes, next_paired = f.keys / 32 * kTileBytes;
  char* paired = f.ds_paired + 2 * b * next_paired + key / 32 * kTileBytes;
  const auto weigh_it = huge ? weigh<true> : weigh<false>;
  weigh_it(f, start, p_rows, ds_rows, next_rows, paired, next_paired);
}

// Columns [d, d + 16 N) of 32 rows of dV or dK: += rows^T paired, over the chunk's queries.
template <int N>
void add_products(const Backward& f, const char* rows, const char* paired, int64_t d,
                  int64_t blocks, bool first, char* sums) {
  const int64_t stride = f.columns * 4, tile = f.chunk / 32 * kTileBytes;
  if (first) {
    zero_results<2, N>();
  } else {
    load_results<2, N>(sums + d * 4, stride);
  }
  multiply<6, 7, 2, N>(blocks, {rows, tile, kTileBytes, kLine},
                       {paired + d / kTile * tile, tile, kTileBytes, kLine});
  store_results<2, N>(sums + d * 4, stride);
}

static void add_columns(const Backward& f, const char* rows, const char* paired, int64_t blocks,
                        bool first, char* sums) {
  int64_t d = 0;
  for (; d + kTile < f.columns; d += 32) add_products<2>(f, rows, paired, d, blocks, first, sums);
  if (d < f.columns) add_products<1>(f, rows, paired, d, blocks, first, sums);
}

// Rows [key, key + 32) of a result, from float32.
static void store_rows(const Backward& f, const AttentionView& view, char* head, int64_t key,
                       const char* sums, float factor) {
  const __m512 by = _mm512_set1_ps(factor);
  for (int64_t row = key; row < key + 32 && row < f.p.Sk; ++row) {
    const float* from = reinterpret_cast<const float*>(sums) + (row - key) * f.columns;
    for (int64_t d = 0; d < f.p.D; d += 32) {
      const __m512 lo = _mm512_mul_ps(load_floats(from + d), by);
      const __m512 hi = _mm512_mul_ps(
          d + kTile < f.columns ? load_floats(from + d + kTile) : _mm512_setzero_ps(), by);
      store_words(view, head, row, d, f.p.D, (__m512i)_mm512_cvtne2ps_pbh(hi, lo));
    }
  }
}

// dQ^T = K^T dS^T of block b over all keys, stored transposed.
template <int M>
void query_products(const Backward& f, int64_t b, int64_t d) {
  const int64_t steps = f.keys / 32, tile = steps * kTileBytes;
  zero_results<M, 2>();
  multiply<6, 7, M, 2>(steps, {f.kt + d / kTile * tile, tile, kTileBytes, kLine},
                       {f.ds_paired + 2 * b * tile, tile, kTileBytes, kLine});
  store_results<M, 2>(f.dq + d * 2 * kLine, 2 * kLine);
}

static void store_queries(const Backward& f, char* head, int64_t b, int64_t first) {
  int64_t d = 0;
  for (; d + kTile < f.columns; d += 32) query_products<2>(f, b, d);
  if (d < f.columns) query_products<1>(f, b, d);
  const float* from = reinterpret_cast<const float*>(f.dq);
  const __m512 scale = _mm512_set1_ps(f.p.scale);
  for (d = 0; d < f.p.D; d += 32) {
    for (int t = 0; t < 2; ++t) {
      store_transposed<4>(f.grads.dq, head, first + 32 * b + 4 * t, f.p.S, d, f.p.D,
                          from + t * kTile, 2, scale);
    }
  }
}

static void backward(Backward& f, int64_t begin, int64_t end) {
  const Attention& p = f.p;
  const AttentionGrads& g = f.grads;
  f.place(thread_scratch(f.place(nullptr)));
  const Tiles tiles(f.inner);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / p.H, h = item % p.H;
    const Rows keys = rows_of(p.k, n, h, p.Sk, p.D, f.dense);
    pack_rows(keys, f.inner, f.keys, f.k);
    pack_transposed(keys, f.keys / 32, f.kt);
    pack_rows(rows_of(p.v, n, h, p.Sk, p.D, f.dense), f.inner, f.keys, f.v);
    const int64_t each = p.S * p.D * 2;
    const Rows q = rows_of(p.q, n, h, p.S, p.D, f.dense);
    const Rows dout = rows_of(g.dout, n, h, p.S, p.D, f.dense + each);
    const Rows out = rows_of(g.out, n, h, p.S, p.D, f.dense + 2 * each);
    for (int64_t first = 0; first < p.S; first += f.chunk) {
      const int64_t blocks = round_up(p.S - first < f.chunk ? p.S - first : f.chunk, 32) / 32;
      const bool last = first + f.chunk >= p.S;
      pack_chunk(f, q, dout, out, g.lse + item * p.S, first, blocks);
      for (int64_t key = 0; key < f.keys; key += 32) {
        for (int64_t b = 0; b < blocks; ++b) block(f, b, key);
        const int64_t skip = f.single ? 0 : key * f.columns * 4;
        add_columns(f, f.p_rows, f.dout_paired, blocks, first == 0, f.dv + skip);
        add_columns(f, f.ds_rows, f.q_paired, blocks, first == 0, f.dk + skip);
        if (!last) continue;
        store_rows(f, g.dv, head_of(g.dv, n, h, 2), key, f.dv + skip, 1.0f);
        store_rows(f, g.dk, head_of(g.dk, n, h, 2), key, f.dk + skip, p.scale);
      }
      for (int64_t b = 0; b < blocks; ++b) store_queries(f, head_of(g.dq, n, h, 2), b, first);
    }
  }
}

}  // namespace amx
}  // namespace engine

ENGINE_BF16_TARGET_END

namespace engine {

void attention_bwd_amx(const Attention& p, const AttentionGrads& grads,
                       const ParallelFor& parallel_for) {
  parallel_for(p.N * p.H, grain_of(p.S * p.Sk), [&](int64_t begin, int64_t end) {
    amx::Backward f{p, grads};
    amx::backward(f, begin, end);
  });
}

}  // namespace engine
#else
namespace engine {
void attention_bwd_amx(const Attention&, const AttentionGrads&, const ParallelFor&) {}
}  // namespace engine
#endif

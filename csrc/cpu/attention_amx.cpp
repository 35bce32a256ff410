// Attention of bfloat16 by AMX, forward (backward: attention_bwd_amx.cpp).
//
//   out = softmax(q k^T * scale) v,  lse = ln sum exp(q k^T * scale)
//
// Blocking: 32 queries at a time, against blocks of 128 or 256 keys. Everything is computed
// transposed, S^T = K Q^T and O^T = V^T P^T: a query is a lane, so maximum and sum of a row are
// vertical, and P^T, which takes the place of S^T, is B of the second product after one
// permutation. K and V^T are packed once per head (and range of a thread). Over several blocks of
// keys the sums are rescaled to the running maximum. (Making the scores of the next block between
// the exponentials of this one was not faster.)
//
// Precision: products of bfloat16 summed in float32, softmax in float32, P rounded to bfloat16, the
// sum of a row of what was not rounded. -inf, NaN and overflow go the way of plain softmax.
//
// Parallel: over blocks of queries; each has one writer and its own order, so threads change no
// bit.
//
// Saved: lse. Refused: nothing of bfloat16.
//
// Bound: the exponentials, 11 vector operations for 16 of them; from D = 64 on the products, too.
#include "attention_amx.h"

#include "attention.h"
#include "isa.h"

#ifdef ENGINE_AMX
#include <cfloat>
#include <cmath>

#include "attention_amx_tiles.h"

ENGINE_BF16_TARGET

namespace engine {
namespace amx {

constexpr int64_t kQueries = 32;
constexpr float kHuge = 1 << 20;  // scores beyond lose their differences in an fma

struct Forward {
  const Attention& p;
  const AttentionView& out;
  float* lse;
  Inner inner{p.D};
  // Of a step: 128 scores a query stay in L1, but many steps mean many rescaled sums.
  int64_t step_keys = p.Sk <= 256 ? 128 : 256;
  int64_t keys = round_up(p.Sk, 32), columns = round_up(p.D, 16);
  float scale = std::fabs(p.scale) > 0 ? std::fabs(p.scale) * 1.44269504f : FLT_MIN;  // of log2

  // Scratch: operands of the head, then of the block of queries.
  char *k, *v, *dense, *q, *s, *o;
  int64_t place(char* base) {
    char* at = base;
    const auto take = [&](int64_t bytes) {
      char* here = at;
      at += round_up(bytes, kLine);
      return here;
    };
    k = take(keys * inner.steps * inner.bytes);
    v = take(keys * columns * 2);
    dense = take((p.q.d == 1 && p.k.d == 1 && p.v.d == 1) ? 0 : (keys + kQueries) * p.D * 2);
    q = take(inner.steps * inner.pairs() * 2 * kLine);
    s = take(step_keys * kQueries * 4);
    o = take(columns * kQueries * 4);
    return at - base;
  }

  void pack_head(int64_t n, int64_t h) {
    pack_rows(rows_of(p.k, n, h, p.Sk, p.D, dense), inner, keys, k);
    pack_transposed(rows_of(p.v, n, h, p.Sk, p.D, dense), keys / 32, v);
  }
};

// Q^T of the block, paired; negated where the scale is, so that the largest score is the largest.
template <int QT>
void pack_queries(const Forward& f, const Rows& queries) {
  const __m512i sign = _mm512_set1_epi16(f.p.scale < 0 ? INT16_MIN : 0);
  const int64_t pairs = f.inner.pairs();
  char* to = f.q;
  for (int64_t step = 0; step < f.inner.steps; ++step) {
    for (int64_t t = 0; t < QT; ++t, to += pairs * kLine) {
      __m512i r[16];
      load_columns(queries, kTile * t, 32 * step, r);
      for (int64_t j = 0; j < pairs; ++j) {
        _mm512_storeu_si512(to + j * kLine, _mm512_xor_si512(r[j], sign));
      }
    }
  }
}

// Scores of `rows` keys (a multiple of 32; those at `end` and beyond are -inf); raises `top`.
template <int QT>
void scores(const Forward& f, int64_t key, int64_t rows, int64_t end, __m512* top) {
  const Inner& inner = f.inner;
  const int64_t stride = QT * kLine, tile = inner.pairs() * kLine;
  const Panel b{f.q, tile, QT * tile, kLine};
  for (int64_t g = 0; g < rows; g += 32) {
    char* s = f.s + g * stride;
    const Panel a{f.k + (key + g) * inner.bytes, kTile * inner.bytes, f.keys * inner.bytes,
                  inner.bytes};
    zero_results<2, QT>();
    multiply<4, 5, 2, QT>(inner.steps, a, b);
    store_results<2, QT>(s, stride);
    for (int64_t i = end - key - g > 0 ? end - key - g : 0; i < 32; ++i) {
      for (int t = 0; t < QT; ++t) {
        _mm512_storeu_ps(s + i * stride + t * kLine, _mm512_set1_ps(-INFINITY));
      }
    }
    for (int64_t i = 0; i < 32; ++i) {
      ENGINE_UNROLL
      for (int t = 0; t < QT; ++t) {
        top[t] = _mm512_max_ps(load_floats(s + i * stride + t * kLine), top[t]);
      }
    }
  }
}

// P^T = 2^((S^T - base) scale), paired, in place of S^T; adds to the sums.
template <int QT>
void exponentials(const Forward& f, int64_t rows, const __m512* base, __m512* sum) {
  constexpr int64_t stride = QT * kLine;
  const __m512 scale = _mm512_set1_ps(f.scale);
  __m512 start[QT];
  bool huge = false;
  for (int t = 0; t < QT; ++t) {
    start[t] = _mm512_mul_ps(base[t], scale);
    const __mmask16 small =
        _mm512_cmp_ps_mask(_mm512_abs_ps(start[t]), _mm512_set1_ps(kHuge), _CMP_LE_OQ);
    huge |= small != 0xFFFF;
  }
  if (huge) {  // inf and NaN are, too
    for (int64_t i = 0; i < rows * QT; ++i) {
      char* at = f.s + i * kLine;
      _mm512_storeu_ps(at, _mm512_sub_ps(load_floats(at), base[i % QT]));
    }
    for (int t = 0; t < QT; ++t) start[t] = _mm512_setzero_ps();
  }
  const char* from = f.s;
  char* to = f.s;
  for (int64_t i = 0; i < rows; i += 2, from += 2 * stride, to += stride) {
    ENGINE_UNROLL
    for (int t = 0; t < QT; ++t) {
      const __m512 even = exp2(_mm512_fmsub_ps(load_floats(from + t * kLine), scale, start[t]));
      const __m512 odd =
          exp2(_mm512_fmsub_ps(load_floats(from + stride + t * kLine), scale, start[t]));
      sum[t] = _mm512_add_ps(sum[t], _mm512_add_ps(even, odd));
      _mm512_storeu_si512(to + t * kLine, pair_up(even, odd));
    }
  }
}

// O^T += V^T P^T over `rows` keys.
template <int M, int QT>
void values_of(const Forward& f, int64_t column, int64_t key, int64_t rows) {
  const int64_t stride = QT * kLine;
  char* o = f.o + column * stride;
  if (key == 0) {
    zero_results<M, QT>();
  } else {
    load_results<M, QT>(o, stride);
  }
  const char* v = f.v + (column / kTile * (f.keys / 32) + key / 32) * kTileBytes;
  multiply<6, 7, M, QT>(rows / 32, {v, f.keys / 32 * kTileBytes, kTileBytes, kLine},
                        {f.s, kLine, kTile * stride, stride});
  store_results<M, QT>(o, stride);
}

template <int QT>
void block(const Forward& f, int64_t n, int64_t h, int64_t row) {
  const Attention& p = f.p;
  const int64_t count = p.S - row < QT * kTile ? p.S - row : QT * kTile;
  AttentionView view = p.q;
  view.data = static_cast<char*>(view.data) + row * view.s * 2;
  pack_queries<QT>(f, rows_of(view, n, h, count, p.D, f.dense));
  __m512 top[QT], sum[QT];
  for (int t = 0; t < QT; ++t) top[t] = _mm512_set1_ps(-INFINITY), sum[t] = _mm512_setzero_ps();
  for (int64_t key = 0; key < f.keys; key += f.step_keys) {
    const int64_t rows = f.keys - key < f.step_keys ? f.keys - key : f.step_keys;
    __m512 base[QT], before[QT];
    for (int t = 0; t < QT; ++t) before[t] = top[t];
    scores<QT>(f, key, rows, p.Sk, top);
    for (int t = 0; t < QT; ++t) {  // of nothing but -inf so far: every P is 0
      const __mmask16 none = _mm512_cmp_ps_mask(top[t], _mm512_set1_ps(-INFINITY), _CMP_EQ_OQ);
      base[t] = _mm512_mask_mov_ps(top[t], none, _mm512_setzero_ps());
    }
    if (key > 0) {
      __m512 factor[QT];
      for (int t = 0; t < QT; ++t) {
        const __m512 fall = _mm512_sub_ps(before[t], base[t]);
        factor[t] = exp2_of_factor(_mm512_mul_ps(fall, _mm512_set1_ps(f.scale)));
        sum[t] = _mm512_mul_ps(sum[t], factor[t]);
      }
      for (int64_t i = 0; i < f.columns * QT; ++i) {
        char* at = f.o + i * kLine;
        _mm512_storeu_ps(at, _mm512_mul_ps(load_floats(at), factor[i % QT]));
      }
    }
    exponentials<QT>(f, rows, base, sum);
    int64_t column = 0;
    for (; column + kTile < f.columns; column += 2 * kTile) values_of<2, QT>(f, column, key, rows);
    if (column < f.columns) values_of<1, QT>(f, column, key, rows);
  }
  char* head = head_of(f.out, n, h, 2);
  for (int t = 0; t < QT; ++t) {
    const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.0f), sum[t]);
    const float* o = reinterpret_cast<const float*>(f.o) + t * kTile;
    for (int64_t d = 0; d < p.D; d += 32) {
      store_transposed<0>(f.out, head, row + t * kTile, p.S, d, p.D, o, QT, factor);
    }
    if (f.lse == nullptr) continue;
    const __m512 value = _mm512_fmadd_ps(top[t], _mm512_set1_ps(std::fabs(p.scale)), log(sum[t]));
    _mm512_mask_storeu_ps(f.lse + (n * p.H + h) * p.S + row + t * kTile,
                          lanes_mask(count - t * kTile), value);
  }
}

static void forward(Forward& f, int64_t begin, int64_t end) {
  f.place(thread_scratch(f.place(nullptr)));
  const Tiles tiles(f.inner);
  const int64_t blocks = (f.p.S + kQueries - 1) / kQueries;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t head = item / blocks, n = head / f.p.H, h = head % f.p.H;
    const int64_t row = item % blocks * kQueries;
    if (item == begin || row == 0) f.pack_head(n, h);
    if (f.p.S - row > kTile) {
      block<2>(f, n, h, row);
    } else {
      block<1>(f, n, h, row);
    }
  }
}

}  // namespace amx
}  // namespace engine

ENGINE_BF16_TARGET_END

namespace engine {

bool attention_amx_available() { return amx_allowed(); }

void attention_fwd_amx(const Attention& p, const AttentionView& out, float* lse,
                       const ParallelFor& parallel_for) {
  const int64_t blocks = (p.S + amx::kQueries - 1) / amx::kQueries;
  const int64_t cost = amx::kQueries * p.Sk;
  parallel_for(p.N * p.H * blocks, grain_of(cost), [&](int64_t begin, int64_t end) {
    amx::Forward f{p, out, lse};
    amx::forward(f, begin, end);
  });
}

}  // namespace engine
#else  // this compiler cannot, and nobody calls

namespace engine {
bool attention_amx_available() { return false; }
void attention_fwd_amx(const Attention&, const AttentionView&, float*, const ParallelFor&) {}
}  // namespace engine
#endif

// The products of conv2d_bf16.cpp without tiles: vdpbf16ps adds to 16 channels of the result what a
// pair of the source's channels gives, a row of a packed tile times a pair of one position.
// Included there alone, under its target.
//
// Blocking: the sums of up to 12 positions x 2 panels stay in registers over all steps, for which a
// pair takes 12 broadcast loads and 2 of weights: 14 for 24 products, of which a core of Zen 5 does
// two a cycle, as it does loads. Weights stream from L2, 2 KB in 192 cycles.
#pragma once

#include <immintrin.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "conv2d_bf16_blocks.h"

#ifdef __clang__
#pragma clang attribute push(                                                               \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif

namespace engine {
namespace conv2d_bf16 {
namespace {

constexpr int64_t kDotRows = 12, kDotRowsOfOne = 16;  // with two panels, with one

// The first of P panels lies at w, the next `panel` bytes on, and so on at `to` its sums.
template <int P, int M>
void dots(const Step* step, const Step* end, const int64_t* places, const char* w, int64_t panel,
          const Row* rows, char* to) {
  __m512 sums[P][M];
  ENGINE_UNROLL
  for (int m = 0; m < M; ++m) {
    sums[0][m] = _mm512_setzero_ps();
    if constexpr (P == 2) sums[1][m] = _mm512_setzero_ps();
  }
  for (; step < end; ++step, w += kTileBytes) {
    const char* from[M];
    ENGINE_UNROLL
    for (int m = 0; m < M; ++m) from[m] = step->base + places[m] * step->pitch;
    const int64_t bytes = step->pairs * 4;
    const char* row = w;
    for (int64_t j = 0; j < bytes; j += 4, row += kLine) {
      const __m512bh w0 = (__m512bh)_mm512_load_si512(row);
      __m512bh w1 = w0;
      if constexpr (P == 2) w1 = (__m512bh)_mm512_load_si512(row + panel);
      ENGINE_UNROLL
      for (int m = 0; m < M; ++m) {
        int pair;
        std::memcpy(&pair, from[m] + j, 4);
        const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
        sums[0][m] = _mm512_dpbf16_ps(sums[0][m], x, w0);
        if constexpr (P == 2) sums[1][m] = _mm512_dpbf16_ps(sums[1][m], x, w1);
      }
    }
  }
  ENGINE_UNROLL
  for (int m = 0; m < M; ++m) {
    _mm512_store_ps(to + rows[m].from, sums[0][m]);
    if constexpr (P == 2) _mm512_store_ps(to + kGroup * kTileBytes + rows[m].from, sums[1][m]);
  }
}

using Dots = void (*)(const Step*, const Step*, const int64_t*, const char*, int64_t, const Row*,
                      char*);

template <int P, int... M>
constexpr std::array<Dots, sizeof...(M)> dots_of(std::integer_sequence<int, M...>) {
  return {dots<P, M + 1>...};
}
constexpr auto kDotsOfOne = dots_of<1>(std::make_integer_sequence<int, kDotRowsOfOne>());
constexpr auto kDotsOfTwo = dots_of<2>(std::make_integer_sequence<int, kDotRows>());

inline void dots(bool two, int64_t count, const Step* step, const Step* end, const int64_t* places,
                 const char* w, int64_t panel, const Row* rows, char* to) {
  const Dots run = two ? kDotsOfTwo[count - 1] : kDotsOfOne[count - 1];
  run(step, end, places, w, panel, rows, to);
}

}  // namespace
}  // namespace conv2d_bf16
}  // namespace engine

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

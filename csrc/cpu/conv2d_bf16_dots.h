// The products of conv2d_bf16.cpp without tiles: vdpbf16ps adds to 16 channels of the result what a
// pair of the source's channels gives, a row of a packed tile times a pair of one position.
// Included there alone. Without tiles to load whole, rows that are no position of the result, and
// pairs that a source of few channels lacks, are not computed.
//
// Blocking: the sums of up to 12 positions x 2 panels stay in registers over all steps, for which a
// pair takes 12 broadcast loads and 2 of weights: 14 for 24 products, of which a core of Zen 5 does
// two a cycle, as it does loads. Weights stream from L2, 2 KB in 192 cycles. Measured on one core:
// 440-480 GFLOP/s from 4 steps of 32 channels on, of 467 at 3.65 GHz. Unrolling gains nothing.
// Rounded and stored from registers: 388 against 301 GFLOP/s, 8,192 rows of 128 channels to 384.
#pragma once

#include <immintrin.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "conv2d_bf16_blocks.h"

ENGINE_BF16_TARGET

namespace engine {
namespace conv2d_bf16 {
namespace {

constexpr int64_t kDotRows = 12, kDotRowsOfOne = 16;  // with two panels, with one

// What is added to the sums, and where they go: from a channel on.
struct Result {
  uint16_t* out;
  const uint16_t* add;  // null: nothing
  const float* bias;
  int64_t channels;  // that are left
};

ENGINE_INLINE __m512 widened(__m256i words) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

// The first of P panels lies at w, the next `panel` bytes on. `places`: of M rows in the sources.
template <int P, int M>
void dots(const Step* step, const Step* end, const int64_t* places, const char* w, int64_t panel,
          const Row* rows, const Result& result) {
  __m512 sums[P][M];
  ENGINE_UNROLL
  for (int m = 0; m < M; ++m) {
    sums[0][m] = _mm512_setzero_ps();
    if constexpr (P == 2) sums[1][m] = _mm512_setzero_ps();
  }
  while (step < end) {
    const int64_t pitch = step->pitch;  // one for each source at most
    int64_t from[M];
    ENGINE_UNROLL
    for (int m = 0; m < M; ++m) from[m] = places[m] * pitch;
    do {
      const char *pair = step->base, *last = pair + step->pairs * 4, *row = w;
      for (; pair < last; pair += 4, row += kLine) {
        const __m512bh w0 = (__m512bh)_mm512_loadu_si512(row);
        __m512bh w1 = w0;
        if constexpr (P == 2) w1 = (__m512bh)_mm512_loadu_si512(row + panel);
        ENGINE_UNROLL
        for (int m = 0; m < M; ++m) {
          int bits;
          std::memcpy(&bits, pair + from[m], 4);
          const __m512bh x = (__m512bh)_mm512_set1_epi32(bits);
          sums[0][m] = _mm512_dpbf16_ps(sums[0][m], x, w0);
          if constexpr (P == 2) sums[1][m] = _mm512_dpbf16_ps(sums[1][m], x, w1);
        }
      }
      w += kTileBytes;
    } while (++step < end && step->pitch == pitch);
  }
  const __mmask32 mask =
      words_mask(P == 2 ? result.channels : std::min<int64_t>(16, result.channels));
  __m512 bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  if (result.bias != nullptr) {
    bias[0] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), result.bias);
    if constexpr (P == 2) {
      bias[1] = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), result.bias + 16);
    }
  }
  ENGINE_UNROLL
  for (int m = 0; m < M; ++m) {
    __m512 low = _mm512_add_ps(sums[0][m], bias[0]), high = bias[1];
    if constexpr (P == 2) high = _mm512_add_ps(sums[1][m], bias[1]);
    if (result.add != nullptr) {
      const __m512i words = _mm512_maskz_loadu_epi16(mask, result.add + rows[m].at);
      low = _mm512_add_ps(low, widened(_mm512_castsi512_si256(words)));
      if constexpr (P == 2) {
        high = _mm512_add_ps(high, widened(_mm512_extracti64x4_epi64(words, 1)));
      }
    }
    _mm512_mask_storeu_epi16(result.out + rows[m].at, mask,
                             (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

using Dots = void (*)(const Step*, const Step*, const int64_t*, const char*, int64_t, const Row*,
                      const Result&);

template <int P, int... M>
constexpr std::array<Dots, sizeof...(M)> dots_of(std::integer_sequence<int, M...>) {
  return {dots<P, M + 1>...};
}
constexpr auto kDotsOfOne = dots_of<1>(std::make_integer_sequence<int, kDotRowsOfOne>());
constexpr auto kDotsOfTwo = dots_of<2>(std::make_integer_sequence<int, kDotRows>());

inline void dots(bool two, int64_t count, const Step* step, const Step* end, const int64_t* places,
                 const char* w, int64_t panel, const Row* rows, const Result& result) {
  const Dots run = two ? kDotsOfTwo[count - 1] : kDotsOfOne[count - 1];
  run(step, end, places, w, panel, rows, result);
}

}  // namespace
}  // namespace conv2d_bf16
}  // namespace engine

ENGINE_BF16_TARGET_END

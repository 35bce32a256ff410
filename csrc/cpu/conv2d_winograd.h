// What the loops of conv2d_winograd share with their caller.
#pragma once

#include <algorithm>

#include "../kernels.h"
#include "isa.h"

namespace engine {

// Where the CPU has AVX512_BF16.
bool conv2d_winograd_bf16_available();
void conv2d_winograd_fwd_cpu(const Conv2dWinograd<bf16>& p, const ParallelFor& parallel_for);

// Tiles at a time: their transforms, 16 entries of C floats a tile, are to stay in L2.
constexpr int64_t kWinogradTiles = 48;

// Channels of y that are a part for a thread where the tiles are few.
constexpr int64_t kWinogradChannels = 32;

// w (K, C, 3, 3): see kernels.h.
struct WinogradFilters {
  const float* w;
  int64_t C, k_stride, c_stride, tap_stride;
  bool flip;
};

// Tiles [first, first + count) of p, channels [k0, k1) of y.
struct WinogradPart {
  int64_t first, count, k0, k1;
};

template <class E>
struct WinogradLoops {
  int64_t rows;     // tiles that the product takes at once, at most
  int64_t least;    // and at least
  int64_t columns;  // channels of y that it takes at once
  // v and m are scratch.
  void (*tiles)(const Conv2dWinograd<E>& p, WinogradPart part, E* v, float* m);
  void (*tiles_upsampled)(const Conv2dWinograd<E>& p, WinogradPart part, E* v, float* m);
  // G w G^T of 16 channels of y from k0; null for bf16.
  void (*filters)(const WinogradFilters& f, int64_t k0, float* packed);
};

// A thread's scratch, for good; 0 at first, as rows past the last tile are multiplied too.
float* winograd_scratch(int64_t floats);

// Numbers between two entries of v, of m: 64 bytes past a multiple of `count` rows, as 16 streams
// that are a power of 2 apart would share one set of L1.
template <class E = float>
inline int64_t winograd_pitch(int64_t count, int64_t width) {
  return count * width + 64 / static_cast<int64_t>(sizeof(E));
}

template <class E>
inline void winograd_fwd(const WinogradLoops<E>& loops, const Conv2dWinograd<E>& p,
                         const ParallelFor& parallel_for) {
  const auto round_up = [](int64_t n, int64_t to) { return (n + to - 1) / to * to; };
  const int64_t tiles = p.N * ((p.H + 1) / 2) * ((p.W + 1) / 2);
  // Few tiles: the weights are more, and each thread reads its own channels'; both transform x.
  const bool few = tiles <= kWinogradTiles;
  const int64_t width = few ? kWinogradChannels : p.K, parts = (p.K + width - 1) / width;
  // An even number of units, so that two threads end together.
  const int64_t units = few ? 1 : round_up(tiles, 2 * kWinogradTiles) / kWinogradTiles;
  const int64_t unit = round_up((tiles + units - 1) / units, loops.least);
  const int64_t padded = round_up(unit, loops.rows);
  const int64_t v = 16 * winograd_pitch<E>(padded, p.C);
  const int64_t m = 16 * winograd_pitch(padded, loops.columns);
  const int64_t floats = v * static_cast<int64_t>(sizeof(E)) / 4;
  const auto run = p.upsample ? loops.tiles_upsampled : loops.tiles;
  parallel_for((tiles + unit - 1) / unit * parts, 1, [&](int64_t begin, int64_t end) {
    float* s = winograd_scratch(floats + m);
    for (int64_t i = begin, now; i < end; i += now) {
      now = std::min(end - i, parts - i % parts);  // of the same tiles: x is transformed once
      const int64_t first = i / parts * unit, left = tiles - first, k0 = i % parts * width;
      const int64_t k1 = std::min(k0 + now * width, p.K);
      run(p, {first, left < unit ? left : unit, k0, k1}, reinterpret_cast<E*>(s), s + floats);
    }
  });
}

}  // namespace engine

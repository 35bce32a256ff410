// What the loops of conv2d_winograd share with their caller.
#pragma once

#include "../kernels.h"

namespace engine {

// Tiles at a time: their transforms, 16 entries of C floats a tile, are to stay in L2.
constexpr int64_t kWinogradTiles = 48;

// w (K, C, 3, 3): see kernels.h.
struct WinogradFilters {
  const float* w;
  int64_t C, k_stride, c_stride, tap_stride;
  bool flip;
};

struct WinogradLoops {
  int64_t rows;     // tiles that the product takes at once
  int64_t columns;  // channels of y that it takes at once
  // Tiles [first, first + count) of p; v and m are scratch.
  void (*tiles)(const Conv2dWinograd& p, int64_t first, int64_t count, float* v, float* m);
  void (*tiles_upsampled)(const Conv2dWinograd& p, int64_t first, int64_t count, float* v,
                          float* m);
  // G w G^T of 16 channels of y from k0.
  void (*filters)(const WinogradFilters& f, int64_t k0, float* packed);
};

// A thread's scratch, for good; 0 at first, as rows past the last tile are multiplied too.
float* winograd_scratch(int64_t floats);

inline int64_t winograd_tiles(const Conv2dWinograd& p) {
  return p.N * ((p.H + 1) / 2) * ((p.W + 1) / 2);
}

// Floats between two entries of v, of m: 64 bytes past a multiple of `count` rows, as 16 streams
// that are a power of 2 apart would share one set of L1.
inline int64_t winograd_pitch(int64_t count, int64_t width) { return count * width + 16; }

}  // namespace engine

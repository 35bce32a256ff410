// What the loops of conv2d_winograd_bwd share with their caller.
#pragma once

#include "conv2d_winograd.h"

namespace engine {

// Tiles at a time: their transforms, 4 entries of C + K floats a tile, are to stay in L2, and a sum
// in registers is of so many terms.
constexpr int64_t kWinogradGradTiles = 96;
constexpr int64_t kWinogradGradChannels = 32;  // of y, of a unit

// Units: row `unit / (K / 32)` of the 4x4 entries, for 32 channels of y.
struct WinogradGradLoops {
  // G^T-side sums of the units [first, last), of tiles in blocks of `block`, to the workspace.
  void (*sums)(const Conv2dWinogradGrads& p, int64_t first, int64_t last, int64_t block,
               float* workspace, float* scratch);
  // dw of the channels [first, last) of y from the workspace.
  void (*weights)(const Conv2dWinogradGrads& p, int64_t first, int64_t last,
                  const float* workspace);
};

// Floats between two entries of the workspace, and of the transforms (winograd_pitch says why).
inline int64_t winograd_grad_pitch(const Conv2dWinogradGrads& p) { return p.C * p.K + 16; }
inline int64_t winograd_grad_tile_pitch(int64_t channels) {
  return kWinogradGradTiles * channels + 16;
}

}  // namespace engine

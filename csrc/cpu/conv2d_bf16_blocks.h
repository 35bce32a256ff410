// How a convolution is cut into groups of positions and panels of channels: conv2d_bf16.cpp says
// why.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../kernels.h"
#include "amx.h"

namespace engine {
namespace conv2d_bf16 {

using namespace amx;

constexpr int64_t kGroup = 6;           // tiles of positions, at most
constexpr int64_t kWindow = 512 << 10;  // bytes of copied sources, about
constexpr int64_t kDeep = 16;           // steps from which on storing is done between products
constexpr int64_t kAhead = 4;           // tiles of weights that are fetched ahead

inline int64_t pairs_of(int64_t channels) { return std::min<int64_t>(16, (channels + 1) / 2); }

// A tile's worth of the sum: 32 channels of a source under one tap.
struct Step {
  const char* base;
  int64_t pitch;  // bytes from one position to the next
  int64_t pairs;  // of channels that the source has of them: the others are zero
};

// 16 positions of the result. `at`: the first in the sources; `first`: how many belong to others.
struct Place {
  int64_t at, first, n, y, x;
};

// A row of results: where its sums lie in the stage, and its place in the result.
struct Row {
  int64_t from, at;
};

struct Convolution {
  const Conv2dBf16& p;
  bool by_tiles;        // else by dots
  bool direct;          // the sources are read in place
  bool by_rows = true;  // no tile crosses rows
  int64_t N, H, W, pitch, tiles, all, groups, panels, each, units, steps = 0, planes = 0;
  bool panels_first;
  int64_t group_tiles = kGroup;

  Convolution(const Conv2dBf16& p, bool by_tiles)
      : p(p), by_tiles(by_tiles), N(p.N), H(p.H), W(p.W) {
    int64_t width = 0;
    bool whole = true, plain = true;
    const int64_t phases = p.stride * p.stride;
    for (int i = 0; i < p.count; ++i) {
      const Conv2dSource& s = p.sources[i];
      const int64_t blocks = (s.C + 31) / 32;
      whole &= s.C % 32 == 0, plain &= !s.taps, width += s.C * 2;
      steps += blocks * (s.taps ? 9 : 1), planes += blocks * (s.taps ? phases : 1);
    }
    direct = plain && whole && N * H * W >= kTile;
    if (direct) {
      W *= N * H, N = H = 1;
      if (width * kGroup * kTile > 20 << 10) group_tiles = 4;  // they stay in L1
    }
    pitch = W + 1;
    tiles = H * ((W + kTile - 1) / kTile);
    const int64_t flat = (H * pitch - 1 + kTile - 1) / kTile;
    if (flat < tiles) tiles = flat, by_rows = false;
    all = N * tiles;
    groups = (all + group_tiles - 1) / group_tiles;
    panels = (p.Co + kTile - 1) / kTile;
    each = groups * ((panels + 1) / 2) >= 4 ? 2 : 1;  // whole lines of the result for a thread
    units = (panels + each - 1) / each;
    const int64_t weights = panels * steps * kTileBytes, inputs = N * H * W * width;
    panels_first = weights > inputs && (direct || bytes(0, groups) <= kWindow);
  }

  int64_t first_tile(int64_t group) const { return group * all / groups; }

  Place place(int64_t tile) const {
    if (direct) {
      const int64_t x = tile * kTile, at = std::min(x, W - kTile);
      return {at, x - at, 0, 0, x};
    }
    const int64_t n = tile / tiles, t = tile % tiles;
    if (by_rows) {
      const int64_t across = (W + kTile - 1) / kTile, y = t / across;
      return {0, 0, n, y, t % across * kTile};
    }
    return {0, 0, n, t * kTile / pitch, t * kTile % pitch};
  }

  // Padded rows: one of zeros, H of the first picture, one of zeros, H of the second, ...
  int64_t first_row(int64_t group) const {
    const Place a = place(first_tile(group));
    return a.n * (H + 1) + a.y;
  }
  int64_t end_row(int64_t group) const {  // of the groups before this one
    const Place b = place(first_tile(group) - 1);
    const int64_t y = by_rows ? b.y : std::min(H - 1, b.y + (b.x + kTile - 1) / pitch);
    return b.n * (H + 1) + y + 3;
  }
  int64_t plane(int64_t rows) const { return (rows * pitch + 1 + kTile) * kLine; }
  int64_t bytes(int64_t group, int64_t end) const {
    return planes * plane(end_row(end) - first_row(group));
  }
};

}  // namespace conv2d_bf16
}  // namespace engine

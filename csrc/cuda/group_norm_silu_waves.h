// How the cooperative kernels of group_norm_silu cut a tensor into waves: plain arithmetic, for the
// host alone (and where a wave's groups begin, for both).
#pragma once

#include <cstdint>

namespace engine {

// What a device gives to a cooperative launch; blocks: of the kernel that run at once.
struct CooperativeLimits {
  int64_t l2 = 0, blocks = 0;  // l2 in bytes; no blocks: no cooperative launch
};

// A bundle is a set of pieces that holds whole groups; a piece is what a block sums, or applies, at
// a time. Both are numbered as they lie in the tensor.
struct Bundles {
  int64_t samples, per_sample;  // bundles = samples * per_sample
  int64_t groups;               // of a bundle; a sample's last one may have fewer
  int64_t pieces, bytes;        // of a bundle, bytes: to be read twice
};

struct Waves {
  int32_t pieces;              // of the tensor
  int32_t length;              // pieces in a wave, the last one may be shorter
  int32_t count;               // waves
  int32_t blocks;              // of the grid
  int64_t bundles;             // in a wave
  int64_t per_sample, groups;  // as in Bundles
};

// Three waves are alive at a time (summed, merged, applied; a fourth while blocks are apart), and
// an H100's processors reach half of its L2 directly.
constexpr int64_t kWavesInL2 = 6;

// Waves are whole bundles, as many as the L2 holds, all of about one size; the grid is such that
// every block has the same number of pieces of a wave, or one less. False where one bundle is too
// much.
inline bool choose_waves(const Bundles& all, const CooperativeLimits& device, Waves* waves) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t most = device.l2 / kWavesInL2 / all.bytes;
  if (most < 1 || device.blocks < 1) return false;
  const int64_t bundles = all.samples * all.per_sample;
  if (bundles * all.pieces > INT32_MAX) return false;
  waves->bundles = ceil_div(bundles, ceil_div(bundles, most));
  const int64_t length = waves->bundles * all.pieces;
  waves->pieces = static_cast<int32_t>(bundles * all.pieces);
  waves->length = static_cast<int32_t>(length);
  waves->count = static_cast<int32_t>(ceil_div(bundles, waves->bundles));
  waves->blocks = static_cast<int32_t>(ceil_div(length, ceil_div(length, device.blocks)));
  waves->per_sample = all.per_sample;
  waves->groups = all.groups;
  return true;
}

}  // namespace engine

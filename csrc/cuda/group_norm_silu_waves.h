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
  int64_t pieces;                       // of the tensor
  int64_t length;                       // pieces in a wave, the last one may be shorter
  int64_t count;                        // waves
  int64_t blocks;                       // of the grid
  int64_t bundles;                      // in a wave
  int64_t samples, per_sample, groups;  // as in Bundles
};

// A block may begin wave k + 2 while another one still applies wave k - 1, and an H100's processors
// reach half of its L2 directly: so much of a wave stays there until it is read again.
constexpr int64_t kWavesInL2 = 8;

// Waves are whole bundles, as many as the L2 holds, all of about one size; the grid is such that
// every block has the same number of pieces of a wave, or one less. False where one bundle is too
// much.
inline bool choose_waves(const Bundles& all, const CooperativeLimits& device, Waves* waves) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t most = device.l2 / kWavesInL2 / all.bytes;
  if (most < 1 || device.blocks < 1) return false;
  const int64_t bundles = all.samples * all.per_sample;
  waves->bundles = ceil_div(bundles, ceil_div(bundles, most));
  waves->pieces = bundles * all.pieces;
  waves->length = waves->bundles * all.pieces;
  waves->count = ceil_div(bundles, waves->bundles);
  waves->blocks = ceil_div(waves->length, ceil_div(waves->length, device.blocks));
  waves->samples = all.samples;
  waves->per_sample = all.per_sample;
  waves->groups = all.groups;
  return true;
}

}  // namespace engine

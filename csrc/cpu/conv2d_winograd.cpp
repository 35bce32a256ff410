// 3x3 convolution of stride 1 in float32 by Winograd's F(2x2, 3x3) on the CPU, for inference.
//
// Of each 2x2 pixels of y the 4x4 pixels d of x around them are read (0 outside the image):
//   y = A^T [ sum over channels of (G w G^T) * (B^T d B) ] A     (Lavin & Gray 2016, eq. 8 to 11)
// 16 products a channel where the sum itself has 36: 2.25 times fewer. B and A hold 0 and +-1, so
// the transforms are additions; G w G^T comes with the weights, packed.
//
// After nearest x2 upsampling 7 of the 16 products vanish (conv2d_winograd_loops.h): 9 where the
// sum has 36, of an image that was never made.
//
// Unit: kWinogradTiles tiles of any images, one thread's from beginning to end. B^T d B goes to
// scratch as 16 matrices (tiles, C) that stay in L2; then, for each 16 or 32 channels of y, 16
// products (tiles, C) x (C, channels), whose weights are read once a unit, and A^T . A with bias
// and residual, straight to y.
// Parallel: over units; where there is one alone, over the channels of y. A number of y is summed
// in one order whatever the unit: threads and batch change no bit. Bound: the products, 32 flop per
// channel pair and tile, at 2 vectors of FMA a cycle; memory sees x about once, y and add once, the
// weights (64 bytes per pair of channels) once a unit from L2/L3.
#include "conv2d_winograd.h"

#include <memory>

#include "isa.h"
#define ENGINE_KERNELS "conv2d_winograd_loops.h"
#include "foreach_isa.h"

namespace engine {

float* winograd_scratch(int64_t floats) {
  thread_local std::unique_ptr<float[]> buffer;
  thread_local int64_t size = 0;
  if (size < floats + 16) {
    buffer = std::make_unique<float[]>(floats + 16);
    size = floats + 16;
  }
  const auto address = reinterpret_cast<uintptr_t>(buffer.get());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

void conv2d_winograd_weight_cpu(const float* w, int64_t K, int64_t C, int64_t k_stride,
                                int64_t c_stride, int64_t tap_stride, bool flip, float* packed,
                                const ParallelFor& parallel_for) {
  const WinogradLoops<float>& loops = ENGINE_PICK(winograd_loops)();
  const WinogradFilters filters{w, C, k_stride, c_stride, tap_stride, flip};
  parallel_for(K / 16, grain_of(16 * 16 * C), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) loops.filters(filters, k * 16, packed + k * 256 * C);
  });
}

void conv2d_winograd_fwd_cpu(const Conv2dWinograd<float>& p, const ParallelFor& parallel_for) {
  winograd_fwd(ENGINE_PICK(winograd_loops)(), p, parallel_for);
}

}  // namespace engine

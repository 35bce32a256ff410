// The loops of reverse_step.cpp that are compiled per instruction set.
#pragma once

#include "../kernels.h"

namespace engine {

struct Step {
  float a, b, c, d, s, clip;
};

struct ReverseStepLoops {
  // Elements [begin, end) of tensors that all lie in memory alike; noise drawn only if contiguous.
  void (*range)(const ReverseStep& p, const Step& step, void* x_next, int64_t begin, int64_t end);
  // Channels [c0, c1) x positions [s0, s1) of sample n, any layouts; at most kTile elements.
  void (*tile)(const ReverseStep& p, const Step& step, void* x_next, int64_t n, int64_t c0,
               int64_t c1, int64_t s0, int64_t s1);
};

constexpr int64_t kTileChannels = 16, kTilePositions = 128;
constexpr int64_t kTile = kTileChannels * kTilePositions;

}  // namespace engine

// The loops of reverse_step.cpp that are compiled per instruction set.
#pragma once

#include "../kernels.h"

namespace engine {

struct Step {
  float a, b, c, d, s, clip;
};

// Elements [begin, end) of tensors that all lie in memory alike; noise drawn only if contiguous.
using ReverseStepRange = void (*)(const ReverseStep& p, const Step& step, void* x_next,
                                  int64_t begin, int64_t end);

// A row of coefficients.
struct StepRow {
  float a, b, c, d, s, e, g0, g1, lo, hi;
};
// Channels [c0, c1) x positions [s0, s1) of sample n; at most kTile elements.
struct StepTile {
  int64_t n, c0, c1, s0, s1;
};
struct ReverseStepLoops {
  void (*step)(const ReverseStepGeneral& p, const StepRow& row, const StepTile& at);
  // out[count] <- |x0| before any bound
  void (*magnitude)(const ReverseStepGeneral& p, const StepRow& row, const StepTile& at,
                    float* out);
};

constexpr int64_t kTileChannels = 16, kTilePositions = 128;
constexpr int64_t kTile = kTileChannels * kTilePositions;

}  // namespace engine

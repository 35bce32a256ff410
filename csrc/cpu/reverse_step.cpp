// One reverse step on the CPU; ../kernels.h has the equations. No backward.
// Plain: x0 = clamp(a x + b m, +-clip), x_next = c x0 + d x + s z, (a, b, c, d, s) = coeffs[step],
//   over ranges of elements where all tensors lie in memory alike, z given or drawn in place
//   (noise_simd.h). Bound: with given noise memory, 4 elements; else the noise, about 5 clock
//   cycles per element.
// General, and whatever lies in several layouts: over tiles of channels x positions, each operand
//   read into a buffer of floats that stays in the nearest cache, so that a variant costs the bytes
//   of its operands: 4 or 2 an element each. Its flags are tested once a tile, not once an element.
//   A call that asks for no variant over memory that lies alike runs as a plain one: 10
//   against 18 us, 32 x 1 x 32 x 32 with given noise. x_next may be x's memory.
// Threshold: |x0| of a sample into memory, a histogram of 11 bits of the floats, then the exact
//   order statistics inside one bin. Parallel over samples. Bound: 4 bytes written and 8 read.
// Nothing is saved, nothing refused.
#include "reverse_step.h"

#include <algorithm>
#include <memory>

#include "isa.h"
#define ENGINE_KERNELS "reverse_step_loops.h"
#include "foreach_isa.h"

namespace engine {
namespace {

// The plain call as a general one.
ReverseStepGeneral general_of(const ReverseStep& p, void* x_next) {
  const auto operand = [&](const void* data, DType dtype, bool last) {
    return StepOperand{data, dtype, last, p.C * p.S, last ? p.C : p.S};
  };
  ReverseStepGeneral g;
  g.N = p.N, g.C = p.C, g.S = p.S;
  g.x = operand(p.x, p.dtype, p.x_channels_last);
  g.model_out = operand(p.model_out, p.model_out_dtype, p.model_out_channels_last);
  g.noise = operand(p.noise, p.dtype, p.noise_channels_last);
  g.dtype = p.dtype;
  g.channels_last = p.x_channels_last;
  g.x_next = x_next;
  g.coeffs = p.coeffs;
  g.n_steps = p.n_steps, g.columns = p.columns;
  g.step = p.step, g.seed = p.seed;
  g.offset = p.offset;
  g.clip = p.clip;
  return g;
}

StepRow row_of(const ReverseStepGeneral& p) {
  const int64_t index = *p.step;
  if (index < 0 || index >= p.n_steps) return {NAN, NAN, NAN, NAN, 0, 0, 0, 0, 0, 0};
  const float* row = p.coeffs + index * p.columns;
  if (p.columns == 5) return {row[0], row[1], row[2], row[3], row[4], 0, 0, 0, 0, 0};
  return {row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7], row[8], row[9]};
}

// Where every operand's samples lie in memory alike and without gaps, a sample is one long row.
void flatten(ReverseStepGeneral* p, bool drawn, bool has_results) {
  StepOperand* all[] = {&p->x, &p->model_out, &p->v, &p->uncond, &p->grad, &p->x0_prev, &p->noise};
  const bool last = p->x.channels_last;
  if (last && drawn) return;
  if (has_results && last != p->channels_last) return;
  for (const StepOperand* o : all) {
    if (o->data && (o->channels_last != last || o->pitch != (last ? p->C : p->S))) return;
  }
  p->S *= p->C;
  p->C = 1;
  for (StepOperand* o : all) o->channels_last = false, o->pitch = p->S;
  p->channels_last = false;
}

// The flattened general call as a plain one; false where it is none, or its samples have gaps.
bool plain_of(const ReverseStepGeneral& p, const StepRow& row, ReverseStep* plain) {
  if (p.v.data || p.uncond.data || p.grad.data || p.threshold || p.x0 || p.model_in) return false;
  if (p.x0_prev.data && row.e != 0) return false;
  for (const StepOperand* o : {&p.x, &p.model_out, &p.noise}) {
    const bool one_run = o->pitch == p.S && (o->sample == p.C * p.S || p.N == 1);
    if (o->data && (o->channels_last || !one_run)) return false;
  }
  if (p.channels_last) return false;
  plain->N = p.N, plain->C = p.C, plain->S = p.S;
  plain->x = p.x.data, plain->model_out = p.model_out.data, plain->noise = p.noise.data;
  plain->dtype = p.dtype, plain->model_out_dtype = p.model_out.dtype;
  plain->seed = p.seed, plain->step = p.step, plain->offset = p.offset;
  return p.noise.data == nullptr || p.noise.dtype == p.dtype;
}

int64_t tile_positions(const ReverseStepGeneral& p) { return p.C == 1 ? kTile : kTilePositions; }
int64_t tiles_of_sample(const ReverseStepGeneral& p) {
  return (p.C + kTileChannels - 1) / kTileChannels *
         ((p.S + tile_positions(p) - 1) / tile_positions(p));
}
StepTile tile_at(const ReverseStepGeneral& p, int64_t n, int64_t item) {
  const int64_t positions = tile_positions(p), s_tiles = (p.S + positions - 1) / positions;
  const int64_t c0 = item / s_tiles * kTileChannels, s0 = item % s_tiles * positions;
  return {n, c0, std::min(c0 + kTileChannels, p.C), s0, std::min(s0 + positions, p.S)};
}

// The order statistics `rank` and rank + 1 of n magnitudes, interpolated; NaN if one is NaN.
// A float that is not negative orders like its bits.
float quantile(float* values, float* bin, int64_t n, int64_t rank, float fraction) {
  constexpr int kBins = 2048, kShift = 20;
  const auto bits_of = [](float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
  };
  int32_t counts[kBins] = {};
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_of(values[i]);
    ++counts[bits >> kShift];
    largest = std::max(largest, bits);
  }
  if (largest > 0x7F800000u) return NAN;
  uint32_t chosen = 0;
  int64_t below = 0;
  while (below + counts[chosen] <= rank) below += counts[chosen++];
  int64_t count = 0;
  float above = INFINITY;  // the least value past the bin
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t b = bits_of(values[i]) >> kShift;
    if (b == chosen) bin[count++] = values[i];
    if (b > chosen && values[i] < above) above = values[i];
  }
  float* at = bin + (rank - below);
  std::nth_element(bin, at, bin + count);
  const float low = *at;
  if (fraction == 0) return low;
  const float high = at + 1 < bin + count ? *std::min_element(at + 1, bin + count) : above;
  return high == low ? low : low + fraction * (high - low);
}

void run_plain(const ReverseStep& p, const Step& step, void* x_next,
               const ParallelFor& parallel_for) {
  const ReverseStepRange range = ENGINE_PICK(reverse_step_range)(p.dtype, p.model_out_dtype);
  parallel_for(p.N * p.C * p.S, step.s != 0 && !p.noise ? 4096 : 32768,
               [&](int64_t begin, int64_t end) { range(p, step, x_next, begin, end); });
}

}  // namespace

void reverse_step_fwd_cpu(const ReverseStep& p, void* x_next, const ParallelFor& parallel_for) {
  const int64_t index = *p.step;
  Step step{NAN, NAN, NAN, NAN, 0, p.clip};
  if (index >= 0 && index < p.n_steps) {
    const float* row = p.coeffs + index * p.columns;
    step = {row[0], row[1], row[2], row[3], row[4], p.clip};
  }
  const bool noise_last = p.noise ? p.noise_channels_last : false;
  const bool any_noise = step.s != 0;
  const bool alike = p.x_channels_last == p.model_out_channels_last &&
                     (!any_noise || p.x_channels_last == noise_last);
  if (!alike) return reverse_step_general_fwd_cpu(general_of(p, x_next), parallel_for);
  run_plain(p, step, x_next, parallel_for);
}

void reverse_step_general_fwd_cpu(const ReverseStepGeneral& given,
                                  const ParallelFor& parallel_for) {
  ReverseStepGeneral p = given;
  const StepRow row = row_of(p);
  flatten(&p, row.s != 0 && !p.noise.data, true);
  ReverseStep plain;
  if (plain_of(p, row, &plain)) {
    const Step step{row.a, row.b, row.c, row.d, row.s, p.clip};
    return run_plain(plain, step, p.x_next, parallel_for);
  }
  const ReverseStepLoops& loops = ENGINE_PICK(reverse_step_loops);
  const int64_t tiles = tiles_of_sample(p);
  parallel_for(p.N * tiles, 4, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      loops.step(p, row, tile_at(p, item / tiles, item % tiles));
    }
  });
}

void reverse_step_threshold_fwd_cpu(const ReverseStepGeneral& given, int64_t rank, float fraction,
                                    float* threshold, const ParallelFor& parallel_for) {
  ReverseStepGeneral p = given;
  const StepRow row = row_of(p);
  flatten(&p, false, false);
  const ReverseStepLoops& loops = ENGINE_PICK(reverse_step_loops);
  const int64_t count = p.C * p.S, tiles = tiles_of_sample(p);
  parallel_for(p.N, grain_of(4 * count), [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> values(new float[2 * count]);
    for (int64_t n = begin; n < end; ++n) {
      int64_t done = 0;
      for (int64_t i = 0; i < tiles; ++i) {
        const StepTile at = tile_at(p, n, i);
        loops.magnitude(p, row, at, values.get() + done);
        done += (at.c1 - at.c0) * (at.s1 - at.s0);
      }
      const float found = quantile(values.get(), values.get() + count, count, rank, fraction);
      // A NaN passes; an infinite bound would turn an overflow into a black picture.
      threshold[n] = found < 1.0f ? 1.0f : found < INFINITY ? found : NAN;
    }
  });
}

}  // namespace engine

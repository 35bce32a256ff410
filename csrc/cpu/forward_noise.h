// The loops of forward_noise.cpp that are compiled per instruction set: elements [begin, end) of
// sample n in contiguous order, at most kForwardNoiseChunk of them.
#pragma once

#include "../kernels.h"

namespace engine {

struct ForwardNoiseLoops {
  void (*x_t)(const ForwardNoise& p, int64_t n, int64_t begin, int64_t end, void* x_t, DType dtype,
              bool channels_last);
  // The sum of l over the elements; grad <- scale * l', unless null.
  double (*loss)(const ForwardNoise& p, const ForwardNoiseLoss& l, int64_t n, int64_t begin,
                 int64_t end, float scale, void* grad);
  // scale * l'
  void (*grad)(const ForwardNoise& p, const ForwardNoiseLoss& l, int64_t n, int64_t begin,
               int64_t end, float scale, void* dmodel_out);
};

}  // namespace engine

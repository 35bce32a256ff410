// The loops of adamw.cpp that are compiled per instruction set.
#pragma once

#include "../kernels.h"

namespace engine {

// What one tensor's step multiplies by: rounded to float once, as PyTorch does.
struct AdamWFactors {
  float grad_scale, keep, m_weight, beta2, v_weight, root, eps, rate, average_weight;
};

struct AdamWLoops {
  // Elements [begin, end) of a tensor, begin a multiple of 16, end one too or the tensor's.
  void (*step)(const AdamWFactors& f, const AdamWTensor& t, int64_t begin, int64_t end);
  double (*squares)(const Gradient& grad, int64_t begin, int64_t end);
};

}  // namespace engine

// 3x3 convolution of stride 1 in bfloat16 by Winograd's F(2x2, 3x3) where the CPU has AVX512_BF16
// and no AMX, for inference: conv2d_winograd.cpp says how.
//
// Precision: x, weights and y are bfloat16. B^T d B is added in float32 and rounded to bfloat16, as
// G w G^T is, from the float32 weights; their products are summed in float32, and A^T . A, bias and
// add, in float32 as well, are rounded once.
//
// Bound: the products, vdpbf16ps, two pairs of vectors a cycle; with 2.25 times fewer of them the
// transforms, which are in float32, come to a sixth of the time (128 channels).
#include "amx.h"
#include "conv2d_winograd.h"
#include "isa.h"

#ifdef ENGINE_AMX  // these compilers know AVX512_BF16 too
#define ENGINE_LEVEL 2
#define ENGINE_BF16_DOTS 1
#define ENGINE_KERNELS "conv2d_winograd_loops.h"
ENGINE_BF16_TARGET
namespace engine {
namespace avx512_bf16 {
#include "simd.h"
#include ENGINE_KERNELS
}  // namespace avx512_bf16
}  // namespace engine
ENGINE_BF16_TARGET_END

namespace engine {

bool conv2d_winograd_bf16_available() { return bf16_dots_allowed(); }

void conv2d_winograd_fwd_cpu(const Conv2dWinograd<bf16>& p, const ParallelFor& parallel_for) {
  winograd_fwd(avx512_bf16::winograd_loops(), p, parallel_for);
}

}  // namespace engine
#else  // this compiler cannot, and nobody calls

namespace engine {
bool conv2d_winograd_bf16_available() { return false; }
void conv2d_winograd_fwd_cpu(const Conv2dWinograd<bf16>&, const ParallelFor&) {}
}  // namespace engine
#endif

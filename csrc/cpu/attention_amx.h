// Attention of bfloat16 by AMX, Intel's matrix unit (Sapphire Rapids and later): attention_amx.cpp,
// attention_bwd_amx.cpp.
#pragma once

#include "../kernels.h"
#include "amx.h"

namespace engine {

// AMX and AVX-512 with bfloat16 are here, the system lets us use them, and isa.h's level is kAmx.
bool attention_amx_available();

// attention_fwd_cpu and attention_bwd_cpu for p.dtype == DType::bf16, where it is available.
void attention_fwd_amx(const Attention& p, const AttentionView& out, float* lse,
                       const ParallelFor& parallel_for);
void attention_bwd_amx(const Attention& p, const AttentionGrads& grads,
                       const ParallelFor& parallel_for);

}  // namespace engine

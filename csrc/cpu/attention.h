// Attention on the CPU: what the paths share. attention.cpp, attention_bwd.cpp serve every dtype
// and instruction set; attention_amx*.cpp serve bfloat16 on chips with AMX.
//
//   out = softmax(q k^T * scale) v,  lse = ln sum exp(q k^T * scale)
#pragma once

#include <cstdint>

#include "../kernels.h"
#include "scratch.h"

namespace engine {

// Element (n, h, 0, 0) of a view, `size` bytes per element.
inline char* head_of(const AttentionView& view, int64_t n, int64_t h, int64_t size) {
  return static_cast<char*>(view.data) + (n * view.n + h * view.h) * size;
}

// The rows of one head: element (s, d) at s * s_stride + d * d_stride.
struct AttentionRows {
  void* data;
  int64_t s, d;
};
struct FloatRows {
  const float* data;
  int64_t s;
};
inline AttentionRows rows_of(const AttentionView& view, int64_t n, int64_t h, int64_t s,
                             int64_t size) {
  return {head_of(view, n, h, size) + s * view.s * size, view.s, view.d};
}

// The cache lines of `rows` rows, into L2; `write`: with the right to write them. Heads lie in
// pieces of D elements, which the hardware does not fetch ahead.
template <bool write = false>
inline void prefetch_rows(const AttentionRows& at, int64_t rows, int64_t D, int64_t size) {
  const char* row = static_cast<const char*>(at.data);
  const int64_t bytes = ((D - 1) * at.d + 1) * size;
  for (int64_t r = 0; r < rows; ++r, row += at.s * size) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, write, 2);
  }
}

// Room for n floats and a vector past them, whole cache lines.
inline int64_t room(int64_t n) { return (n + 31) / 16 * 16; }

// The loops of attention.cpp that are compiled per instruction set, for one dtype.
struct AttentionLoops {
  int64_t queries;                // of a block
  int64_t (*scratch)(int64_t D);  // floats

  // (rows, D) floats; a vector past them is overwritten.
  void (*to_float)(float* to, const AttentionRows& from, int64_t rows, int64_t D);
  void (*block)(const AttentionRows& q, int64_t rows, const FloatRows& K, const FloatRows& V,
                int64_t Sk, int64_t D, float scale, const AttentionRows& out, float* lse,
                float* scratch);
};

// The loops of attention_bwd.cpp. Q, dO, and dQ with rows of `pitch(D)`, are of all S queries.
struct AttentionGradLoops {
  int64_t keys;  // of a block
  int64_t (*scratch)(int64_t D);
  int64_t (*pitch)(int64_t D);

  void (*to_float)(float* to, const AttentionRows& from, int64_t rows, int64_t D);
  // delta[s] = sum over d of dO * O
  void (*dots)(float* delta, const float* dO, const AttentionRows& out, int64_t rows, int64_t D);
  // dk and dv of `rows` keys; dQ += their part, without the scale; `first`: dQ = their part.
  void (*block)(const float* Q, const float* dO, const float* lse, const float* delta, int64_t S,
                int64_t D, float scale, const AttentionRows& k, const AttentionRows& v,
                int64_t rows, const AttentionRows& dk, const AttentionRows& dv, float* dQ,
                bool first, float* scratch);
  // to = scale * (sum of `parts` arrays, `apart` floats from one to the next)
  void (*finish)(const AttentionRows& to, const float* from, int64_t parts, int64_t apart,
                 int64_t rows, int64_t D, float scale);
};

}  // namespace engine

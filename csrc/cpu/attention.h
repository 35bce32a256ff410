// Attention on the CPU: what the paths share. attention.cpp, attention_bwd.cpp serve every dtype
// and instruction set; attention_amx*.cpp serve bfloat16 on chips with AMX.
//
//   out = softmax(q k^T * scale) v,  lse = ln sum exp(q k^T * scale)
#pragma once

#include <cstdint>
#include <new>

#include "../kernels.h"

namespace engine {

// A thread's scratch memory, for good: fresh memory would cost a page fault per 4 KB in every call.
// 64-byte aligned, not zeroed; the next call on this thread may move or overwrite it.
inline char* attention_scratch(int64_t bytes) {
  struct Buffer {
    char* data = nullptr;
    int64_t bytes = 0;
    ~Buffer() { ::operator delete(data, std::align_val_t{64}); }
  };
  thread_local Buffer buffer;
  if (buffer.bytes < bytes) {
    ::operator delete(buffer.data, std::align_val_t{64});
    buffer.data = nullptr, buffer.bytes = 0;
    buffer.data = static_cast<char*>(::operator new(bytes, std::align_val_t{64}));
    buffer.bytes = bytes;
  }
  return buffer.data;
}

// Element (n, h, 0, 0) of a view, `size` bytes per element.
inline char* head_of(const AttentionView& view, int64_t n, int64_t h, int64_t size) {
  return static_cast<char*>(view.data) + (n * view.n + h * view.h) * size;
}

}  // namespace engine

// A thread's scratch memory, for good: fresh memory would cost a page fault per 4 KB in every call.
#pragma once

#include <cstdint>
#include <new>

namespace engine {

// 64-byte aligned, not zeroed; the next call on this thread may move or overwrite it.
inline char* thread_scratch(int64_t bytes) {
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

}  // namespace engine

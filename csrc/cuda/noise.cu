// noise: out[i] = normal number offset + i of (seed, step, stream), csrc/philox.h.
//
// Grid: one thread per 8 elements, in two quads of the contract (three when the thread's first
// number is not divisible by 4); 16-byte stores, element by element at ends that are not aligned.
// seed and step are read from device memory, so that a captured launch can be replayed with others.
// Bytes per element: the element itself, written once. Nothing is saved, nothing refused.
#include "../philox.h"
#include "noise.h"

namespace engine {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    noise_kernel(T* out,  // (n,)
                 int64_t n, const int64_t* seed, const int64_t* step, uint32_t stream_id,
                 int64_t offset, int head) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t first = thread * kPerThread - head;
  if (first >= n) return;
  float z[kPerThread];
  numbered_normals(*seed, static_cast<uint32_t>(*step), stream_id, offset + first, z);
  Slot<T, kPerThread> slot;
#pragma unroll
  for (int i = 0; i < slot.WORDS; ++i) slot.set(i, z + i * slot.PER_WORD);
  store_slot(slot, out, first, n);
}

}  // namespace

void noise_cuda(void* out, DType dtype, int64_t n, const int64_t* seed, const int64_t* step,
                uint32_t stream_id, int64_t offset, void* stream) {
  if (n == 0) return;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    // Slots start at multiples of 16 bytes: the first one may begin before the tensor.
    const int head = static_cast<int>(reinterpret_cast<uintptr_t>(out) % 16 / sizeof(T));
    const int64_t threads = (n + head + kPerThread - 1) / kPerThread;
    ENGINE_LAUNCH(noise_kernel<T>, blocks((threads + kThreads - 1) / kThreads, "noise"), kThreads,
                  0, stream, static_cast<T*>(out), n, seed, step, stream_id, offset, head);
  });
  check_launch("noise");
}

}  // namespace engine

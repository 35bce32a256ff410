// What the library has once: its namespace of ops and the look-up of the current CUDA stream.
// The ops themselves stand in csrc/ops_<op>.cpp, what they share in csrc/ops.h.
#include "ops.h"

#ifdef ENGINE_CUDA
#include <dlfcn.h>

// torch loads libtorch_cuda privately, and a CPU torch has none: a linked reference would be null
// or would keep the library from loading, so the symbol is looked up in what torch has loaded.
void* engine::ops::current_stream(int32_t device) {
  using Lookup = AOTITorchError (*)(int32_t, void**);
  static const Lookup lookup = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    return library ? reinterpret_cast<Lookup>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                   : nullptr;
  }();
  STD_TORCH_CHECK(lookup != nullptr, "CUDA tensors need a torch that was built with CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(lookup(device, &stream));
  return stream;
}
#endif

// Defines the namespace; each csrc/ops_<op>.cpp adds its schemas as a fragment of it.
STABLE_TORCH_LIBRARY(ENGINE_NS, m) {}

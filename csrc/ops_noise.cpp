// Bindings of noise: fills a contiguous tensor with the normals of csrc/philox.h.
#include "ops.h"

namespace engine::ops {
namespace {

template <class Device>
void noise_fwd(Tensor out, const Tensor& seed, const Tensor& step, int64_t stream, int64_t offset) {
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  STD_TORCH_CHECK(stream >= 0 && stream <= UINT32_MAX, "stream must be an unsigned 32-bit number");
  STD_TORCH_CHECK(offset >= 0, "offset must not be negative");
  const DType dtype = dtype_of(out, "out");
  const int64_t* seed_data = scalar_int64(seed, out, "seed");
  const int64_t* step_data = scalar_int64(step, out, "step");
  const uint32_t stream_id = static_cast<uint32_t>(stream);
  Device device(out);
  const int64_t n = out.numel();
  if (n == 0) return;
  if constexpr (Device::is_cpu) {
    engine::noise_cpu(out.data_ptr(), dtype, n, seed_data, step_data, stream_id, offset,
                      device.parallel_for());
  } else {
    engine::noise_cuda(out.data_ptr(), dtype, n, seed_data, step_data, stream_id, offset,
                       device.stream);
  }
}

template <class Device>
void register_kernels(Library& m) {
  m.impl("noise_fwd", TORCH_BOX(&noise_fwd<Device>));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ENGINE_NS, m) {
  m.def("noise_fwd(Tensor(a!) out, Tensor seed, Tensor step, int stream, int offset) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ENGINE_NS, CPU, m) { register_kernels<OnCpu>(m); }
#ifdef ENGINE_CUDA
STABLE_TORCH_LIBRARY_IMPL(ENGINE_NS, CUDA, m) { register_kernels<Cuda>(m); }
#endif

}  // namespace engine::ops

// The device that is asked for its properties, cooperative launches and their grid: a part of
// cuda_on_cpu.h, included by it.
#pragma once

using cudaStream_t = struct CUstream_st*;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrCooperativeLaunch = 95
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrCooperativeLaunch ? 1
           : attribute == cudaDevAttrL2CacheSize     ? cuda_on_cpu::l2_bytes
                                                     : cuda_on_cpu::processors;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative = 2 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
template <typename... Params, typename... Args>
void cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                        Args&&... args) {
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i)
    cooperative |=
        config->attrs[i].id == cudaLaunchAttributeCooperative && config->attrs[i].val.cooperative;
  const auto run = [&](auto launch) {
    launch(kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes, args...);
  };
  if (cooperative)
    run([](auto... all) { cuda_on_cpu::launch_cooperative(all...); });
  else
    run([](auto... all) { cuda_on_cpu::launch(all...); });
}

namespace cooperative_groups {
struct grid_group {
  using arrival_token = unsigned;
  // As on a device, the block arrives as one: all of its threads must come.
  arrival_token barrier_arrive() const {
    return cuda_on_cpu::arrive(cuda_on_cpu::grid_barrier, gridDim.x * cuda_on_cpu::block_threads);
  }
  void barrier_wait(arrival_token&& token) const {
    cuda_on_cpu::wait(cuda_on_cpu::grid_barrier, token);
  }
  void sync() const { barrier_wait(barrier_arrive()); }
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups

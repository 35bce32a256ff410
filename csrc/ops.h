// What the bindings of all ops share: where a call runs, checks, shapes, layouts, allocation.
//
// This file, ops.cpp and each op's ops_<op>.cpp are the only files that include torch, through its
// stable ABI. ops_<op>.cpp has the op's schemas, which repeat kernels/boundary.py, and its
// bindings, which check the tensors, allocate the results and hand plain pointers to a kernel of
// kernels.h.
//   ENGINE_NS       namespace of the ops, `engine` unless told otherwise
//   ENGINE_CUDA     the CUDA kernels are linked: register them for CUDA tensors
//   ENGINE_EMULATE  the CUDA kernels were compiled for the CPU: register them for CPU tensors
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <optional>

#include "kernels.h"

#ifndef ENGINE_NS
#define ENGINE_NS engine
#endif

namespace engine::ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Library = torch::stable::detail::StableLibrary;

// ---- Devices: what a kernel needs besides its operands ------------------------------------------

struct Cpu {
  static constexpr bool is_cpu = true;
  explicit Cpu(const Tensor&) {}

  static void run(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    torch::stable::parallel_for(0, n, grain, body);
  }
  static const engine::ParallelFor& parallel_for() {
    static const engine::ParallelFor pool = run;  // torch's own threads: no second pool
    return pool;
  }
};

#ifdef ENGINE_CUDA
void* current_stream(int32_t device);
#endif

struct Cuda {
  static constexpr bool is_cpu = false;
#ifdef ENGINE_CUDA
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;
  explicit Cuda(const Tensor& x)
      : guard(x.get_device_index()), stream(current_stream(x.get_device_index())) {}
#else
  void* stream = nullptr;
  explicit Cuda(const Tensor&) {}
#endif
};

// Whose kernels serve CPU tensors.
#ifdef ENGINE_EMULATE
using OnCpu = Cuda;
#else
using OnCpu = Cpu;
#endif

// ---- Checks -------------------------------------------------------------------------------------

inline DType dtype_of(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
      " must be float32, bfloat16 or float16");
  return type == ScalarType::Float      ? DType::f32
         : type == ScalarType::BFloat16 ? DType::bf16
                                        : DType::f16;
}

inline void check_device(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index(), name,
                  " must be on the device of the first tensor");
}

struct Shape {
  int64_t N, C, S;
};

inline Shape shape_of(const Tensor& x, const char* name) {
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(sizes.size() >= 2, name, " must have shape (N, C, *S)");
  Shape shape{sizes[0], sizes[1], 1};
  for (size_t i = 2; i < sizes.size(); ++i) shape.S *= sizes[i];
  return shape;
}

// Whether x is (N, S, C) in memory.
inline bool reads_channels_last(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t expected = sizes[1];
  bool dense = sizes[1] == 1 || strides[1] == 1;
  for (size_t i = sizes.size() - 1; i >= 2; --i) {
    dense &= sizes[i] == 1 || strides[i] == expected;
    expected *= sizes[i];
  }
  return dense && (sizes[0] == 1 || strides[0] == expected);
}

// True when x is (N, S, C) in memory, false when it is (N, C, S) or both; other layouts raise.
inline bool is_channels_last(const Tensor& x, const char* name) {
  if (x.is_contiguous()) return false;
  STD_TORCH_CHECK(reads_channels_last(x), name, " must be contiguous or channels_last");
  return true;
}

inline void check_same_shape(const Tensor& t, const Tensor& x, const char* name) {
  const auto a = t.sizes(), b = x.sizes();
  bool same = a.size() == b.size();
  for (size_t i = 0; same && i < a.size(); ++i) same = a[i] == b[i];
  STD_TORCH_CHECK(same, name, " must have the shape of the first tensor");
}

inline const int64_t* scalar_int64(const Tensor& t, const Tensor& x, const char* name) {
  check_device(t, x, name);
  STD_TORCH_CHECK(t.numel() == 1 && t.scalar_type() == ScalarType::Long, name,
                  " must be an int64 tensor of one element");
  return static_cast<const int64_t*>(t.data_ptr());
}

// A small operand, (C,) or (N, C); the second may have any row stride.
inline Operand per_channel(const OptionalTensor& t, const Tensor& x, int64_t C, const char* name) {
  if (!t) return {};
  check_device(*t, x, name);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == C, name, " must have shape (C,), C = ", C);
  STD_TORCH_CHECK(C == 1 || t->stride(0) == 1, name, " must be contiguous");
  return {t->data_ptr(), 0, dtype_of(*t, name)};
}

inline Operand per_sample(const OptionalTensor& t, const Tensor& x, int64_t N, int64_t C,
                          const char* name) {
  if (!t) return {};
  check_device(*t, x, name);
  STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == N && t->size(1) == C, name,
                  " must have shape (N, C) = (", N, ", ", C, ")");
  STD_TORCH_CHECK(C == 1 || t->stride(1) == 1, name, " must have stride 1 along C");
  return {t->data_ptr(), t->stride(0), dtype_of(*t, name)};
}

// ---- Allocation ---------------------------------------------------------------------------------

// new_empty's shim is the cheapest allocation that torch's deterministic fill still reaches.
inline Tensor allocate(const Tensor& like, const int64_t* sizes, int64_t dim, ScalarType type) {
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes, dim, &dtype, nullptr, nullptr,
                                                   0, nullptr, &handle));
  return Tensor(handle);
}

inline Tensor allocate_floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return allocate(like, sizes.begin(), static_cast<int64_t>(sizes.size()), ScalarType::Float);
}

inline Tensor allocate_like(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t expected = 1;
  for (size_t i = sizes.size(); i-- > 0; expected *= sizes[i]) {
    if (strides[i] != expected) return torch::stable::empty_like(x);
  }
  return allocate(x, sizes.data(), static_cast<int64_t>(sizes.size()), x.scalar_type());
}

inline float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

}  // namespace engine::ops

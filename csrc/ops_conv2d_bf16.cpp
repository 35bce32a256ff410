// Bindings of the convolution and the projection of bfloat16: for CPU tensors, inference.
//
// Pictures are channels_last, and so is the result. Weights are packed by kernels/conv2d_bf16.py.
#ifndef ENGINE_EMULATE
#include "ops.h"

namespace engine::ops {
namespace {

void check_operand(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::BFloat16, name,
                  " must be a bfloat16 tensor on the CPU");
}

// A picture (N, C, H, W) as a source.
Conv2dSource picture(const Tensor& x, int64_t N, int64_t H, int64_t W, bool taps,
                     const char* name) {
  check_operand(x, name);
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(sizes.size() == 4 && sizes[0] == N && sizes[2] == H && sizes[3] == W, name,
                  " must have shape (", N, ", C, ", H, ", ", W, ")");
  STD_TORCH_CHECK(reads_channels_last(x), name, " must be channels_last");
  return {x.data_ptr(), sizes[1], taps};
}

void finish(Conv2dBf16& p, const Tensor& weight, const OptionalTensor& bias, const Tensor& out) {
  STD_TORCH_CHECK(conv2d_bf16_level() != 0,
                  "this CPU, or what runs on it, has neither AMX nor AVX512_BF16");
  check_operand(weight, "weight");
  STD_TORCH_CHECK(
      weight.is_contiguous() && weight.numel() == (p.Co + 15) / 16 * conv2d_bf16_steps(p) * 512,
      "weight must be packed for these channels");
  if (bias) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->scalar_type() == ScalarType::Float &&
                        bias->is_contiguous() && bias->numel() == p.Co,
                    "bias must be float32 of shape (", p.Co, ",)");
    p.bias = floats(*bias);
  }
  p.weight = weight.data_ptr(), p.out = out.data_ptr();
  conv2d_bf16_fwd_cpu(p, Cpu::parallel_for());
}

Tensor conv2d_bf16_fwd(const Tensor& x, const OptionalTensor& x2, const OptionalTensor& x3,
                       const OptionalTensor& x4, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& add, int64_t out_channels, int64_t kernel,
                       int64_t stride, int64_t padding, bool upsample) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have shape (N, C, H, W)");
  const bool taps = kernel == 3;
  STD_TORCH_CHECK(
      (taps ? stride == 1 || stride == 2 : kernel == 1 && stride == 1) &&
          (padding == (taps ? 1 : 0) || (taps && stride == 2 && padding == 0)) &&
          !(upsample && (!taps || stride == 2)),
      "kernel, stride, padding must be 3, 1, 1; 3, 2, 1; 3, 2, 0; 1, 1, 0; upsample of 3, 1, 1");
  const auto sizes = x.sizes();
  Conv2dBf16 p{};
  const auto length = [&](int64_t n) {
    return upsample ? 2 * n : (n + 2 * padding - kernel) / stride + 1;
  };
  p.N = sizes[0], p.Hi = sizes[2], p.Wi = sizes[3], p.Co = out_channels;
  STD_TORCH_CHECK(p.Hi + 2 * padding >= kernel && p.Wi + 2 * padding >= kernel,
                  "x must not be smaller than the kernel");
  p.H = length(p.Hi), p.W = length(p.Wi), p.stride = stride, p.padding = padding;
  p.upsample = upsample;
  STD_TORCH_CHECK(x.numel() > 0 && p.Co > 0, "x must not be empty");
  p.sources[p.count++] = picture(x, p.N, p.Hi, p.Wi, taps, "x");
  if (x2) p.sources[p.count++] = picture(*x2, p.N, p.Hi, p.Wi, taps, "x2");
  if (x3) p.sources[p.count++] = picture(*x3, p.N, p.H, p.W, false, "x3");
  if (x4) p.sources[p.count++] = picture(*x4, p.N, p.H, p.W, false, "x4");
  if (add) {
    const Conv2dSource a = picture(*add, p.N, p.H, p.W, false, "add");
    STD_TORCH_CHECK(a.C == p.Co, "add must have ", p.Co, " channels");
    p.add = a.data;
  }
  const int64_t memory[] = {p.N, p.H, p.W, p.Co}, shape[] = {p.N, p.Co, p.H, p.W},
                strides[] = {p.H * p.W * p.Co, 1, p.W * p.Co, p.Co};
  const Tensor dense = allocate(x, memory, 4, ScalarType::BFloat16);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(dense.get(), 4, shape, strides, 0, &handle));
  Tensor out(handle);
  finish(p, weight, bias, out);
  return out;
}

Tensor linear_bf16_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& add, int64_t out_features) {
  check_operand(x, "x");
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(sizes.size() >= 1 && sizes.size() <= 4 && x.is_contiguous() && x.numel() > 0,
                  "x must be contiguous, of 1 to 4 dimensions, and not empty");
  Conv2dBf16 p{};
  const int64_t C = sizes[sizes.size() - 1], rows = x.numel() / C;
  p.N = 1, p.H = p.Hi = 1, p.W = p.Wi = rows, p.Co = out_features, p.stride = 1;
  p.sources[p.count++] = {x.data_ptr(), C, false};
  int64_t shape[4];
  for (size_t i = 0; i < sizes.size(); ++i) shape[i] = sizes[i];
  shape[sizes.size() - 1] = out_features;
  if (add) {
    check_operand(*add, "add");
    STD_TORCH_CHECK(add->is_contiguous() && add->numel() == rows * out_features,
                    "add must be contiguous, of the result's shape");
    p.add = add->data_ptr();
  }
  Tensor out = allocate(x, shape, static_cast<int64_t>(sizes.size()), ScalarType::BFloat16);
  finish(p, weight, bias, out);
  return out;
}

int64_t level() { return conv2d_bf16_level(); }

// Of every kernel, not of these alone; 3 is none.
void limit(int64_t level) { limit_isa_level(static_cast<int>(level)); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ENGINE_NS, m) {
  m.def(
      "conv2d_bf16_fwd(Tensor x, Tensor? x2, Tensor? x3, Tensor? x4, Tensor weight, Tensor? bias, "
      "Tensor? add, int out_channels, int kernel, int stride, int padding, bool upsample) -> "
      "Tensor");
  m.def(
      "linear_bf16_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? add, int out_features) -> "
      "Tensor");
  m.def("conv2d_bf16_level() -> int");
  m.def("limit_isa_level(int level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ENGINE_NS, CPU, m) {
  m.impl("conv2d_bf16_fwd", TORCH_BOX(&conv2d_bf16_fwd));
  m.impl("linear_bf16_fwd", TORCH_BOX(&linear_bf16_fwd));
}

STABLE_TORCH_LIBRARY_IMPL(ENGINE_NS, CompositeExplicitAutograd, m) {
  m.impl("conv2d_bf16_level", TORCH_BOX(&level));
  m.impl("limit_isa_level", TORCH_BOX(&limit));
}

}  // namespace engine::ops
#endif

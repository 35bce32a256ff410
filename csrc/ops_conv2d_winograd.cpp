// Binding of conv2d_winograd, for float32 CPU tensors alone.
#ifndef ENGINE_EMULATE
#include "ops.h"

namespace engine::ops {
namespace {

const float* image(const Tensor& t, const Tensor& x, int64_t channels, int64_t times,
                   const char* name) {
  check_device(t, x, name);
  const auto a = t.sizes(), b = x.sizes();
  STD_TORCH_CHECK(a.size() == 4 && a[0] == b[0] && a[1] == channels && a[2] == times * b[2] &&
                      a[3] == times * b[3],
                  name, " must be (", b[0], ", ", channels, ", ", times * b[2], ", ", times * b[3],
                  ")");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, name, " must be float32");
  STD_TORCH_CHECK(reads_channels_last(t), name, " must be channels_last");
  return floats(t);
}

Tensor conv2d_winograd_fwd(const Tensor& x, const OptionalTensor& x2, const Tensor& weight,
                           const OptionalTensor& bias, const OptionalTensor& add, bool upsample) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be (N, C, H, W)");
  engine::Conv2dWinograd p;
  p.N = x.size(0);
  const int64_t times = upsample ? 2 : 1;
  p.upsample = upsample;
  p.H = times * x.size(2);
  p.W = times * x.size(3);
  p.C2 = x2 ? x2->size(1) : 0;
  p.C = x.size(1) + p.C2;
  STD_TORCH_CHECK(p.C % 16 == 0 && p.C2 % 16 == 0, "channels must be multiples of 16");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(0) % 2 == 0 && weight.size(1) == 16 &&
                      weight.size(2) == p.C && weight.size(3) == 16 && weight.is_contiguous() &&
                      weight.scalar_type() == ScalarType::Float,
                  "weight must be contiguous float32 (K / 16, 16, C, 16), K % 32 == 0");
  check_device(weight, x, "weight");
  p.K = weight.size(0) * 16;
  p.x = image(x, x, p.C - p.C2, 1, "x");
  if (x2) p.x2 = image(*x2, x, p.C2, 1, "x2");
  p.weight = floats(weight);
  if (bias) {
    const Operand b = per_channel(bias, x, p.K, "bias");
    STD_TORCH_CHECK(b.dtype == DType::f32, "bias must be float32");
    p.bias = static_cast<const float*>(b.data);
  }
  if (add) p.add = image(*add, x, p.K, times, "add");
  Tensor y = torch::stable::transpose(
      torch::stable::transpose(allocate_floats(x, {p.N, p.H, p.W, p.K}), 2, 3), 1, 2);
  p.y = floats(y);
  if (p.N * p.H * p.W * p.K != 0) engine::conv2d_winograd_fwd_cpu(p, Cpu::parallel_for());
  return y;
}

Tensor conv2d_winograd_weight(const Tensor& weight, bool transposed) {
  const auto sizes = weight.sizes(), strides = weight.strides();
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::Float &&
                      sizes.size() == 4 && sizes[2] == 3 && sizes[3] == 3 &&
                      strides[2] == 3 * strides[3],
                  "weight must be float32 (K, C, 3, 3) on the CPU, its taps evenly spaced");
  const int a = transposed ? 1 : 0, b = 1 - a;
  STD_TORCH_CHECK(sizes[a] % 16 == 0, "channels of the result must be a multiple of 16");
  Tensor packed = allocate_floats(weight, {sizes[a] / 16, 16, sizes[b], 16});
  engine::conv2d_winograd_weight_cpu(floats(weight), sizes[a], sizes[b], strides[a], strides[b],
                                     strides[3], transposed, floats(packed), Cpu::parallel_for());
  return packed;
}

std::tuple<Tensor, Tensor> conv2d_winograd_bwd_weight(const Tensor& dy, const Tensor& x,
                                                      bool channels_last, bool bias) {
  STD_TORCH_CHECK(dy.dim() == 4 && x.dim() == 4, "dy and x must be (N, channels, H, W)");
  engine::Conv2dWinogradGrads p;
  p.N = x.size(0), p.C = x.size(1), p.H = x.size(2), p.W = x.size(3), p.K = dy.size(1);
  STD_TORCH_CHECK(p.C % 16 == 0 && p.K % 32 == 0,
                  "channels of x must be a multiple of 16, of dy a multiple of 32");
  STD_TORCH_CHECK(p.N * p.C * p.H * p.W * p.K != 0, "dy and x must not be empty");
  p.x = image(x, x, p.C, 1, "x");
  p.dy = image(dy, x, p.K, 1, "dy");
  Tensor dweight =
      channels_last ? allocate_floats(x, {p.K, 3, 3, p.C}) : allocate_floats(x, {p.K, p.C, 3, 3});
  if (channels_last) {
    dweight = torch::stable::transpose(torch::stable::transpose(dweight, 2, 3), 1, 2);
  }
  p.dweight = floats(dweight);
  p.k_stride = 9 * p.C, p.c_stride = channels_last ? 1 : 9, p.tap_stride = channels_last ? p.C : 1;
  Tensor dbias = allocate_floats(x, {bias ? p.K : 0});
  if (bias) p.dbias = floats(dbias);
  Tensor workspace = allocate_floats(x, {16, p.C * p.K + 16});
  engine::conv2d_winograd_bwd_weight_cpu(p, floats(workspace), Cpu::parallel_for());
  return {dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ENGINE_NS, m) {
  m.def(
      "conv2d_winograd_fwd(Tensor x, Tensor? x2, Tensor weight, Tensor? bias, Tensor? add, bool "
      "upsample) -> "
      "Tensor");
  m.def("conv2d_winograd_weight(Tensor weight, bool transposed) -> Tensor");
  m.def(
      "conv2d_winograd_bwd_weight(Tensor dy, Tensor x, bool channels_last, bool bias) -> (Tensor "
      "dweight, Tensor dbias)");
}

STABLE_TORCH_LIBRARY_IMPL(ENGINE_NS, CPU, m) {
  m.impl("conv2d_winograd_fwd", TORCH_BOX(&conv2d_winograd_fwd));
  m.impl("conv2d_winograd_weight", TORCH_BOX(&conv2d_winograd_weight));
  m.impl("conv2d_winograd_bwd_weight", TORCH_BOX(&conv2d_winograd_bwd_weight));
}

}  // namespace engine::ops
#endif

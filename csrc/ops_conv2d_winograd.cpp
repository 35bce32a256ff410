// Binding of conv2d_winograd, for CPU tensors: float32, the forward bfloat16 too.
#ifndef ENGINE_EMULATE
#include "cpu/conv2d_winograd.h"
#include "ops.h"

namespace engine::ops {
namespace {

template <class E>
constexpr bool kFloat = std::is_same_v<E, float>;

template <class E>
const E* image(const Tensor& t, const Tensor& x, int64_t channels, int64_t times,
               const char* name) {
  check_device(t, x, name);
  const auto a = t.sizes(), b = x.sizes();
  STD_TORCH_CHECK(a.size() == 4 && a[0] == b[0] && a[1] == channels && a[2] == times * b[2] &&
                      a[3] == times * b[3],
                  name, " must be (", b[0], ", ", channels, ", ", times * b[2], ", ", times * b[3],
                  ")");
  STD_TORCH_CHECK(t.scalar_type() == (kFloat<E> ? ScalarType::Float : ScalarType::BFloat16), name,
                  kFloat<E> ? " must be float32" : " must be bfloat16");
  STD_TORCH_CHECK(reads_channels_last(t), name, " must be channels_last");
  return static_cast<const E*>(t.data_ptr());
}

template <class E>
Tensor fwd(const Tensor& x, const OptionalTensor& x2, const Tensor& weight,
           const OptionalTensor& bias, const OptionalTensor& add, bool upsample) {
  engine::Conv2dWinograd<E> p;
  p.N = x.size(0);
  const int64_t times = upsample ? 2 : 1, least = kFloat<E> ? 16 : 32;
  p.upsample = upsample;
  p.H = times * x.size(2);
  p.W = times * x.size(3);
  p.C2 = x2 ? x2->size(1) : 0;
  p.C = x.size(1) + p.C2;
  STD_TORCH_CHECK(p.C % least == 0 && p.C2 % least == 0, "channels must be multiples of ", least);
  const bool packed = weight.dim() == (kFloat<E> ? 4 : 5) && weight.size(0) % 2 == 0 &&
                      weight.size(1) == 16 && weight.size(3) == 16 && weight.is_contiguous();
  if constexpr (kFloat<E>) {
    STD_TORCH_CHECK(packed && weight.size(2) == p.C && weight.scalar_type() == ScalarType::Float,
                    "weight must be contiguous float32 (K / 16, 16, C, 16), K % 32 == 0");
  } else {
    STD_TORCH_CHECK(packed && weight.size(2) == p.C / 2 && weight.size(4) == 2 &&
                        weight.scalar_type() == ScalarType::BFloat16,
                    "weight must be contiguous bfloat16 (K / 16, 16, C / 2, 16, 2), K % 32 == 0");
    STD_TORCH_CHECK(engine::conv2d_winograd_bf16_available(),
                    "bfloat16 needs a CPU with AVX512_BF16");
  }
  check_device(weight, x, "weight");
  p.K = weight.size(0) * 16;
  p.x = image<E>(x, x, p.C - p.C2, 1, "x");
  if (x2) p.x2 = image<E>(*x2, x, p.C2, 1, "x2");
  p.weight = static_cast<const E*>(weight.data_ptr());
  if (bias) {
    const Operand b = per_channel(bias, x, p.K, "bias");
    STD_TORCH_CHECK(b.dtype == DType::f32, "bias must be float32");
    p.bias = static_cast<const float*>(b.data);
  }
  if (add) p.add = image<E>(*add, x, p.K, times, "add");
  const int64_t sizes[] = {p.N, p.H, p.W, p.K};
  Tensor y = torch::stable::transpose(
      torch::stable::transpose(allocate(x, sizes, 4, x.scalar_type()), 2, 3), 1, 2);
  p.y = static_cast<E*>(y.data_ptr());
  if (p.N * p.H * p.W * p.K != 0) engine::conv2d_winograd_fwd_cpu(p, Cpu::parallel_for());
  return y;
}

Tensor conv2d_winograd_fwd(const Tensor& x, const OptionalTensor& x2, const Tensor& weight,
                           const OptionalTensor& bias, const OptionalTensor& add, bool upsample) {
  STD_TORCH_CHECK(x.dim() == 4, "x must be (N, C, H, W)");
  const bool low = x.scalar_type() == ScalarType::BFloat16;
  return low ? fwd<engine::bf16>(x, x2, weight, bias, add, upsample)
             : fwd<float>(x, x2, weight, bias, add, upsample);
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
  p.x = image<float>(x, x, p.C, 1, "x");
  p.dy = image<float>(dy, x, p.K, 1, "dy");
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

// Bindings of rms_norm_silu: forward and backward, for CPU tensors alone.
//
// An empty x is refused here: kernels.h excludes it.
#ifndef ENGINE_EMULATE
#include <tuple>

#include "ops.h"

namespace engine::ops {
namespace {

engine::RmsNormSilu rms_norm_silu_params(const Tensor& x, const OptionalTensor& weight,
                                         const OptionalTensor& scale, const OptionalTensor& shift,
                                         double eps, bool silu) {
  const Shape shape = shape_of(x, "x");
  STD_TORCH_CHECK(shape.N > 0 && shape.C > 0 && shape.S > 0, "x must not be empty");
  engine::RmsNormSilu p;
  p.N = shape.N;
  p.C = shape.C;
  p.S = shape.S;
  p.eps = static_cast<float>(eps);
  p.silu = silu;
  p.channels_last = is_channels_last(x, "x");
  p.dtype = dtype_of(x, "x");
  p.x = x.data_ptr();
  p.weight = per_channel(weight, x, p.C, "weight");
  p.scale = per_sample(scale, x, p.N, p.C, "scale");
  p.shift = per_sample(shift, x, p.N, p.C, "shift");
  return p;
}

std::tuple<Tensor, Tensor> rms_norm_silu_fwd(const Tensor& x, const OptionalTensor& weight,
                                             const OptionalTensor& scale,
                                             const OptionalTensor& shift, double eps, bool silu) {
  const auto p = rms_norm_silu_params(x, weight, scale, shift, eps, silu);
  STD_TORCH_CHECK(eps >= 1e-18, "eps must be at least 1e-18");
  Tensor y = allocate_like(x), rstd = allocate_floats(x, {p.N, p.S});
  engine::rms_norm_silu_fwd_cpu(p, y.data_ptr(), floats(rstd), Cpu::parallel_for());
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> rms_norm_silu_bwd(const Tensor& dy, const Tensor& x,
                                                             const OptionalTensor& weight,
                                                             const OptionalTensor& scale,
                                                             const OptionalTensor& shift,
                                                             const Tensor& rstd, bool silu) {
  const auto p = rms_norm_silu_params(x, weight, scale, shift, 1.0, silu);
  check_device(dy, x, "dy");
  check_device(rstd, x, "rstd");
  check_same_shape(dy, x, "dy");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy must have the dtype of x");
  STD_TORCH_CHECK(rstd.scalar_type() == ScalarType::Float && rstd.is_contiguous() &&
                      rstd.dim() == 2 && rstd.size(0) == p.N && rstd.size(1) == p.S,
                  "rstd must be contiguous float32 of shape (N, S)");
  const bool dy_channels_last = is_channels_last(dy, "dy");
  Tensor dx = allocate_like(x);
  Tensor workspace = allocate_floats(x, {p.N, engine::rms_norm_silu_pieces(p), 2, p.C});
  const auto sample_grad = [&](const OptionalTensor& t) {
    return t ? allocate_floats(x, {p.N, p.C}) : allocate_floats(x, {0});
  };
  Tensor dweight = allocate_floats(x, {weight ? p.C : 0});
  Tensor dscale = sample_grad(scale), dshift = sample_grad(shift);
  engine::RmsNormSiluGrads grads;
  grads.dx = dx.data_ptr();
  grads.dweight = weight ? floats(dweight) : nullptr;
  grads.dscale = scale ? floats(dscale) : nullptr;
  grads.dshift = shift ? floats(dshift) : nullptr;
  engine::rms_norm_silu_bwd_cpu(p, dy.data_ptr(), dy_channels_last, floats(rstd), floats(workspace),
                                grads, Cpu::parallel_for());
  return {dx, dweight, dscale, dshift};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ENGINE_NS, m) {
  m.def(
      "rms_norm_silu_fwd(Tensor x, Tensor? weight, Tensor? scale, Tensor? shift, float eps, bool "
      "silu) -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_silu_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor? scale, Tensor? shift, Tensor "
      "rstd, bool silu) -> (Tensor dx, Tensor dweight, Tensor dscale, Tensor dshift)");
}

STABLE_TORCH_LIBRARY_IMPL(ENGINE_NS, CPU, m) {
  m.impl("rms_norm_silu_fwd", TORCH_BOX(&rms_norm_silu_fwd));
  m.impl("rms_norm_silu_bwd", TORCH_BOX(&rms_norm_silu_bwd));
}

}  // namespace engine::ops
#endif

// Bindings of forward_noise: x_t, the loss, the loss with its gradient (CPU alone), its backward.
#include <tuple>

#include "ops.h"

namespace engine::ops {
namespace {

engine::ForwardNoise forward_noise_params(const Tensor& x0, const Tensor& coeffs, const Tensor& t,
                                          const OptionalTensor& seed, const OptionalTensor& step,
                                          const OptionalTensor& noise, int64_t offset) {
  STD_TORCH_CHECK(seed.has_value() == step.has_value() && seed.has_value() != noise.has_value(),
                  "either seed and step or noise must be given");
  STD_TORCH_CHECK(offset >= 0, "offset must not be negative");
  const Shape shape = shape_of(x0, "x0");
  check_device(coeffs, x0, "coeffs");
  STD_TORCH_CHECK(coeffs.scalar_type() == ScalarType::Float && coeffs.dim() == 2 &&
                      coeffs.size(1) == 4 && coeffs.is_contiguous(),
                  "coeffs must be contiguous float32 of shape (T, 4)");
  check_device(t, x0, "t");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.size(0) == shape.N &&
                      t.is_contiguous(),
                  "t must be contiguous int64 of shape (N,)");
  engine::ForwardNoise p;
  p.N = shape.N;
  p.C = shape.C;
  p.S = shape.S;
  p.x0_dtype = x0.scalar_type() == ScalarType::Byte ? DType::u8 : dtype_of(x0, "x0");
  p.x0_channels_last = is_channels_last(x0, "x0");
  p.noise_channels_last = false;
  p.x0 = x0.data_ptr();
  p.noise = nullptr;
  if (noise) {
    check_device(*noise, x0, "noise");
    check_same_shape(*noise, x0, "noise");
    STD_TORCH_CHECK(noise->scalar_type() == ScalarType::Float, "noise must be float32");
    p.noise_channels_last = is_channels_last(*noise, "noise");
    p.noise = floats(*noise);
  }
  p.coeffs = floats(coeffs);
  p.T = coeffs.size(0);
  p.t = static_cast<const int64_t*>(t.data_ptr());
  p.seed = seed ? scalar_int64(*seed, x0, "seed") : nullptr;
  p.step = step ? scalar_int64(*step, x0, "step") : nullptr;
  p.offset = offset;
  return p;
}

engine::ForwardNoiseLoss forward_noise_loss_params(const engine::ForwardNoise& p,
                                                   const Tensor& model_out, const Tensor& x0,
                                                   const OptionalTensor& weights, int64_t loss) {
  check_device(model_out, x0, "model_out");
  check_same_shape(model_out, x0, "model_out");
  STD_TORCH_CHECK(loss >= 0 && loss <= 2, "loss must be 0 (l1), 1 (l2) or 2 (huber)");
  engine::ForwardNoiseLoss l;
  l.model_out = model_out.data_ptr();
  l.dtype = dtype_of(model_out, "model_out");
  l.channels_last = is_channels_last(model_out, "model_out");
  l.weights = nullptr;
  l.loss = static_cast<engine::Loss>(loss);
  if (weights) {
    check_device(*weights, x0, "weights");
    STD_TORCH_CHECK(weights->scalar_type() == ScalarType::Float && weights->dim() == 1 &&
                        weights->size(0) == p.N && weights->is_contiguous(),
                    "weights must be contiguous float32 of shape (N,)");
    l.weights = floats(*weights);
  }
  return l;
}

template <class Device>
void forward_noise_fwd(Tensor x_t, const Tensor& x0, const Tensor& coeffs, const Tensor& t,
                       const OptionalTensor& seed, const OptionalTensor& step,
                       const OptionalTensor& noise, int64_t offset) {
  const auto p = forward_noise_params(x0, coeffs, t, seed, step, noise, offset);
  check_device(x_t, x0, "x_t");
  check_same_shape(x_t, x0, "x_t");
  const bool last = is_channels_last(x_t, "x_t");
  Device device(x0);
  if (p.N * p.C * p.S == 0) return;
  const DType dtype = dtype_of(x_t, "x_t");
  if constexpr (Device::is_cpu) {
    engine::forward_noise_fwd_cpu(p, x_t.data_ptr(), dtype, last, device.parallel_for());
  } else {
    engine::forward_noise_fwd_cuda(p, x_t.data_ptr(), dtype, last, device.stream);
  }
}

// mean (CPU alone): the result is the mean over N. grad: null, or allocated here like model_out.
template <class Device>
Tensor loss_and_grad(const Tensor& model_out, const Tensor& x0, const Tensor& coeffs,
                     const Tensor& t, const OptionalTensor& weights, const OptionalTensor& seed,
                     const OptionalTensor& step, const OptionalTensor& noise, int64_t offset,
                     int64_t loss, bool mean, OptionalTensor* grad) {
  const auto p = forward_noise_params(x0, coeffs, t, seed, step, noise, offset);
  const auto l = forward_noise_loss_params(p, model_out, x0, weights, loss);
  STD_TORCH_CHECK(p.N * p.C * p.S > 0, "x0 must not be empty");
  Device device(x0);
  Tensor result = allocate(x0, &p.N, mean ? 0 : 1, ScalarType::Float);
  const int64_t sizes[] = {p.N, engine::forward_noise_chunks(p)};
  Tensor workspace = allocate(x0, sizes, 2, ScalarType::Double);
  double* const sums = static_cast<double*>(workspace.data_ptr());
  if (grad) *grad = allocate_like(model_out);
  if constexpr (Device::is_cpu) {
    engine::forward_noise_loss_fwd_cpu(p, l, sums, floats(result), mean,
                                       grad ? (*grad)->data_ptr() : nullptr, device.parallel_for());
  } else {
    engine::forward_noise_loss_fwd_cuda(p, l, sums, floats(result), device.stream);
  }
  return result;
}

template <class Device>
Tensor forward_noise_loss_fwd(const Tensor& model_out, const Tensor& x0, const Tensor& coeffs,
                              const Tensor& t, const OptionalTensor& weights,
                              const OptionalTensor& seed, const OptionalTensor& step,
                              const OptionalTensor& noise, int64_t offset, int64_t loss) {
  return loss_and_grad<Device>(model_out, x0, coeffs, t, weights, seed, step, noise, offset, loss,
                               false, nullptr);
}

#ifndef ENGINE_EMULATE
std::tuple<Tensor, Tensor> forward_noise_loss_grad_fwd(
    const Tensor& model_out, const Tensor& x0, const Tensor& coeffs, const Tensor& t,
    const OptionalTensor& weights, const OptionalTensor& seed, const OptionalTensor& step,
    const OptionalTensor& noise, int64_t offset, int64_t loss, bool mean) {
  OptionalTensor grad;
  Tensor result = loss_and_grad<Cpu>(model_out, x0, coeffs, t, weights, seed, step, noise, offset,
                                     loss, mean, &grad);
  return {result, *grad};
}
#endif

template <class Device>
Tensor forward_noise_loss_bwd(const Tensor& dloss, const Tensor& model_out, const Tensor& x0,
                              const Tensor& coeffs, const Tensor& t, const OptionalTensor& weights,
                              const OptionalTensor& seed, const OptionalTensor& step,
                              const OptionalTensor& noise, int64_t offset, int64_t loss) {
  const auto p = forward_noise_params(x0, coeffs, t, seed, step, noise, offset);
  const auto l = forward_noise_loss_params(p, model_out, x0, weights, loss);
  check_device(dloss, x0, "dloss");
  STD_TORCH_CHECK(dloss.scalar_type() == ScalarType::Float && dloss.dim() == 1 &&
                      dloss.size(0) == p.N && dloss.is_contiguous(),
                  "dloss must be contiguous float32 of shape (N,)");
  Device device(x0);
  Tensor dmodel_out = allocate_like(model_out);
  if (p.N * p.C * p.S == 0) return dmodel_out;
  if constexpr (Device::is_cpu) {
    engine::forward_noise_loss_bwd_cpu(p, l, floats(dloss), dmodel_out.data_ptr(),
                                       device.parallel_for());
  } else {
    engine::forward_noise_loss_bwd_cuda(p, l, floats(dloss), dmodel_out.data_ptr(), device.stream);
  }
  return dmodel_out;
}

template <class Device>
void register_kernels(Library& m) {
  m.impl("forward_noise_fwd", TORCH_BOX(&forward_noise_fwd<Device>));
  m.impl("forward_noise_loss_fwd", TORCH_BOX(&forward_noise_loss_fwd<Device>));
  m.impl("forward_noise_loss_bwd", TORCH_BOX(&forward_noise_loss_bwd<Device>));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ENGINE_NS, m) {
  m.def(
      "forward_noise_fwd(Tensor(a!) x_t, Tensor x0, Tensor coeffs, Tensor t, Tensor? seed, Tensor? "
      "step, Tensor? noise, int offset) -> ()");
  m.def(
      "forward_noise_loss_fwd(Tensor model_out, Tensor x0, Tensor coeffs, Tensor t, Tensor? "
      "weights, Tensor? seed, Tensor? step, Tensor? noise, int offset, int loss) -> Tensor");
  m.def(
      "forward_noise_loss_grad_fwd(Tensor model_out, Tensor x0, Tensor coeffs, Tensor t, Tensor? "
      "weights, Tensor? seed, Tensor? step, Tensor? noise, int offset, int loss, bool mean) -> "
      "(Tensor loss, Tensor grad)");
  m.def(
      "forward_noise_loss_bwd(Tensor dloss, Tensor model_out, Tensor x0, Tensor coeffs, Tensor t, "
      "Tensor? weights, Tensor? seed, Tensor? step, Tensor? noise, int offset, int loss) -> "
      "Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ENGINE_NS, CPU, m) {
  register_kernels<OnCpu>(m);
#ifndef ENGINE_EMULATE
  m.impl("forward_noise_loss_grad_fwd", TORCH_BOX(&forward_noise_loss_grad_fwd));
#endif
}
#ifdef ENGINE_CUDA
STABLE_TORCH_LIBRARY_IMPL(ENGINE_NS, CUDA, m) { register_kernels<Cuda>(m); }
#endif

}  // namespace engine::ops

// Bindings of reverse_step: the step of the shipped samplers, the general step and its threshold.
#include "ops.h"

namespace engine::ops {
namespace {

void check_rows(const Tensor& coeffs, const Tensor& x) {
  check_device(coeffs, x, "coeffs");
  STD_TORCH_CHECK(coeffs.scalar_type() == ScalarType::Float && coeffs.dim() == 2 &&
                      (coeffs.size(1) == 5 || coeffs.size(1) == 10) && coeffs.is_contiguous(),
                  "coeffs must be contiguous float32 of shape (n_steps, 5) or (n_steps, 10)");
}

template <class Device>
Tensor reverse_step_fwd(const Tensor& x, const Tensor& model_out, const Tensor& coeffs,
                        const Tensor& step, const OptionalTensor& seed, const OptionalTensor& noise,
                        double clip, int64_t offset) {
  STD_TORCH_CHECK(seed.has_value() != noise.has_value(),
                  "exactly one of seed and noise must be given");
  STD_TORCH_CHECK(offset >= 0, "offset must not be negative");
  STD_TORCH_CHECK(!(clip < 0), "clip must not be negative");
  const Shape shape = shape_of(x, "x");
  check_device(model_out, x, "model_out");
  check_same_shape(model_out, x, "model_out");
  check_rows(coeffs, x);
  engine::ReverseStep p;
  p.N = shape.N;
  p.C = shape.C;
  p.S = shape.S;
  p.dtype = dtype_of(x, "x");
  p.model_out_dtype = dtype_of(model_out, "model_out");
  p.x_channels_last = is_channels_last(x, "x");
  p.model_out_channels_last = is_channels_last(model_out, "model_out");
  p.noise_channels_last = false;
  p.x = x.data_ptr();
  p.model_out = model_out.data_ptr();
  p.noise = nullptr;
  if (noise) {
    check_device(*noise, x, "noise");
    check_same_shape(*noise, x, "noise");
    STD_TORCH_CHECK(noise->scalar_type() == x.scalar_type(), "noise must have the dtype of x");
    p.noise_channels_last = is_channels_last(*noise, "noise");
    p.noise = noise->data_ptr();
  }
  p.coeffs = floats(coeffs);
  p.n_steps = coeffs.size(0);
  p.columns = coeffs.size(1);
  p.step = scalar_int64(step, x, "step");
  p.seed = seed ? scalar_int64(*seed, x, "seed") : nullptr;
  p.offset = offset;
  p.clip = static_cast<float>(clip);
  Device device(x);
  Tensor x_next = allocate_like(x);
  if (shape.N * shape.C * shape.S == 0) return x_next;
  if constexpr (Device::is_cpu) {
    engine::reverse_step_fwd_cpu(p, x_next.data_ptr(), device.parallel_for());
  } else {
    engine::reverse_step_fwd_cuda(p, x_next.data_ptr(), device.stream);
  }
  return x_next;
}

// An operand of shape (N, times * C, *S), perhaps a slice of a larger tensor.
engine::StepOperand step_operand(const OptionalTensor& t, const Tensor& x, const char* name,
                                 int64_t times = 1) {
  if (!t) return {};
  check_device(*t, x, name);
  const auto sizes = t->sizes(), strides = t->strides(), like = x.sizes();
  bool same = sizes.size() == like.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) {
    same = sizes[i] == like[i] * (i == 1 ? times : 1);
  }
  STD_TORCH_CHECK(same, name, " must have the shape of x", times == 2 ? ", 2 C channels" : "");
  const Shape shape = shape_of(*t, name);
  for (const bool last : {false, true}) {
    int64_t unit = 1;  // stride of the innermost position
    for (size_t i = sizes.size(); last && i-- > 2;) {
      if (sizes[i] != 1) {
        unit = strides[i];
        break;
      }
    }
    bool dense = !last || shape.C == 1 || strides[1] == 1;
    int64_t expected = unit;
    for (size_t i = sizes.size() - 1; i >= 2; --i) {
      dense &= sizes[i] == 1 || strides[i] == expected;
      expected *= sizes[i];
    }
    const int64_t pitch = last ? unit : shape.C == 1 ? shape.S : strides[1];
    if (dense) return {t->data_ptr(), dtype_of(*t, name), last, strides[0], pitch};
  }
  STD_TORCH_CHECK(false, name, " must be contiguous, channels_last or a slice of such a tensor");
  return {};
}

// What the general step and its threshold share.
engine::ReverseStepGeneral general_params(const Tensor& x, const Tensor& model_out,
                                          const OptionalTensor& uncond, const OptionalTensor& grad,
                                          const Tensor& coeffs, const Tensor& step,
                                          double guidance) {
  const Shape shape = shape_of(x, "x");
  check_rows(coeffs, x);
  engine::ReverseStepGeneral p;
  p.N = shape.N;
  p.C = shape.C;
  p.S = shape.S;
  p.x = step_operand(x, x, "x");
  const int64_t times = model_out.dim() >= 2 && model_out.size(1) == 2 * shape.C ? 2 : 1;
  p.model_out = step_operand(model_out, x, "model_out", times);
  if (times == 2) {  // the second half of the channels
    const engine::StepOperand& m = p.model_out;
    const int64_t bytes = m.dtype == DType::f32 ? 4 : 2;
    p.v = m;
    p.v.data = static_cast<const char*>(m.data) + bytes * shape.C * (m.channels_last ? 1 : m.pitch);
  }
  p.uncond = step_operand(uncond, x, "uncond", times);
  p.grad = step_operand(grad, x, "grad");
  p.dtype = dtype_of(x, "x");
  p.channels_last = is_channels_last(x, "x");
  p.coeffs = floats(coeffs);
  p.n_steps = coeffs.size(0);
  p.columns = coeffs.size(1);
  p.step = scalar_int64(step, x, "step");
  p.guidance = static_cast<float>(guidance);
  return p;
}

template <class Device>
void reverse_step_general_fwd(Tensor x_next, OptionalTensor x0, OptionalTensor model_in,
                              const Tensor& x, const Tensor& model_out,
                              const OptionalTensor& uncond, const OptionalTensor& grad,
                              const OptionalTensor& x0_prev, const OptionalTensor& threshold,
                              const Tensor& coeffs, const Tensor& step, const OptionalTensor& seed,
                              const OptionalTensor& noise, double guidance, double clip,
                              int64_t offset) {
  STD_TORCH_CHECK(seed.has_value() != noise.has_value(),
                  "exactly one of seed and noise must be given");
  STD_TORCH_CHECK(offset >= 0 && !(clip < 0), "offset and clip must not be negative");
  auto p = general_params(x, model_out, uncond, grad, coeffs, step, guidance);
  const auto result = [&](const Tensor& t, const char* name, bool any_dtype) {
    check_device(t, x, name);
    check_same_shape(t, x, name);
    STD_TORCH_CHECK(is_channels_last(t, name) == p.channels_last, name, " must lie like x");
    STD_TORCH_CHECK(any_dtype || t.scalar_type() == x.scalar_type(), name, " must have x's dtype");
    return t.data_ptr();
  };
  p.x_next = result(x_next, "x_next", false);
  if (x0) p.x0 = result(*x0, "x0", false);
  if (model_in) {
    p.model_in = result(*model_in, "model_in", true);
    p.model_in_dtype = dtype_of(*model_in, "model_in");
  }
  p.x0_prev = step_operand(x0_prev, x, "x0_prev");
  p.noise = step_operand(noise, x, "noise");
  if (threshold) {
    check_device(*threshold, x, "threshold");
    STD_TORCH_CHECK(threshold->scalar_type() == ScalarType::Float && threshold->dim() == 1 &&
                        threshold->size(0) == p.N && threshold->is_contiguous(),
                    "threshold must be contiguous float32 of shape (N,)");
    p.threshold = floats(*threshold);
  }
  p.seed = seed ? scalar_int64(*seed, x, "seed") : nullptr;
  p.offset = offset;
  p.clip = static_cast<float>(clip);
  Device device(x);
  if (p.N * p.C * p.S == 0) return;
  if constexpr (Device::is_cpu) {
    engine::reverse_step_general_fwd_cpu(p, device.parallel_for());
  } else {
    engine::reverse_step_general_fwd_cuda(p, device.stream);
  }
}

template <class Device>
void reverse_step_threshold_fwd(Tensor threshold, const Tensor& x, const Tensor& model_out,
                                const OptionalTensor& uncond, const OptionalTensor& grad,
                                const Tensor& coeffs, const Tensor& step, double guidance,
                                double quantile) {
  const auto p = general_params(x, model_out, uncond, grad, coeffs, step, guidance);
  const int64_t count = p.C * p.S;
  check_device(threshold, x, "threshold");
  STD_TORCH_CHECK(threshold.scalar_type() == ScalarType::Float && threshold.numel() == p.N &&
                      threshold.is_contiguous(),
                  "threshold must be contiguous float32 of shape (N,)");
  STD_TORCH_CHECK(quantile >= 0 && quantile <= 1, "quantile must lie in 0 ... 1");
  STD_TORCH_CHECK(p.N > 0 && count > 0, "x must not be empty");
  STD_TORCH_CHECK(count < INT32_MAX, "a sample must have fewer than 2^31 - 1 elements");
  const double position = quantile * static_cast<double>(count - 1);
  const int64_t rank = static_cast<int64_t>(position);
  const float fraction = static_cast<float>(position - rank);
  Device device(x);
  if constexpr (Device::is_cpu) {
    engine::reverse_step_threshold_fwd_cpu(p, rank, fraction, floats(threshold),
                                           device.parallel_for());
  } else {
    engine::reverse_step_threshold_fwd_cuda(p, rank, fraction, floats(threshold), device.stream);
  }
}

template <class Device>
void register_kernels(Library& m) {
  m.impl("reverse_step_fwd", TORCH_BOX(&reverse_step_fwd<Device>));
  m.impl("reverse_step_general_fwd", TORCH_BOX(&reverse_step_general_fwd<Device>));
  m.impl("reverse_step_threshold_fwd", TORCH_BOX(&reverse_step_threshold_fwd<Device>));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ENGINE_NS, m) {
  m.def(
      "reverse_step_fwd(Tensor x, Tensor model_out, Tensor coeffs, Tensor step, Tensor? seed, "
      "Tensor? noise, float clip, int offset) -> Tensor");
  m.def(
      "reverse_step_general_fwd(Tensor(a!) x_next, Tensor(b!)? x0, Tensor(c!)? model_in, Tensor x, "
      "Tensor model_out, Tensor? uncond, Tensor? grad, Tensor? x0_prev, Tensor? threshold, Tensor "
      "coeffs, Tensor step, Tensor? seed, Tensor? noise, float guidance, float clip, int offset) "
      "-> ()");
  m.def(
      "reverse_step_threshold_fwd(Tensor(a!) threshold, Tensor x, Tensor model_out, Tensor? "
      "uncond, Tensor? grad, Tensor coeffs, Tensor step, float guidance, float quantile) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ENGINE_NS, CPU, m) { register_kernels<OnCpu>(m); }
#ifdef ENGINE_CUDA
STABLE_TORCH_LIBRARY_IMPL(ENGINE_NS, CUDA, m) { register_kernels<Cuda>(m); }
#endif

}  // namespace engine::ops

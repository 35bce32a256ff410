// Bindings of AdamW's step and of the gradients' norm, for CPU tensors alone.
//
// Lists of tensors, one entry per parameter. Everything that belongs to one parameter lies in
// memory alike, without holes; a gradient that does not is copied first.
#ifndef ENGINE_EMULATE
#include <cmath>
#include <vector>

#include "ops.h"

namespace engine::ops {
namespace {

using Tensors = std::vector<Tensor>;

// Whether the elements of t are its numel() consecutive places in memory, in any order.
bool is_dense(const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  for (size_t found = 0; found < sizes.size(); ++found) {
    for (size_t i = 0; i < sizes.size(); ++i) {
      if (sizes[i] > 1 && strides[i] == expected) {
        expected *= sizes[i];
        break;
      }
    }
  }
  return expected == t.numel() || t.numel() == 0;
}

bool lies_like(const Tensor& t, const Tensor& other) {
  const auto a = t.sizes(), b = t.strides(), sizes = other.sizes(), strides = other.strides();
  if (a.size() != sizes.size()) return false;
  bool same = true;
  for (size_t i = 0; i < a.size(); ++i) {
    same &= a[i] == sizes[i] && (a[i] == 1 || b[i] == strides[i]);
  }
  return same || t.numel() == 0;
}

void check_count(const Tensors& list, const Tensors& weights, const char* name) {
  STD_TORCH_CHECK(list.size() == weights.size(), name,
                  " must have a tensor for each weight: ", weights.size(), ", not ", list.size());
}

DType dtype_of_gradient(const Tensor& grad) {
  const ScalarType type = grad.scalar_type();
  STD_TORCH_CHECK(grad.is_cpu() && (type == ScalarType::Float || type == ScalarType::BFloat16),
                  "a gradient must be a float32 or bfloat16 CPU tensor");
  return type == ScalarType::Float ? DType::f32 : DType::bf16;
}

float* floats_like(const Tensor& t, const Tensor& weight, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float, name,
                  " must be float32 CPU tensors");
  check_same_shape(t, weight, name);
  STD_TORCH_CHECK(lies_like(t, weight), name, " must lie in memory as the weights do");
  return floats(t);
}

Tensor adamw_norm(Tensors grads) {  // not empty: else PyTorch finds no kernel
  std::vector<Gradient> all;
  all.reserve(grads.size());
  for (Tensor& grad : grads) {
    const DType dtype = dtype_of_gradient(grad);
    if (!is_dense(grad)) {
      Tensor copy = torch::stable::empty_like(grad);
      grad = torch::stable::copy_(copy, grad);
    }
    all.push_back({grad.numel(), grad.data_ptr(), dtype});
  }
  const double squares = engine::grad_squares_cpu(all.data(), all.size(), Cpu::parallel_for());
  Tensor norm = allocate_floats(grads[0], {});
  *floats(norm) = static_cast<float>(std::sqrt(squares));
  return norm;
}

void adamw_step(Tensors weights, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                Tensors steps, Tensors averages, Tensors lows, const Tensor& grad_scale, double lr,
                double beta1, double beta2, double eps, double weight_decay,
                double average_weight) {
  check_count(grads, weights, "grads");
  check_count(exp_avgs, weights, "exp_avgs");
  check_count(exp_avg_sqs, weights, "exp_avg_sqs");
  check_count(steps, weights, "steps");
  check_count(lows, weights, "lows");
  if (!averages.empty()) check_count(averages, weights, "averages");
  STD_TORCH_CHECK(grad_scale.is_cpu() && grad_scale.numel() == 1 &&
                      grad_scale.scalar_type() == ScalarType::Float,
                  "grad_scale must be a float32 CPU tensor of one element");
  AdamW p{
      lr, beta1, beta2, eps, weight_decay, *floats(grad_scale), static_cast<float>(average_weight)};
  std::vector<AdamWTensor> all(weights.size());
  for (size_t k = 0; k < weights.size(); ++k) {
    const Tensor &weight = weights[k], &low = lows[k];
    AdamWTensor& t = all[k];
    t.n = weight.numel();
    STD_TORCH_CHECK(is_dense(weight), "weights must have no holes in memory");
    t.weight = floats_like(weight, weight, "weights");
    t.grad_dtype = dtype_of_gradient(grads[k]);
    check_same_shape(grads[k], weight, "a gradient");
    if (!lies_like(grads[k], weight)) {
      Tensor copy = torch::stable::empty_like(weight);
      grads[k] = torch::stable::copy_(copy, grads[k]);
      t.grad_dtype = DType::f32;
    }
    t.grad = grads[k].data_ptr();
    t.exp_avg = floats_like(exp_avgs[k], weight, "exp_avgs");
    t.exp_avg_sq = floats_like(exp_avg_sqs[k], weight, "exp_avg_sqs");
    t.average = averages.empty() ? nullptr : floats_like(averages[k], weight, "averages");
    t.low = nullptr;
    if (low.numel() > 0) {
      STD_TORCH_CHECK(low.is_cpu() && low.scalar_type() == ScalarType::BFloat16,
                      "lows must be bfloat16 CPU tensors");
      check_same_shape(low, weight, "lows");
      STD_TORCH_CHECK(lies_like(low, weight), "lows must lie in memory as the weights do");
      t.low = low.data_ptr();
    }
    STD_TORCH_CHECK(
        steps[k].is_cpu() && steps[k].numel() == 1 && steps[k].scalar_type() == ScalarType::Float,
        "steps must be float32 CPU tensors of one element");
  }
  for (size_t k = 0; k < weights.size(); ++k) {  // now that nothing can be refused
    all[k].step = *floats(steps[k]) += 1.0f;
  }
  engine::adamw_step_cpu(p, all.data(), all.size(), Cpu::parallel_for());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ENGINE_NS, m) {
  m.def("adamw_norm(Tensor[] grads) -> Tensor");
  m.def(
      "adamw_step(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] "
      "exp_avg_sqs, Tensor(d!)[] steps, Tensor(e!)[] averages, Tensor(f!)[] lows, Tensor "
      "grad_scale, float lr, float beta1, float beta2, float eps, float weight_decay, float "
      "average_weight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ENGINE_NS, CPU, m) {
  m.impl("adamw_norm", TORCH_BOX(&adamw_norm));
  m.impl("adamw_step", TORCH_BOX(&adamw_step));
}

}  // namespace engine::ops
#endif

// Schemas and bindings: the only file that includes torch, through its stable ABI.
//
// Each op checks its tensors, allocates its results and hands plain pointers to a kernel of
// kernels.h. The schemas repeat kernels/boundary.py.
//   ENGINE_NS       namespace of the ops, `engine` unless told otherwise
//   ENGINE_CUDA     the CUDA kernels are linked: register them for CUDA tensors
//   ENGINE_EMULATE  the CUDA kernels were compiled for the CPU: register them for CPU tensors
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "kernels.h"

#ifndef ENGINE_NS
#define ENGINE_NS engine
#endif

#ifdef ENGINE_CUDA
#include <dlfcn.h>
#endif

namespace {

using engine::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Where a call runs: the kernels of one device, and what they need around them.
#ifndef ENGINE_EMULATE
struct Cpu {
  explicit Cpu(const Tensor&) {}

  static void run(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    torch::stable::parallel_for(0, n, grain, body);
  }
  static const engine::ParallelFor& parallel_for() {
    static const engine::ParallelFor pool = run;  // torch's own threads: no second pool
    return pool;
  }
  void group_norm_silu_fwd(const engine::GroupNormSilu& p, void* y, float* mean, float* rstd) {
    engine::group_norm_silu_fwd_cpu(p, y, mean, rstd, parallel_for());
  }
  void group_norm_silu_bwd(const engine::GroupNormSilu& p, const void* dy, bool dy_channels_last,
                           const float* mean, const float* rstd, float* workspace,
                           const engine::GroupNormSiluGrads& grads) {
    engine::group_norm_silu_bwd_cpu(p, dy, dy_channels_last, mean, rstd, workspace, grads,
                                    parallel_for());
  }
  void reverse_step_fwd(const engine::ReverseStep& p, void* x_next) {
    engine::reverse_step_fwd_cpu(p, x_next, parallel_for());
  }
  void reverse_step_general_fwd(const engine::ReverseStepGeneral& p) {
    engine::reverse_step_general_fwd_cpu(p, parallel_for());
  }
  void reverse_step_threshold_fwd(const engine::ReverseStepGeneral& p, int64_t rank, float fraction,
                                  float* threshold) {
    engine::reverse_step_threshold_fwd_cpu(p, rank, fraction, threshold, parallel_for());
  }
  void forward_noise_fwd(const engine::ForwardNoise& p, void* x_t, DType dtype, bool last) {
    engine::forward_noise_fwd_cpu(p, x_t, dtype, last, parallel_for());
  }
  void forward_noise_loss_fwd(const engine::ForwardNoise& p, const engine::ForwardNoiseLoss& l,
                              double* workspace, float* loss, void* slope) {
    engine::forward_noise_loss_fwd_cpu(p, l, workspace, loss, slope, parallel_for());
  }
  void forward_noise_loss_bwd(const engine::ForwardNoise& p, const engine::ForwardNoiseLoss& l,
                              const float* dloss, void* dmodel_out) {
    engine::forward_noise_loss_bwd_cpu(p, l, dloss, dmodel_out, parallel_for());
  }
  void noise(void* out, DType dtype, int64_t n, const int64_t* seed, const int64_t* step,
             uint32_t stream_id, int64_t offset) {
    engine::noise_cpu(out, dtype, n, seed, step, stream_id, offset, parallel_for());
  }
};
#endif

#if defined(ENGINE_CUDA) || defined(ENGINE_EMULATE)
#ifdef ENGINE_CUDA
// torch loads libtorch_cuda privately, and a CPU torch has none: a linked reference would be null
// or would keep the library from loading, so the symbol is looked up in what torch has loaded.
void* current_stream(int32_t device) {
  using Lookup = AOTITorchError (*)(int32_t, void**);
  static const Lookup lookup = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    return library ? reinterpret_cast<Lookup>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                   : nullptr;
  }();
  STD_TORCH_CHECK(lookup != nullptr, "CUDA tensors need a torch that was built with CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(lookup(device, &stream));
  return stream;
}
#endif

struct Cuda {
#ifdef ENGINE_CUDA
  torch::stable::accelerator::DeviceGuard guard;
  void* stream;
  explicit Cuda(const Tensor& x)
      : guard(x.get_device_index()), stream(current_stream(x.get_device_index())) {}
#else
  void* stream = nullptr;
  explicit Cuda(const Tensor&) {}
#endif
  void group_norm_silu_fwd(const engine::GroupNormSilu& p, void* y, float* mean, float* rstd) {
    engine::group_norm_silu_fwd_cuda(p, y, mean, rstd, stream);
  }
  void group_norm_silu_bwd(const engine::GroupNormSilu& p, const void* dy, bool dy_channels_last,
                           const float* mean, const float* rstd, float* workspace,
                           const engine::GroupNormSiluGrads& grads) {
    engine::group_norm_silu_bwd_cuda(p, dy, dy_channels_last, mean, rstd, workspace, grads, stream);
  }
  void reverse_step_fwd(const engine::ReverseStep& p, void* x_next) {
    engine::reverse_step_fwd_cuda(p, x_next, stream);
  }
  void reverse_step_general_fwd(const engine::ReverseStepGeneral& p) {
    engine::reverse_step_general_fwd_cuda(p, stream);
  }
  void reverse_step_threshold_fwd(const engine::ReverseStepGeneral& p, int64_t rank, float fraction,
                                  float* threshold) {
    engine::reverse_step_threshold_fwd_cuda(p, rank, fraction, threshold, stream);
  }
  void forward_noise_fwd(const engine::ForwardNoise& p, void* x_t, DType dtype, bool last) {
    engine::forward_noise_fwd_cuda(p, x_t, dtype, last, stream);
  }
  void forward_noise_loss_fwd(const engine::ForwardNoise& p, const engine::ForwardNoiseLoss& l,
                              double* workspace, float* loss, void*) {
    engine::forward_noise_loss_fwd_cuda(p, l, workspace, loss, stream);
  }
  void forward_noise_loss_bwd(const engine::ForwardNoise& p, const engine::ForwardNoiseLoss& l,
                              const float* dloss, void* dmodel_out) {
    engine::forward_noise_loss_bwd_cuda(p, l, dloss, dmodel_out, stream);
  }
  void noise(void* out, DType dtype, int64_t n, const int64_t* seed, const int64_t* step,
             uint32_t stream_id, int64_t offset) {
    engine::noise_cuda(out, dtype, n, seed, step, stream_id, offset, stream);
  }
};
#endif

// ---- Checks -------------------------------------------------------------------------------------

DType dtype_of(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
      " must be float32, bfloat16 or float16");
  return type == ScalarType::Float      ? DType::f32
         : type == ScalarType::BFloat16 ? DType::bf16
                                        : DType::f16;
}

void check_device(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index(), name,
                  " must be on the device of the first tensor");
}

struct Shape {
  int64_t N, C, S;
};

Shape shape_of(const Tensor& x, const char* name) {
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(sizes.size() >= 2, name, " must have shape (N, C, *S)");
  Shape shape{sizes[0], sizes[1], 1};
  for (size_t i = 2; i < sizes.size(); ++i) shape.S *= sizes[i];
  return shape;
}

// Whether x is (N, S, C) in memory.
bool reads_channels_last(const Tensor& x) {
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
bool is_channels_last(const Tensor& x, const char* name) {
  if (x.is_contiguous()) return false;
  STD_TORCH_CHECK(reads_channels_last(x), name, " must be contiguous or channels_last");
  return true;
}

void check_same_shape(const Tensor& t, const Tensor& x, const char* name) {
  const auto a = t.sizes(), b = x.sizes();
  bool same = a.size() == b.size();
  for (size_t i = 0; same && i < a.size(); ++i) same = a[i] == b[i];
  STD_TORCH_CHECK(same, name, " must have the shape of the first tensor");
}

engine::Operand per_channel(const OptionalTensor& t, const Tensor& x, int64_t C, const char* name) {
  if (!t) return {};
  check_device(*t, x, name);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == C, name, " must have shape (C,), C = ", C);
  STD_TORCH_CHECK(C == 1 || t->stride(0) == 1, name, " must be contiguous");
  return {t->data_ptr(), 0, dtype_of(*t, name)};
}

engine::Operand per_sample(const OptionalTensor& t, const Tensor& x, int64_t N, int64_t C,
                           const char* name) {
  if (!t) return {};
  check_device(*t, x, name);
  STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == N && t->size(1) == C, name,
                  " must have shape (N, C) = (", N, ", ", C, ")");
  STD_TORCH_CHECK(C == 1 || t->stride(1) == 1, name, " must have stride 1 along C");
  return {t->data_ptr(), t->stride(0), dtype_of(*t, name)};
}

const int64_t* scalar_int64(const Tensor& t, const Tensor& x, const char* name) {
  check_device(t, x, name);
  STD_TORCH_CHECK(t.numel() == 1 && t.scalar_type() == ScalarType::Long, name,
                  " must be an int64 tensor of one element");
  return static_cast<const int64_t*>(t.data_ptr());
}

// ---- Allocation ---------------------------------------------------------------------------------

// new_empty's shim is the cheapest allocation that torch's deterministic fill still reaches.
Tensor allocate(const Tensor& like, const int64_t* sizes, int64_t dim, ScalarType type) {
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes, dim, &dtype, nullptr, nullptr,
                                                   0, nullptr, &handle));
  return Tensor(handle);
}

constexpr int64_t kNone[] = {0};  // the size of an absent operand's gradient

Tensor allocate_floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return allocate(like, sizes.begin(), static_cast<int64_t>(sizes.size()), ScalarType::Float);
}

Tensor allocate_like(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t expected = 1;
  for (size_t i = sizes.size(); i-- > 0; expected *= sizes[i]) {
    if (strides[i] != expected) return torch::stable::empty_like(x);
  }
  return allocate(x, sizes.data(), static_cast<int64_t>(sizes.size()), x.scalar_type());
}

// (N, C, *S) like x, which has fewer channels.
Tensor allocate_channels(const Tensor& x, int64_t C, bool channels_last) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[1] = C;
  if (!channels_last) {
    return allocate(x, sizes.data(), static_cast<int64_t>(sizes.size()), x.scalar_type());
  }
  using torch::headeronly::MemoryFormat;
  const auto format = sizes.size() == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
  return torch::stable::empty(sizes, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                              format);
}

float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// ---- Ops ----------------------------------------------------------------------------------------

// The second half of a pair, whose layout decides where that of x is both.
void add_pair(const Tensor& x, const Tensor& x2, engine::GroupNormSilu* p) {
  check_device(x2, x, "x2");
  STD_TORCH_CHECK(x2.scalar_type() == x.scalar_type(), "x2 must have the dtype of x");
  const auto a = x.sizes(), b = x2.sizes();
  bool fits = a.size() == b.size() && b[1] > 0;
  for (size_t i = 0; fits && i < a.size(); ++i) fits = i == 1 || a[i] == b[i];
  STD_TORCH_CHECK(fits, "x2 must have the shape of x but for its channels");
  p->channels_last |= !x2.is_contiguous() && reads_channels_last(x);
  STD_TORCH_CHECK(p->channels_last ? reads_channels_last(x2) : x2.is_contiguous(),
                  "x2 must have the layout of x");
  p->x2 = x2.data_ptr();
  p->C2 = b[1];
}

engine::GroupNormSilu group_norm_silu_params(const Tensor& x, const OptionalTensor& x2,
                                             const OptionalTensor& weight,
                                             const OptionalTensor& bias, const OptionalTensor& add,
                                             const OptionalTensor& scale,
                                             const OptionalTensor& shift, int64_t num_groups,
                                             double eps, bool silu) {
  Shape shape = shape_of(x, "x");
  STD_TORCH_CHECK(shape.N > 0 && shape.C > 0 && shape.S > 0, "x must not be empty");
  engine::GroupNormSilu p;
  p.channels_last = is_channels_last(x, "x");
  if (x2) add_pair(x, *x2, &p);
  shape.C += p.C2;
  STD_TORCH_CHECK(num_groups > 0 && shape.C % num_groups == 0, "num_groups = ", num_groups,
                  " must divide the ", shape.C, " channels of x");
  p.N = shape.N;
  p.C = shape.C;
  p.S = shape.S;
  p.G = num_groups;
  p.eps = static_cast<float>(eps);
  p.silu = silu;
  p.dtype = dtype_of(x, "x");
  p.x = x.data_ptr();
  p.weight = per_channel(weight, x, shape.C, "weight");
  p.bias = per_channel(bias, x, shape.C, "bias");
  p.add = per_sample(add, x, shape.N, shape.C, "add");
  p.scale = per_sample(scale, x, shape.N, shape.C, "scale");
  p.shift = per_sample(shift, x, shape.N, shape.C, "shift");
  return p;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> group_norm_silu_fwd(
    const Tensor& x, const OptionalTensor& x2, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& add, const OptionalTensor& scale,
    const OptionalTensor& shift, int64_t num_groups, double eps, bool silu) {
  const auto p =
      group_norm_silu_params(x, x2, weight, bias, add, scale, shift, num_groups, eps, silu);
  Device device(x);
  Tensor y = x2 ? allocate_channels(x, p.C, p.channels_last) : allocate_like(x);
  Tensor mean = allocate_floats(x, {p.N, p.G}), rstd = allocate_floats(x, {p.N, p.G});
  device.group_norm_silu_fwd(p, y.data_ptr(), floats(mean), floats(rstd));
  return {y, mean, rstd};
}

#ifdef ENGINE_CUDA
// The same by thread-block clusters; where they do not serve, an error if `strict`.
std::tuple<Tensor, Tensor, Tensor> group_norm_silu_fwd_cluster(
    const Tensor& x, const OptionalTensor& x2, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& add, const OptionalTensor& scale,
    const OptionalTensor& shift, int64_t num_groups, double eps, bool silu, bool strict) {
  const auto p =
      group_norm_silu_params(x, x2, weight, bias, add, scale, shift, num_groups, eps, silu);
  Cuda device(x);
  Tensor y = x2 ? allocate_channels(x, p.C, p.channels_last) : allocate_like(x);
  Tensor mean = allocate_floats(x, {p.N, p.G}), rstd = allocate_floats(x, {p.N, p.G});
  const bool served = engine::group_norm_silu_fwd_cluster_cuda(p, y.data_ptr(), floats(mean),
                                                               floats(rstd), device.stream);
  STD_TORCH_CHECK(served || !strict,
                  "clusters serve contiguous groups of 2 to 8 blocks on sm_90 and newer");
  if (!served) device.group_norm_silu_fwd(p, y.data_ptr(), floats(mean), floats(rstd));
  return {y, mean, rstd};
}
#endif

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> group_norm_silu_bwd(
    const Tensor& dy, const Tensor& x, const OptionalTensor& x2, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& add, const OptionalTensor& scale,
    const OptionalTensor& shift, const Tensor& mean, const Tensor& rstd, int64_t num_groups,
    bool silu) {
  const auto p =
      group_norm_silu_params(x, x2, weight, bias, add, scale, shift, num_groups, 0.0, silu);
  check_device(dy, x, "dy");
  const auto sizes = dy.sizes(), half = x.sizes();
  bool same = sizes.size() == half.size();
  for (size_t i = 0; same && i < half.size(); ++i) same = sizes[i] == (i == 1 ? p.C : half[i]);
  STD_TORCH_CHECK(same, "dy must have the shape (N, C, *S) of the result");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type(), "dy must have the dtype of x");
  const bool dy_channels_last = is_channels_last(dy, "dy");
  for (const Tensor* t : {&mean, &rstd}) {
    check_device(*t, x, "mean and rstd");
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous() && t->dim() == 2 &&
                        t->size(0) == p.N && t->size(1) == p.G,
                    "mean and rstd must be contiguous float32 of shape (N, num_groups)");
  }
  Device device(x);
  Tensor dx = allocate_like(x),
         dx2 = x2 ? allocate_like(*x2) : allocate(x, kNone, 1, x.scalar_type());
  Tensor workspace = allocate_floats(x, {3, p.N, p.C});
  const auto channel_grad = [&](const OptionalTensor& t) {
    return allocate_floats(x, {t ? p.C : 0});
  };
  const auto sample_grad = [&](const OptionalTensor& t) {
    return t ? allocate_floats(x, {p.N, p.C}) : allocate_floats(x, {0});
  };
  Tensor dweight = channel_grad(weight), dbias = channel_grad(bias);
  Tensor dadd = sample_grad(add), dscale = sample_grad(scale), dshift = sample_grad(shift);
  engine::GroupNormSiluGrads grads;
  grads.dx = dx.data_ptr();
  grads.dx2 = x2 ? dx2.data_ptr() : nullptr;
  grads.dweight = weight ? floats(dweight) : nullptr;
  grads.dbias = bias ? floats(dbias) : nullptr;
  grads.dadd = add ? floats(dadd) : nullptr;
  grads.dscale = scale ? floats(dscale) : nullptr;
  grads.dshift = shift ? floats(dshift) : nullptr;
  device.group_norm_silu_bwd(p, dy.data_ptr(), dy_channels_last, floats(mean), floats(rstd),
                             floats(workspace), grads);
  return {dx, dx2, dweight, dbias, dadd, dscale, dshift};
}

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
  if (shape.N * shape.C * shape.S > 0) device.reverse_step_fwd(p, x_next.data_ptr());
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
  if (p.N * p.C * p.S > 0) device.reverse_step_general_fwd(p);
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
  Device device(x);
  device.reverse_step_threshold_fwd(p, rank, static_cast<float>(position - rank),
                                    floats(threshold));
}

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
  if (p.N * p.C * p.S > 0) {
    device.forward_noise_fwd(p, x_t.data_ptr(), dtype_of(x_t, "x_t"), last);
  }
}

// slope: null, or allocated here like model_out.
template <class Device>
Tensor loss_and_slope(const Tensor& model_out, const Tensor& x0, const Tensor& coeffs,
                      const Tensor& t, const OptionalTensor& weights, const OptionalTensor& seed,
                      const OptionalTensor& step, const OptionalTensor& noise, int64_t offset,
                      int64_t loss, OptionalTensor* slope) {
  const auto p = forward_noise_params(x0, coeffs, t, seed, step, noise, offset);
  const auto l = forward_noise_loss_params(p, model_out, x0, weights, loss);
  STD_TORCH_CHECK(p.N * p.C * p.S > 0, "x0 must not be empty");
  Device device(x0);
  Tensor result = allocate_floats(x0, {p.N});
  const int64_t sizes[] = {p.N, engine::forward_noise_chunks(p)};
  Tensor workspace = allocate(x0, sizes, 2, ScalarType::Double);
  if (slope) *slope = allocate_like(model_out);
  device.forward_noise_loss_fwd(p, l, static_cast<double*>(workspace.data_ptr()), floats(result),
                                slope ? (*slope)->data_ptr() : nullptr);
  return result;
}

template <class Device>
Tensor forward_noise_loss_fwd(const Tensor& model_out, const Tensor& x0, const Tensor& coeffs,
                              const Tensor& t, const OptionalTensor& weights,
                              const OptionalTensor& seed, const OptionalTensor& step,
                              const OptionalTensor& noise, int64_t offset, int64_t loss) {
  return loss_and_slope<Device>(model_out, x0, coeffs, t, weights, seed, step, noise, offset, loss,
                                nullptr);
}

#ifndef ENGINE_EMULATE
std::tuple<Tensor, Tensor> forward_noise_loss_slope_fwd(
    const Tensor& model_out, const Tensor& x0, const Tensor& coeffs, const Tensor& t,
    const OptionalTensor& weights, const OptionalTensor& seed, const OptionalTensor& step,
    const OptionalTensor& noise, int64_t offset, int64_t loss) {
  OptionalTensor slope;
  Tensor result = loss_and_slope<Cpu>(model_out, x0, coeffs, t, weights, seed, step, noise, offset,
                                      loss, &slope);
  return {result, *slope};
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
  if (p.N * p.C * p.S > 0) {
    device.forward_noise_loss_bwd(p, l, floats(dloss), dmodel_out.data_ptr());
  }
  return dmodel_out;
}

template <class Device>
void noise_fwd(Tensor out, const Tensor& seed, const Tensor& step, int64_t stream, int64_t offset) {
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  STD_TORCH_CHECK(stream >= 0 && stream <= UINT32_MAX, "stream must be an unsigned 32-bit number");
  STD_TORCH_CHECK(offset >= 0, "offset must not be negative");
  const DType dtype = dtype_of(out, "out");
  const int64_t* seed_data = scalar_int64(seed, out, "seed");
  const int64_t* step_data = scalar_int64(step, out, "step");
  Device device(out);
  const int64_t n = out.numel();
  if (n > 0) {
    device.noise(out.data_ptr(), dtype, n, seed_data, step_data, static_cast<uint32_t>(stream),
                 offset);
  }
}

template <class Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("group_norm_silu_fwd", TORCH_BOX(&group_norm_silu_fwd<Device>));
  m.impl("group_norm_silu_bwd", TORCH_BOX(&group_norm_silu_bwd<Device>));
  m.impl("reverse_step_fwd", TORCH_BOX(&reverse_step_fwd<Device>));
  m.impl("reverse_step_general_fwd", TORCH_BOX(&reverse_step_general_fwd<Device>));
  m.impl("reverse_step_threshold_fwd", TORCH_BOX(&reverse_step_threshold_fwd<Device>));
  m.impl("forward_noise_fwd", TORCH_BOX(&forward_noise_fwd<Device>));
  m.impl("forward_noise_loss_fwd", TORCH_BOX(&forward_noise_loss_fwd<Device>));
  m.impl("forward_noise_loss_bwd", TORCH_BOX(&forward_noise_loss_bwd<Device>));
  m.impl("noise_fwd", TORCH_BOX(&noise_fwd<Device>));
}

}  // namespace

STABLE_TORCH_LIBRARY(ENGINE_NS, m) {
  m.def(
      "group_norm_silu_fwd(Tensor x, Tensor? x2, Tensor? weight, Tensor? bias, Tensor? add, "
      "Tensor? scale, Tensor? shift, int num_groups, float eps, bool silu) -> (Tensor y, Tensor "
      "mean, Tensor rstd)");
  // UNPROVEN, for CUDA tensors alone: csrc/cuda/group_norm_silu_cluster.cu.
  m.def(
      "group_norm_silu_fwd_cluster(Tensor x, Tensor? x2, Tensor? weight, Tensor? bias, Tensor? "
      "add, Tensor? scale, Tensor? shift, int num_groups, float eps, bool silu, bool strict) -> "
      "(Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "group_norm_silu_bwd(Tensor dy, Tensor x, Tensor? x2, Tensor? weight, Tensor? bias, Tensor? "
      "add, Tensor? scale, Tensor? shift, Tensor mean, Tensor rstd, int num_groups, bool silu) -> "
      "(Tensor dx, Tensor dx2, Tensor dweight, Tensor dbias, Tensor dadd, Tensor dscale, Tensor "
      "dshift)");
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
  m.def(
      "forward_noise_fwd(Tensor(a!) x_t, Tensor x0, Tensor coeffs, Tensor t, Tensor? seed, Tensor? "
      "step, Tensor? noise, int offset) -> ()");
  m.def(
      "forward_noise_loss_fwd(Tensor model_out, Tensor x0, Tensor coeffs, Tensor t, Tensor? "
      "weights, Tensor? seed, Tensor? step, Tensor? noise, int offset, int loss) -> Tensor");
  m.def(
      "forward_noise_loss_slope_fwd(Tensor model_out, Tensor x0, Tensor coeffs, Tensor t, Tensor? "
      "weights, Tensor? seed, Tensor? step, Tensor? noise, int offset, int loss) -> (Tensor loss, "
      "Tensor slope)");
  m.def(
      "forward_noise_loss_bwd(Tensor dloss, Tensor model_out, Tensor x0, Tensor coeffs, Tensor t, "
      "Tensor? weights, Tensor? seed, Tensor? step, Tensor? noise, int offset, int loss) -> "
      "Tensor");
  m.def("noise_fwd(Tensor(a!) out, Tensor seed, Tensor step, int stream, int offset) -> ()");
}

#ifdef ENGINE_EMULATE
STABLE_TORCH_LIBRARY_IMPL(ENGINE_NS, CPU, m) { register_ops<Cuda>(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(ENGINE_NS, CPU, m) {
  register_ops<Cpu>(m);
  m.impl("forward_noise_loss_slope_fwd", TORCH_BOX(&forward_noise_loss_slope_fwd));
}
#ifdef ENGINE_CUDA
STABLE_TORCH_LIBRARY_IMPL(ENGINE_NS, CUDA, m) {
  register_ops<Cuda>(m);
  m.impl("group_norm_silu_fwd_cluster", TORCH_BOX(&group_norm_silu_fwd_cluster));
}
#endif
#endif

// Bindings of group_norm_silu: forward, backward, and, for CUDA alone, the forward by thread-block
// clusters and both by a cooperative grid.
//
// An empty x and a pair whose halves lie in two layouts are refused here: kernels.h excludes both.
#include <tuple>
#include <vector>

#include "ops.h"

namespace engine::ops {
namespace {

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
  if constexpr (Device::is_cpu) {
    engine::group_norm_silu_fwd_cpu(p, y.data_ptr(), floats(mean), floats(rstd),
                                    device.parallel_for());
  } else {
    engine::group_norm_silu_fwd_cuda(p, y.data_ptr(), floats(mean), floats(rstd), device.stream);
  }
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
  if (!served) {
    engine::group_norm_silu_fwd_cuda(p, y.data_ptr(), floats(mean), floats(rstd), device.stream);
  }
  return {y, mean, rstd};
}
#endif

#if defined(ENGINE_CUDA) || defined(ENGINE_EMULATE)
constexpr const char* kNotBlocked =
    "a cooperative grid serves groups larger than a block that fit into the L2";

// The same by a cooperative grid; where it does not serve, an error if `strict`.
std::tuple<Tensor, Tensor, Tensor> group_norm_silu_fwd_blocked(
    const Tensor& x, const OptionalTensor& x2, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& add, const OptionalTensor& scale,
    const OptionalTensor& shift, int64_t num_groups, double eps, bool silu, bool strict) {
  const auto p =
      group_norm_silu_params(x, x2, weight, bias, add, scale, shift, num_groups, eps, silu);
  Cuda device(x);
  Tensor y = x2 ? allocate_channels(x, p.C, p.channels_last) : allocate_like(x);
  Tensor mean = allocate_floats(x, {p.N, p.G}), rstd = allocate_floats(x, {p.N, p.G});
  OptionalTensor workspace;
  const auto allocate = [&](int64_t count) {
    workspace = allocate_floats(x, {count});
    return floats(*workspace);
  };
  const bool served = engine::group_norm_silu_fwd_blocked_cuda(
      p, y.data_ptr(), floats(mean), floats(rstd), allocate, device.stream);
  STD_TORCH_CHECK(served || !strict, kNotBlocked);
  if (!served) {
    engine::group_norm_silu_fwd_cuda(p, y.data_ptr(), floats(mean), floats(rstd), device.stream);
  }
  return {y, mean, rstd};
}
#endif

// t is to be added to a gradient of x.
void check_like(const Tensor& t, const Tensor& x, const char* name) {
  check_device(t, x, name);
  check_same_shape(t, x, name);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  STD_TORCH_CHECK(is_channels_last(x, name) ? reads_channels_last(t) : t.is_contiguous(), name,
                  " must have the layout of x");
}

constexpr int64_t kNone[] = {0};  // the size of an absent operand's gradient

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// kernels(device, p, dy_channels_last, workspace, grads) makes them.
template <class Device, class Kernels>
Gradients group_norm_silu_gradients(const Tensor& dy, const Tensor& x, const OptionalTensor& x2,
                                    const OptionalTensor& weight, const OptionalTensor& bias,
                                    const OptionalTensor& add, const OptionalTensor& scale,
                                    const OptionalTensor& shift, const Tensor& mean,
                                    const Tensor& rstd, int64_t num_groups, bool silu,
                                    Kernels&& kernels) {
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
  kernels(device, p, dy_channels_last, floats(workspace), grads);
  return {dx, dx2, dweight, dbias, dadd, dscale, dshift};
}

template <class Device>
Gradients group_norm_silu_bwd(const Tensor& dy, const Tensor& x, const OptionalTensor& x2,
                              const OptionalTensor& weight, const OptionalTensor& bias,
                              const OptionalTensor& add, const OptionalTensor& scale,
                              const OptionalTensor& shift, const Tensor& mean, const Tensor& rstd,
                              int64_t num_groups, bool silu) {
  const auto kernels = [&](const auto& device, const auto& p, bool dy_channels_last,
                           float* workspace, const auto& grads) {
    if constexpr (Device::is_cpu) {
      engine::group_norm_silu_bwd_cpu(p, dy.data_ptr(), dy_channels_last, floats(mean),
                                      floats(rstd), workspace, grads, device.parallel_for());
    } else {
      engine::group_norm_silu_bwd_cuda(p, dy.data_ptr(), dy_channels_last, floats(mean),
                                       floats(rstd), workspace, grads, device.stream);
    }
  };
  return group_norm_silu_gradients<Device>(dy, x, x2, weight, bias, add, scale, shift, mean, rstd,
                                           num_groups, silu, kernels);
}

#if defined(ENGINE_CUDA) || defined(ENGINE_EMULATE)
// The same by a cooperative grid; where it does not serve, an error if `strict`.
Gradients group_norm_silu_bwd_blocked(const Tensor& dy, const Tensor& x, const OptionalTensor& x2,
                                      const OptionalTensor& weight, const OptionalTensor& bias,
                                      const OptionalTensor& add, const OptionalTensor& scale,
                                      const OptionalTensor& shift, const Tensor& mean,
                                      const Tensor& rstd, int64_t num_groups, bool silu,
                                      bool strict) {
  const auto kernels = [&](const Cuda& device, const auto& p, bool dy_channels_last,
                           float* workspace, const auto& grads) {
    OptionalTensor pieces;
    const auto allocate = [&](int64_t count) {
      pieces = allocate_floats(x, {count});
      return floats(*pieces);
    };
    const bool served = engine::group_norm_silu_bwd_blocked_cuda(
        p, dy.data_ptr(), dy_channels_last, floats(mean), floats(rstd), workspace, grads, allocate,
        device.stream);
    STD_TORCH_CHECK(served || !strict, kNotBlocked);
    if (!served) {
      engine::group_norm_silu_bwd_cuda(p, dy.data_ptr(), dy_channels_last, floats(mean),
                                       floats(rstd), workspace, grads, device.stream);
    }
  };
  return group_norm_silu_gradients<Cuda>(dy, x, x2, weight, bias, add, scale, shift, mean, rstd,
                                         num_groups, silu, kernels);
}
#endif

#ifndef ENGINE_EMULATE
// The same with dx_add (and dx2_add, of a pair) added to dx (dx2) before it is rounded.
Gradients group_norm_silu_bwd_add(const Tensor& dy, const Tensor& x, const OptionalTensor& x2,
                                  const OptionalTensor& weight, const OptionalTensor& bias,
                                  const OptionalTensor& add, const OptionalTensor& scale,
                                  const OptionalTensor& shift, const Tensor& mean,
                                  const Tensor& rstd, int64_t num_groups, bool silu,
                                  const Tensor& dx_add, const OptionalTensor& dx2_add) {
  STD_TORCH_CHECK(x2.has_value() == dx2_add.has_value(), "dx2_add must be given with x2");
  check_like(dx_add, x, "dx_add");
  if (x2) check_like(*dx2_add, *x2, "dx2_add");
  const auto kernels = [&](const Cpu& device, const auto& p, bool dy_channels_last,
                           float* workspace, auto grads) {
    grads.dx_add = dx_add.data_ptr();
    grads.dx2_add = x2 ? dx2_add->data_ptr() : nullptr;
    engine::group_norm_silu_bwd_cpu(p, dy.data_ptr(), dy_channels_last, floats(mean), floats(rstd),
                                    workspace, grads, device.parallel_for());
  };
  return group_norm_silu_gradients<Cpu>(dy, x, x2, weight, bias, add, scale, shift, mean, rstd,
                                        num_groups, silu, kernels);
}
#endif

template <class Device>
void register_kernels(Library& m) {
  m.impl("group_norm_silu_fwd", TORCH_BOX(&group_norm_silu_fwd<Device>));
  m.impl("group_norm_silu_bwd", TORCH_BOX(&group_norm_silu_bwd<Device>));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ENGINE_NS, m) {
  m.def(
      "group_norm_silu_fwd(Tensor x, Tensor? x2, Tensor? weight, Tensor? bias, Tensor? add, "
      "Tensor? scale, Tensor? shift, int num_groups, float eps, bool silu) -> (Tensor y, Tensor "
      "mean, Tensor rstd)");
  // UNPROVEN, for CUDA tensors alone: csrc/cuda/group_norm_silu_cluster.cu.
  m.def(
      "group_norm_silu_fwd_cluster(Tensor x, Tensor? x2, Tensor? weight, Tensor? bias, Tensor? "
      "add, Tensor? scale, Tensor? shift, int num_groups, float eps, bool silu, bool strict) -> "
      "(Tensor y, Tensor mean, Tensor rstd)");
  // UNPROVEN, for CUDA tensors alone: csrc/cuda/group_norm_silu_blocked.cu.
  m.def(
      "group_norm_silu_fwd_blocked(Tensor x, Tensor? x2, Tensor? weight, Tensor? bias, Tensor? "
      "add, Tensor? scale, Tensor? shift, int num_groups, float eps, bool silu, bool strict) -> "
      "(Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "group_norm_silu_bwd(Tensor dy, Tensor x, Tensor? x2, Tensor? weight, Tensor? bias, Tensor? "
      "add, Tensor? scale, Tensor? shift, Tensor mean, Tensor rstd, int num_groups, bool silu) -> "
      "(Tensor dx, Tensor dx2, Tensor dweight, Tensor dbias, Tensor dadd, Tensor dscale, Tensor "
      "dshift)");
  // For CPU tensors alone.
  m.def(
      "group_norm_silu_bwd_add(Tensor dy, Tensor x, Tensor? x2, Tensor? weight, Tensor? bias, "
      "Tensor? add, Tensor? scale, Tensor? shift, Tensor mean, Tensor rstd, int num_groups, bool "
      "silu, Tensor dx_add, Tensor? dx2_add) -> (Tensor dx, Tensor dx2, Tensor dweight, Tensor "
      "dbias, Tensor dadd, Tensor dscale, Tensor dshift)");
  // UNPROVEN, for CUDA tensors alone: csrc/cuda/group_norm_silu_bwd_blocked.cu.
  m.def(
      "group_norm_silu_bwd_blocked(Tensor dy, Tensor x, Tensor? x2, Tensor? weight, Tensor? bias, "
      "Tensor? add, Tensor? scale, Tensor? shift, Tensor mean, Tensor rstd, int num_groups, bool "
      "silu, bool strict) -> (Tensor dx, Tensor dx2, Tensor dweight, Tensor dbias, Tensor dadd, "
      "Tensor dscale, Tensor dshift)");
}

STABLE_TORCH_LIBRARY_IMPL(ENGINE_NS, CPU, m) {
  register_kernels<OnCpu>(m);
#ifdef ENGINE_EMULATE
  m.impl("group_norm_silu_fwd_blocked", TORCH_BOX(&group_norm_silu_fwd_blocked));
  m.impl("group_norm_silu_bwd_blocked", TORCH_BOX(&group_norm_silu_bwd_blocked));
#else
  m.impl("group_norm_silu_bwd_add", TORCH_BOX(&group_norm_silu_bwd_add));
#endif
}
#ifdef ENGINE_CUDA
STABLE_TORCH_LIBRARY_IMPL(ENGINE_NS, CUDA, m) {
  register_kernels<Cuda>(m);
  m.impl("group_norm_silu_fwd_cluster", TORCH_BOX(&group_norm_silu_fwd_cluster));
  m.impl("group_norm_silu_fwd_blocked", TORCH_BOX(&group_norm_silu_fwd_blocked));
  m.impl("group_norm_silu_bwd_blocked", TORCH_BOX(&group_norm_silu_bwd_blocked));
}
#endif

}  // namespace engine::ops

// The CPU kernels on NumPy arrays, without torch: a small pybind11 module for
// tests/native_build.py. bfloat16 arrays are uint16 bit patterns.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "../csrc/cpu/attention_amx.h"
#include "../csrc/cpu/isa.h"
#include "../csrc/kernels.h"
#include "../csrc/philox.h"

namespace py = pybind11;
using engine::DType;

namespace {

// `threads` ranges of almost equal size, each on a thread of its own. Below 0: only so many items
// at the end of each loop, for tensors too large to go through (tests/large_offsets.py).
engine::ParallelFor threads_of(int threads) {
  return [threads](int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    if (threads < 0) return body(n + threads > 0 ? n + threads : 0, n);
    const int64_t most = (n + grain - 1) / grain;
    const int64_t parts = most < threads ? most : threads;
    std::vector<std::thread> pool;
    for (int64_t i = 0; i < parts; ++i) pool.emplace_back(body, n * i / parts, n * (i + 1) / parts);
    for (auto& thread : pool) thread.join();
  };
}

DType dtype_of(const py::array& array) {
  const char kind = array.dtype().kind();
  if (array.itemsize() == 4) return DType::f32;
  return kind == 'u' ? DType::bf16 : DType::f16;
}

engine::Operand operand(const std::optional<py::array>& array) {
  if (!array) return {};
  const int64_t row = array->ndim() == 2 ? array->strides(0) / array->itemsize() : 0;
  return {array->data(), row, dtype_of(*array)};
}

// x (N, C, S) or, channels last, (N, S, C) in memory.
engine::GroupNormSilu params(const py::array& x, bool channels_last, py::dict operands, int64_t G,
                             float eps, bool silu) {
  engine::GroupNormSilu p;
  p.N = x.shape(0);
  p.C = x.shape(channels_last ? 2 : 1);
  p.S = x.shape(channels_last ? 1 : 2);
  p.G = G;
  p.eps = eps;
  p.silu = silu;
  p.channels_last = channels_last;
  p.dtype = dtype_of(x);
  p.x = x.data();
  const auto get = [&](const char* name) {
    return operands.contains(name) ? operand(operands[name].cast<py::array>()) : engine::Operand{};
  };
  p.weight = get("weight");
  p.bias = get("bias");
  p.add = get("add");
  p.scale = get("scale");
  p.shift = get("shift");
  return p;
}

py::array like(const py::array& x) {
  return py::array(x.dtype(), std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
}

py::tuple group_norm_silu_fwd(const py::array& x, bool channels_last, py::dict operands, int64_t G,
                              float eps, bool silu, int threads) {
  const auto p = params(x, channels_last, operands, G, eps, silu);
  py::array y = like(x);
  py::array_t<float> mean({p.N, G}), rstd({p.N, G});
  engine::group_norm_silu_fwd_cpu(p, y.mutable_data(), mean.mutable_data(), rstd.mutable_data(),
                                  threads_of(threads));
  return py::make_tuple(y, mean, rstd);
}

py::dict group_norm_silu_bwd(const py::array& dy, bool dy_channels_last, const py::array& x,
                             bool channels_last, py::dict operands, py::array_t<float> mean,
                             py::array_t<float> rstd, bool silu, int threads,
                             const std::optional<py::array>& dx_add) {
  const auto p = params(x, channels_last, operands, mean.shape(1), 0.0f, silu);
  py::array dx = like(x);
  py::array_t<float> dweight(p.C), dbias(p.C);
  py::array_t<float> dadd({p.N, p.C}), dscale({p.N, p.C}), dshift({p.N, p.C});
  std::vector<float> workspace(3 * p.N * p.C);
  engine::GroupNormSiluGrads grads{dx.mutable_data(),     dweight.mutable_data(),
                                   dbias.mutable_data(),  dadd.mutable_data(),
                                   dscale.mutable_data(), dshift.mutable_data()};
  grads.dx_add = dx_add ? dx_add->data() : nullptr;
  engine::group_norm_silu_bwd_cpu(p, dy.data(), dy_channels_last, mean.data(), rstd.data(),
                                  workspace.data(), grads, threads_of(threads));
  py::dict result;
  result["x"] = dx;
  result["weight"] = dweight;
  result["bias"] = dbias;
  result["add"] = dadd;
  result["scale"] = dscale;
  result["shift"] = dshift;
  return result;
}

engine::RmsNormSilu rms_params(const py::array& x, bool channels_last, py::dict operands, float eps,
                               bool silu) {
  const auto g = params(x, channels_last, operands, 1, eps, silu);
  engine::RmsNormSilu p{g.N, g.C, g.S, eps, silu, channels_last, g.dtype, g.x};
  p.weight = g.weight, p.scale = g.scale, p.shift = g.shift;
  return p;
}

py::tuple rms_norm_silu_fwd(const py::array& x, bool channels_last, py::dict operands, float eps,
                            bool silu, int threads) {
  const auto p = rms_params(x, channels_last, operands, eps, silu);
  py::array y = like(x);
  py::array_t<float> rstd({p.N, p.S});
  engine::rms_norm_silu_fwd_cpu(p, y.mutable_data(), rstd.mutable_data(), threads_of(threads));
  return py::make_tuple(y, rstd);
}

py::dict rms_norm_silu_bwd(const py::array& dy, bool dy_channels_last, const py::array& x,
                           bool channels_last, py::dict operands, py::array_t<float> rstd,
                           bool silu, int threads) {
  const auto p = rms_params(x, channels_last, operands, 1.0f, silu);
  py::array dx = like(x);
  py::array_t<float> dweight(p.C), dscale({p.N, p.C}), dshift({p.N, p.C});
  std::vector<float> workspace(p.N * engine::rms_norm_silu_pieces(p) * 2 * p.C);
  const engine::RmsNormSiluGrads grads{dx.mutable_data(), dweight.mutable_data(),
                                       dscale.mutable_data(), dshift.mutable_data()};
  engine::rms_norm_silu_bwd_cpu(p, dy.data(), dy_channels_last, rstd.data(), workspace.data(),
                                grads, threads_of(threads));
  py::dict result;
  result["x"] = dx;
  result["weight"] = dweight;
  result["scale"] = dscale;
  result["shift"] = dshift;
  return result;
}

// An array (N, H, S, D) of any strides.
engine::AttentionView attention_view(const py::array& a) {
  const int64_t size = a.itemsize();
  return {const_cast<void*>(a.data()), a.strides(0) / size, a.strides(1) / size,
          a.strides(2) / size, a.strides(3) / size};
}

engine::Attention attention_params(const py::array& q, const py::array& k, const py::array& v,
                                   float scale) {
  return {dtype_of(q), q.shape(0),        q.shape(1),        q.shape(2),        k.shape(2),
          q.shape(3),  attention_view(q), attention_view(k), attention_view(v), scale};
}

py::tuple attention_fwd(const py::array& q, const py::array& k, const py::array& v, float scale,
                        int threads) {
  const auto p = attention_params(q, k, v, scale);
  py::array out = like(q);
  py::array_t<float> lse({p.N, p.H, p.S});
  engine::attention_fwd_cpu(p, attention_view(out), lse.mutable_data(), threads_of(threads));
  return py::make_tuple(out, lse);
}

py::dict attention_bwd(const py::array& dout, const py::array& q, const py::array& k,
                       const py::array& v, const py::array& out, py::array_t<float> lse,
                       float scale, int threads) {
  const auto p = attention_params(q, k, v, scale);
  py::array dq = like(q), dk = like(k), dv = like(v);
  engine::attention_bwd_cpu(p,
                            {attention_view(dout), attention_view(out), lse.data(),
                             attention_view(dq), attention_view(dk), attention_view(dv)},
                            threads_of(threads));
  py::dict result;
  result["q"] = dq, result["k"] = dk, result["v"] = dv;
  return result;
}

void noise(py::array out, int64_t seed, int64_t step, uint32_t stream, int64_t offset,
           int threads) {
  engine::noise_cpu(out.mutable_data(), dtype_of(out), out.size(), &seed, &step, stream, offset,
                    threads_of(threads));
}

// The same normals from the scalar header.
py::array_t<float> scalar_noise(int64_t n, int64_t seed, uint32_t step, uint32_t stream,
                                int64_t offset) {
  py::array_t<float> out(n);
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t number = static_cast<uint64_t>(offset + i);
    float z[4];
    engine::philox::normal_quad(seed, step, stream, number / 4, z);
    out.mutable_at(i) = z[number % 4];
  }
  return out;
}

std::vector<uint32_t> philox_words(std::vector<uint32_t> counter, std::vector<uint32_t> key) {
  std::vector<uint32_t> words(4);
  engine::philox::philox4x32_10(counter.data(), key.data(), words.data());
  return words;
}

// Arrays are (N, C, S) or, channels last, (N, S, C).
py::array reverse_step_fwd(const py::array& x, bool x_last, const py::array& model_out,
                           bool model_out_last, py::array_t<float> coeffs, int64_t step,
                           int64_t seed, const std::optional<py::array>& noise, bool noise_last,
                           float clip, int64_t offset, int threads) {
  engine::ReverseStep p{};
  p.N = x.shape(0);
  p.C = x.shape(x_last ? 2 : 1);
  p.S = x.shape(x_last ? 1 : 2);
  p.dtype = dtype_of(x);
  p.model_out_dtype = dtype_of(model_out);
  p.x_channels_last = x_last;
  p.model_out_channels_last = model_out_last;
  p.noise_channels_last = noise_last;
  p.x = x.data();
  p.model_out = model_out.data();
  p.noise = noise ? noise->data() : nullptr;
  p.coeffs = coeffs.data();
  p.n_steps = coeffs.shape(0);
  p.step = &step;
  p.seed = &seed;
  p.offset = offset;
  p.clip = clip;
  py::array x_next = like(x);
  engine::reverse_step_fwd_cpu(p, x_next.mutable_data(), threads_of(threads));
  return x_next;
}

// Every operand: model_out (N, 2 C, S), the others (N, C, S), or all with channels last.
// -> x_next, x0, model_in in bf16, threshold
py::tuple reverse_step_general_fwd(py::dict operands, bool last, py::array_t<float> row,
                                   int64_t seed, float guidance, int64_t rank, float fraction,
                                   int threads) {
  const auto array = [&](const char* name) { return operands[name].cast<py::array>(); };
  const py::array x = array("x");
  engine::ReverseStepGeneral p{};
  p.N = x.shape(0), p.C = x.shape(last ? 2 : 1), p.S = x.shape(last ? 1 : 2);
  const auto operand = [&](const char* name) {
    const py::array a = array(name);
    return engine::StepOperand{a.data(), dtype_of(a), last, a.size() / p.N, a.shape(2)};
  };
  p.x = operand("x"), p.model_out = operand("model_out"), p.uncond = operand("uncond");
  p.grad = operand("grad"), p.x0_prev = operand("x0_prev"), p.v = p.model_out;
  const int64_t half = last ? p.C : p.C * p.S;
  p.v.data = static_cast<const char*>(p.v.data) + half * array("model_out").itemsize();
  p.dtype = dtype_of(x), p.channels_last = last;
  const int64_t step = 0;
  p.coeffs = row.data(), p.n_steps = 1, p.columns = 10, p.step = &step, p.seed = &seed;
  p.guidance = guidance;
  py::array x_next = like(x), x0 = like(x);
  py::array_t<uint16_t> model_in(x.size());
  py::array_t<float> threshold(p.N);
  p.x_next = x_next.mutable_data(), p.x0 = x0.mutable_data();
  p.model_in = model_in.mutable_data(), p.model_in_dtype = DType::bf16;
  engine::reverse_step_threshold_fwd_cpu(p, rank, fraction, threshold.mutable_data(),
                                         threads_of(threads));
  p.threshold = threshold.data();
  engine::reverse_step_general_fwd_cpu(p, threads_of(threads));
  return py::make_tuple(x_next, x0, model_in, threshold);
}

// Results are written into out, lse; dq, dk, dv.
void attention_fwd_amx(const py::array& q, const py::array& k, const py::array& v, float scale,
                       const py::array& out, std::optional<py::array_t<float>> lse, int threads) {
  engine::attention_fwd_amx(attention_params(q, k, v, scale), attention_view(out),
                            lse ? lse->mutable_data() : nullptr, threads_of(threads));
}

void attention_bwd_amx(const py::array& dout, const py::array& q, const py::array& k,
                       const py::array& v, const py::array& out, py::array_t<float> lse,
                       float scale, const py::array& dq, const py::array& dk, const py::array& dv,
                       int threads) {
  const engine::AttentionGrads grads{attention_view(dout), attention_view(out), lse.data(),
                                     attention_view(dq),   attention_view(dk),  attention_view(dv)};
  engine::attention_bwd_amx(attention_params(q, k, v, scale), grads, threads_of(threads));
}

// x (N, H, W, C), dy (N, H, W, K) -> dw (K, C, 3, 3) or, channels last, (K, 3, 3, C); db.
py::tuple conv2d_winograd_bwd_weight(py::array_t<float> dy, py::array_t<float> x,
                                     bool channels_last, int threads) {
  engine::Conv2dWinogradGrads p;
  p.N = x.shape(0), p.H = x.shape(1), p.W = x.shape(2), p.C = x.shape(3), p.K = dy.shape(3);
  py::array_t<float> dw(channels_last ? std::vector<py::ssize_t>{p.K, 3, 3, p.C}
                                      : std::vector<py::ssize_t>{p.K, p.C, 3, 3});
  py::array_t<float> db(p.K);
  p.dy = dy.data(), p.x = x.data(), p.dweight = dw.mutable_data(), p.dbias = db.mutable_data();
  p.k_stride = 9 * p.C, p.c_stride = channels_last ? 1 : 9, p.tap_stride = channels_last ? p.C : 1;
  std::vector<float> workspace(16 * (p.C * p.K + 16), NAN);
  engine::conv2d_winograd_bwd_weight_cpu(p, workspace.data(), threads_of(threads));
  return py::make_tuple(dw, db);
}

}  // namespace

// x, x2 (N, H, W, C), w (K, C, 3, 3) of any strides but between its taps, add (N, H, W, K).
py::array conv2d_winograd_fwd(py::array_t<float> x, std::optional<py::array_t<float>> x2,
                              py::array_t<float> w, std::optional<py::array_t<float>> bias,
                              std::optional<py::array_t<float>> add, bool transposed, bool upsample,
                              int threads) {
  const int64_t times = upsample ? 2 : 1, size = sizeof(float);
  const int k = transposed ? 1 : 0, c = 1 - k;
  engine::Conv2dWinograd<float> p;
  p.N = x.shape(0), p.H = times * x.shape(1), p.W = times * x.shape(2);
  p.K = w.shape(k), p.C = w.shape(c), p.C2 = x2 ? x2->shape(3) : 0;
  p.upsample = upsample;
  std::vector<float> packed(16 * p.K * p.C);
  engine::conv2d_winograd_weight_cpu(w.data(), p.K, p.C, w.strides(k) / size, w.strides(c) / size,
                                     w.strides(3) / size, transposed, packed.data(),
                                     threads_of(threads));
  py::array_t<float> y({p.N, p.H, p.W, p.K});
  p.x = x.data(), p.x2 = x2 ? x2->data() : nullptr;
  p.weight = packed.data();
  p.bias = bias ? bias->data() : nullptr;
  p.add = add ? add->data() : nullptr;
  p.y = y.mutable_data();
  engine::conv2d_winograd_fwd_cpu(p, threads_of(threads));
  return y;
}

PYBIND11_MODULE(native_module, m) {
  m.def("group_norm_silu_fwd", &group_norm_silu_fwd);
  m.def("group_norm_silu_bwd", &group_norm_silu_bwd, py::arg("dy"), py::arg("dy_channels_last"),
        py::arg("x"), py::arg("channels_last"), py::arg("operands"), py::arg("mean"),
        py::arg("rstd"), py::arg("silu"), py::arg("threads"), py::arg("dx_add") = py::none());
  m.def("rms_norm_silu_fwd", &rms_norm_silu_fwd);
  m.def("rms_norm_silu_bwd", &rms_norm_silu_bwd);
  m.def("attention_fwd", &attention_fwd);
  m.def("attention_bwd", &attention_bwd);
  m.def("conv2d_winograd_fwd", &conv2d_winograd_fwd);
  m.def("noise", &noise);
  m.def("scalar_noise", &scalar_noise);
  m.def("philox_words", &philox_words);
  m.def("reverse_step_fwd", &reverse_step_fwd);
  m.def("reverse_step_general_fwd", &reverse_step_general_fwd);
  m.def("attention_amx_available", &engine::attention_amx_available);
  m.def("attention_fwd_amx", &attention_fwd_amx);
  m.def("attention_bwd_amx", &attention_bwd_amx);
  m.def("conv2d_winograd_bwd_weight", &conv2d_winograd_bwd_weight);
  m.def("isa_level", &engine::isa_level);
  m.def("limit_isa_level", &engine::limit_isa_level);
}

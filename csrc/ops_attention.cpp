// Bindings of attention: forward and backward, of q, k, v and of packed qkv, for CPU tensors alone.
//
// Empty tensors are refused here: kernels.h excludes them. Strides are free; results are (N, H, S,
// D) with memory (N, S, H, D), so that merging the heads costs nothing, or, of qkv, one dense
// tensor.
#ifndef ENGINE_EMULATE
#include <string>
#include <tuple>

#include "ops.h"

namespace engine::ops {
namespace {

// (N, heads, S, D) of memory (N, S, heads, D).
Tensor allocate_heads(const Tensor& like, int64_t N, int64_t H, int64_t S, int64_t D) {
  const int64_t memory[] = {N, S, H, D}, sizes[] = {N, H, S, D},
                strides[] = {S * H * D, D, H * D, 1};
  const Tensor dense = allocate(like, memory, 4, like.scalar_type());
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(dense.get(), 4, sizes, strides, 0, &handle));
  return Tensor(handle);
}

AttentionView view_of(const Tensor& t, int64_t N, int64_t H, int64_t S, int64_t D,
                      const Tensor& first, const char* name) {
  const auto sizes = t.sizes(), strides = t.strides();
  STD_TORCH_CHECK(
      sizes.size() == 4 && sizes[0] == N && sizes[1] == H && sizes[2] == S && sizes[3] == D, name,
      " must have shape (", N, ", ", H, ", ", S, ", ", D, ")");
  STD_TORCH_CHECK(t.scalar_type() == first.scalar_type(), name,
                  " must have the dtype of the first tensor");
  check_device(t, first, name);
  return {t.data_ptr(), strides[0], strides[1], strides[2], strides[3]};
}

Attention attention_params(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q and k must have shape (N, heads, S, D)");
  const auto sizes = q.sizes();
  Attention p{dtype_of(q, "q"), sizes[0], sizes[1], sizes[2], k.sizes()[2], sizes[3]};
  STD_TORCH_CHECK(p.N > 0 && p.H > 0 && p.S > 0 && p.Sk > 0 && p.D > 0,
                  "q and k must not be empty");
  p.q = view_of(q, p.N, p.H, p.S, p.D, q, "q");
  p.k = view_of(k, p.N, p.H, p.Sk, p.D, q, "k");
  p.v = view_of(v, p.N, p.H, p.Sk, p.D, q, "v");
  p.scale = static_cast<float>(scale);
  return p;
}

const float* lse_of(const Tensor& lse, const Attention& p, const Tensor& first) {
  check_device(lse, first, "lse");
  const auto sizes = lse.sizes();
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.is_contiguous() &&
                      sizes.size() == 3 && sizes[0] == p.N && sizes[1] == p.H && sizes[2] == p.S,
                  "lse must be contiguous float32 of shape (N, heads, S)");
  return floats(lse);
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                         double scale) {
  const Attention p = attention_params(q, k, v, scale);
  Tensor out = allocate_heads(q, p.N, p.H, p.S, p.D), lse = allocate_floats(q, {p.N, p.H, p.S});
  engine::attention_fwd_cpu(p, view_of(out, p.N, p.H, p.S, p.D, q, "out"), floats(lse),
                            Cpu::parallel_for());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout, const Tensor& q,
                                                 const Tensor& k, const Tensor& v,
                                                 const Tensor& out, const Tensor& lse,
                                                 double scale) {
  const Attention p = attention_params(q, k, v, scale);
  Tensor dq = allocate_heads(q, p.N, p.H, p.S, p.D), dk = allocate_heads(q, p.N, p.H, p.Sk, p.D);
  Tensor dv = allocate_heads(q, p.N, p.H, p.Sk, p.D);
  const auto queries = [&](const Tensor& t, const char* name) {
    return view_of(t, p.N, p.H, p.S, p.D, q, name);
  };
  const auto keys = [&](const Tensor& t) { return view_of(t, p.N, p.H, p.Sk, p.D, q, "dk, dv"); };
  const AttentionGrads grads{queries(dout, "dout"),
                             queries(out, "out"),
                             lse_of(lse, p, q),
                             queries(dq, "dq"),
                             keys(dk),
                             keys(dv)};
  engine::attention_bwd_cpu(p, grads, Cpu::parallel_for());
  return {dq, dk, dv};
}

// ---- Packed -------------------------------------------------------------------------------------

// q, k and v inside (N, S, 3 * heads * D), as kernels/boundary.py splits it.
struct Packed {
  AttentionView q, k, v;
};
Packed packed_of(const Tensor& t, int64_t H, int64_t D, const std::string& order) {
  const auto strides = t.strides();
  const int64_t c = strides[2];  // of a channel
  STD_TORCH_CHECK(order == "3hd" || order == "h3d" || order == "hd3",
                  "order must be 3hd, h3d or hd3");
  const int64_t which = (order == "3hd" ? H * D : order == "h3d" ? D : 1) * c;
  const int64_t head = (order == "3hd" ? D : 3 * D) * c, d = (order == "hd3" ? 3 : 1) * c;
  const int64_t size = t.scalar_type() == ScalarType::Float ? 4 : 2;
  const auto part = [&](int64_t i) {
    return AttentionView{static_cast<char*>(t.data_ptr()) + i * which * size, strides[0], head,
                         strides[1], d};
  };
  return {part(0), part(1), part(2)};
}

Attention packed_params(const Tensor& qkv, int64_t heads, const std::string& order, double scale) {
  const auto sizes = qkv.sizes();
  STD_TORCH_CHECK(sizes.size() == 3 && heads > 0 && sizes[2] % (3 * heads) == 0,
                  "qkv must have shape (N, S, 3 * heads * D)");
  STD_TORCH_CHECK(sizes[0] > 0 && sizes[1] > 0 && sizes[2] > 0, "qkv must not be empty");
  const int64_t D = sizes[2] / (3 * heads);
  const Packed packed = packed_of(qkv, heads, D, order);
  return {dtype_of(qkv, "qkv"),
          sizes[0],
          heads,
          sizes[1],
          sizes[1],
          D,
          packed.q,
          packed.k,
          packed.v,
          static_cast<float>(scale)};
}

// (N, S, heads * D) as (N, heads, S, D).
AttentionView merged_view(const Tensor& t, const Attention& p, const Tensor& qkv,
                          const char* name) {
  const auto sizes = t.sizes(), strides = t.strides();
  STD_TORCH_CHECK(sizes.size() == 3 && sizes[0] == p.N && sizes[1] == p.S && sizes[2] == p.H * p.D,
                  name, " must have shape (N, S, heads * D)");
  STD_TORCH_CHECK(t.scalar_type() == qkv.scalar_type(), name, " must have the dtype of qkv");
  check_device(t, qkv, name);
  return {t.data_ptr(), strides[0], p.D * strides[2], strides[1], strides[2]};
}

// An operand `str`, which is the callee's to delete. Of a parameter std::string, the stable ABI's
// headers (torch 2.11 to 2.13) leave a copy behind in every call.
std::string string_of(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string found(data, length);
  TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return found;
}

std::tuple<Tensor, Tensor> attention_qkv_fwd(const Tensor& qkv, int64_t heads, StringHandle order,
                                             double scale) {
  const Attention p = packed_params(qkv, heads, string_of(order), scale);
  const int64_t sizes[] = {p.N, p.S, p.H * p.D};
  Tensor out = allocate(qkv, sizes, 3, qkv.scalar_type());
  Tensor lse = allocate_floats(qkv, {p.N, p.H, p.S});
  engine::attention_fwd_cpu(p, merged_view(out, p, qkv, "out"), floats(lse), Cpu::parallel_for());
  return {out, lse};
}

Tensor attention_qkv_bwd(const Tensor& dout, const Tensor& qkv, const Tensor& out,
                         const Tensor& lse, int64_t heads, StringHandle order_handle,
                         double scale) {
  const std::string order = string_of(order_handle);
  const Attention p = packed_params(qkv, heads, order, scale);
  Tensor dqkv = allocate_like(qkv);
  const Packed to = packed_of(dqkv, heads, p.D, order);
  const AttentionGrads grads{merged_view(dout, p, qkv, "dout"),
                             merged_view(out, p, qkv, "out"),
                             lse_of(lse, p, qkv),
                             to.q,
                             to.k,
                             to.v};
  engine::attention_bwd_cpu(p, grads, Cpu::parallel_for());
  return dqkv;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ENGINE_NS, m) {
  m.def("attention_fwd(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float "
      "scale) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def(
      "attention_qkv_fwd(Tensor qkv, int heads, str order, float scale) -> (Tensor out, Tensor "
      "lse)");
  m.def(
      "attention_qkv_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int heads, str order, "
      "float scale) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ENGINE_NS, CPU, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
  m.impl("attention_qkv_fwd", TORCH_BOX(&attention_qkv_fwd));
  m.impl("attention_qkv_bwd", TORCH_BOX(&attention_qkv_bwd));
}

}  // namespace engine::ops
#endif

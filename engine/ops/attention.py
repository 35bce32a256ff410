"""Attention: validation, choice of back end, autograd."""

import math
from numbers import Real

import torch
from torch import Tensor

from .. import dispatch
from .layout import check_tensors, distinct, is_whole, refuse_double_backward

QKV_ORDERS = {"3hd": "(3, heads, D)", "h3d": "(heads, 3, D)", "hd3": "(heads, D, 3)"}


def attention(
    q: Tensor,  # (N, heads, S, D) float32, bfloat16 or float16, any strides
    k: Tensor,  # (N, heads, Sk, D)
    v: Tensor,  # (N, heads, Sk, D)
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """out = softmax(q kᵀ · scale) v, scale 1/√D unless given. Returns (N, heads, S, D) in q.dtype.

    Softmax and sums in float32. Differentiable in q, k, v. The kernels write out in memory
    order (N, S, heads, D), so that merging the heads costs nothing.
    Raises ValueError for shapes, dtypes or devices that do not fit, BackendError (RuntimeError)
    when an explicit impl cannot serve.
    Sources: Vaswani et al. 2017, eq. 1; Dao 2023 (FlashAttention-2), alg. 1 and 2.
    """
    _check_attention(q, k, v)
    scale = _scale(q, scale)
    if q.numel() == 0 or k.numel() == 0:
        impl = "eager"
    backend = dispatch.pick("attention", impl, q, k, v, scale)
    if backend == "eager":
        return dispatch.module("attention", backend).attention(q, k, v, scale)
    q = q if q.stride(-1) == 1 else q.contiguous()
    k = k if k.stride(-1) == 1 else k.contiguous()
    v = v if v.stride(-1) == 1 else v.contiguous()
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(backend, *distinct(q, k, v), scale)
    return dispatch.function("attention", "fwd", backend)(q, k, v, scale)[0]


def attention_qkv(
    qkv: Tensor,  # (N, S, 3·heads·D) float32, bfloat16 or float16
    num_heads: int,
    order: str = "3hd",
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """out = merge(softmax(q kᵀ · scale) v), q, k, v = split(qkv), scale 1/√D unless given.

    order says what the 3·heads·D channels are, slowest first: "3hd" all of q, of k, of v; "h3d"
    q, k, v of each head (guided-diffusion's legacy order); "hd3" q, k, v of each element.
    Returns (N, S, heads·D), head by head, in qkv.dtype; softmax and sums in float32.
    Differentiable in qkv. The kernels read qkv and write its gradient, one tensor of qkv's
    layout, in place: nothing is transposed or concatenated. "hd3" is read with stride 3 along D,
    two bytes at a time: slower than the others, still without a copy. Only a qkv whose channels are
    not its fast dimension is copied once.
    Raises ValueError for shapes, dtypes or orders that do not fit, BackendError (RuntimeError) when
    an explicit impl cannot serve.
    Sources: Vaswani et al. 2017, eq. 1; Dhariwal & Nichol 2021, §3.1 (attention over positions).
    """
    *views, scale = arguments_qkv(qkv, num_heads, order, scale=scale)
    backend = dispatch.pick("attention", "eager" if qkv.numel() == 0 else impl, *views, scale)
    if backend == "eager":
        out = dispatch.module("attention", backend).attention(*views, scale)
        return out.transpose(1, 2).flatten(2)
    qkv = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _AttentionQKV.apply(backend, qkv, num_heads, order, scale)
    return dispatch.function("attention", "qkv_fwd", backend)(qkv, num_heads, order, scale)[0]


class _AttentionQKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, qkv, num_heads, order, scale):
        fwd = dispatch.function("attention", "qkv_fwd", backend)
        out, lse = fwd(qkv, num_heads, order, scale)
        ctx.save_for_backward(qkv, out, lse)
        ctx.backend, ctx.rest = backend, (num_heads, order, scale)
        return out

    @staticmethod
    def backward(ctx, dout):
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint gives them no second time
        refuse_double_backward("attention_qkv", ctx.backend, saved)
        bwd = dispatch.function("attention", "qkv_bwd", ctx.backend)
        return None, bwd(dout, *saved, *ctx.rest), None, None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, q, k, v, scale):
        out, lse = dispatch.function("attention", "fwd", backend)(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.backend, ctx.scale = backend, scale
        return out

    @staticmethod
    def backward(ctx, dout):
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        saved = ctx.saved_tensors  # once, as above
        refuse_double_backward("attention", ctx.backend, saved)
        bwd = dispatch.function("attention", "bwd", ctx.backend)
        return None, *bwd(dout, *saved, ctx.scale), None


def arguments(q, k, v, *, scale=None):
    _check_attention(q, k, v)
    return q, k, v, _scale(q, scale)


def arguments_qkv(qkv, num_heads, order="3hd", *, scale=None):
    """As attention's: q, k and v are views of qkv."""
    _check_qkv(qkv, num_heads, order)
    q, k, v = dispatch.split_qkv(qkv, num_heads, order)
    return q, k, v, _scale(q, scale)


def _scale(q: Tensor, scale: float | None) -> float:
    if scale is None:
        return 1.0 / math.sqrt(q.shape[-1] or 1)
    if not isinstance(scale, (Real, torch.SymFloat)):
        raise ValueError(f"attention: scale is {scale!r}, expected a number")
    return float(scale)


def _check_attention(q, k, v) -> None:
    check_tensors("attention", q=q, k=k, v=v)
    a, b, c = q.shape, k.shape, v.shape
    fits = len(a) == len(b) == 4 and b == c
    if not (fits and a[0] == b[0] and a[1] == b[1] and a[3] == b[3]):
        raise ValueError(
            f"attention: q {tuple(a)}, k {tuple(b)}, v {tuple(c)}, "
            "expected (N, heads, S, D) and twice (N, heads, Sk, D)"
        )
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(
            f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, expected one floating dtype"
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"attention: q, k, v are on {q.device}, {k.device}, {v.device}, expected one device"
        )


def _check_qkv(qkv, num_heads, order) -> None:
    check_tensors("attention_qkv", qkv=qkv)
    if not isinstance(order, str) or order not in QKV_ORDERS:
        named = ", ".join(f'"{name}" {shape}' for name, shape in QKV_ORDERS.items())
        raise ValueError(f"attention_qkv: order is {order!r}, expected one of {named}")
    if not is_whole(num_heads) or num_heads < 1:
        raise ValueError(
            f"attention_qkv: num_heads is {num_heads!r}, expected a whole number, at least 1"
        )
    if qkv.dim() != 3 or not qkv.is_floating_point():
        raise ValueError(
            f"attention_qkv: qkv is {tuple(qkv.shape)} {qkv.dtype}, "
            "expected (N, S, 3·heads·D), floating point"
        )
    if qkv.shape[2] == 0 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"attention_qkv: {qkv.shape[2]} channels cannot be split into q, k and v of "
            f"num_heads={num_heads} heads: expected a multiple of {3 * num_heads}"
        )

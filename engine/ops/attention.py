"""Attention: validation, choice of back end, autograd."""

import math
from numbers import Real

import torch
from torch import Tensor

from .. import dispatch
from .layout import check_tensors, refuse_double_backward


def attention(
    q: Tensor,  # (N, heads, S, D) float32, bfloat16 or float16, any strides
    k: Tensor,  # (N, heads, Sk, D)
    v: Tensor,  # (N, heads, Sk, D)
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """out = softmax(q kᵀ · scale) v, scale 1/√D unless given. Returns (N, heads, S, D) in q.dtype.

    Softmax and sums in float32. Differentiable in q, k, v. The triton kernels write out in memory
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
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(backend, q, k, v, scale)
    return dispatch.function("attention", "fwd", backend)(q, k, v, scale)[0]


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
        refuse_double_backward("attention", ctx.backend, ctx.saved_tensors)
        bwd = dispatch.function("attention", "bwd", ctx.backend)
        return None, *bwd(dout, *ctx.saved_tensors, ctx.scale), None


def arguments(q, k, v, *, scale=None):
    _check_attention(q, k, v)
    return q, k, v, _scale(q, scale)


def _scale(q: Tensor, scale: float | None) -> float:
    if scale is None:
        return 1.0 / math.sqrt(q.shape[-1])
    if not isinstance(scale, (Real, torch.SymFloat)):
        raise ValueError(f"attention: scale is {scale!r}, expected a number")
    return float(scale)


def _check_attention(q, k, v) -> None:
    check_tensors("attention", q=q, k=k, v=v)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    fits = q.dim() == k.dim() == v.dim() == 4 and k.shape == v.shape
    if not (fits and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]):
        raise ValueError(
            f"attention: {shapes}, expected (N, heads, S, D) and twice (N, heads, Sk, D)"
        )
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(
            f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, expected one floating dtype"
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"attention: q, k, v are on {q.device}, {k.device}, {v.device}, expected one device"
        )

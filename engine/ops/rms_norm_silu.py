"""Channel RMS norm, modulation and SiLU: validation, choice of back end, autograd."""

import torch
from torch import Tensor

from .. import dispatch
from .layout import (
    at_least_4d,
    check_tensors,
    dense,
    distinct,
    is_positive,
    refuse_double_backward,
    rows,
)


def rms_norm_silu(
    x: Tensor,  # (N, C, *S) float32, bfloat16 or float16; contiguous or channels_last
    weight: Tensor | None,  # (C,)
    *,
    eps: float = 1e-12,
    scale: Tensor | None = None,  # (N, C), like shift
    shift: Tensor | None = None,
    activation: str = "silu",
    impl: str = "auto",
) -> Tensor:
    """y = act(x / max(|x|, eps) · √C · weight · (1 + scale) + shift), |x| = (Σ_c x²)^½ of a pixel.

    x / max(|x|, eps) is F.normalize(x, dim=1), its derivative included: where |x| < eps it is
    1 / eps. act is SiLU (v·σ(v)) for "silu", the identity for "none". Returns y (N, C, *S) in
    x.dtype and x's layout; float32 inside, except in eager, where each step is in x.dtype.
    Differentiable in every tensor, the same bits on every run. weight, scale and shift may have
    another dtype than x. float64 and an eps below 1e-18 are served by eager alone.
    Raises ValueError for shapes, dtypes or devices that do not fit, BackendError (RuntimeError)
    when an explicit impl cannot serve.
    Sources: Zhang & Sennrich 2019, eq. 4 (RMSNorm), here along the channels of a pixel as in
    denoising-diffusion-pytorch; Dhariwal & Nichol 2021, §3 (scale and shift).
    """
    _check(x, weight, eps, scale, shift, activation)
    silu, shape = activation == "silu", x.shape
    if x.numel() == 0:
        impl = "eager"
    x = at_least_4d(x)
    args = (x, weight, scale, shift, eps, silu)
    backend = dispatch.pick("rms_norm_silu", impl, *args)
    if backend == "eager":
        return dispatch.module("rms_norm_silu", backend).rms_norm_silu(*args).reshape(shape)
    args = (dense(x), *[rows(t) for t in (weight, scale, shift)], eps, silu)
    if dispatch.wants_gradient(args):
        y = _RmsNormSilu.apply(backend, *distinct(*args[:4]), eps, silu)
    else:
        y = dispatch.function("rms_norm_silu", "fwd", backend)(*args)[0]
    return y.view(shape) if y.shape != shape else y


class _RmsNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, weight, scale, shift, eps, silu):
        fwd = dispatch.function("rms_norm_silu", "fwd", backend)
        y, rstd = fwd(x, weight, scale, shift, eps, silu)
        ctx.save_for_backward(x, weight, scale, shift, rstd)
        ctx.backend, ctx.silu = backend, silu
        return y

    @staticmethod
    def backward(ctx, dy):
        bwd = dispatch.function("rms_norm_silu", "bwd", ctx.backend)
        saved = ctx.saved_tensors
        refuse_double_backward("rms_norm_silu", ctx.backend, saved)
        dx, *small = bwd(dense(dy), *saved, ctx.silu)
        operands = saved[1:4]
        small = [None if t is None else d.to(t.dtype) for t, d in zip(operands, small, strict=True)]
        return None, dx, *small, None, None


def arguments(x, weight, *, eps=1e-12, scale=None, shift=None, activation="silu"):
    _check(x, weight, eps, scale, shift, activation)
    return x, weight, scale, shift, eps, activation == "silu"


def _check(x, weight, eps, scale, shift, activation) -> None:
    check_tensors("rms_norm_silu", x=x)
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"rms_norm_silu: x is {tuple(x.shape)} {x.dtype}, expected (N, C, *S), floating point"
        )
    if activation not in ("silu", "none"):
        raise ValueError(f"rms_norm_silu: activation is {activation!r}, expected 'silu' or 'none'")
    if not is_positive(eps):
        raise ValueError(f"rms_norm_silu: eps is {eps!r}, expected eps > 0")
    n, c = x.shape[:2]
    for name, t in {"weight": weight, "scale": scale, "shift": shift}.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            check_tensors("rms_norm_silu", **{name: t})
        expected = (c,) if name == "weight" else (n, c)
        if tuple(t.shape) != expected or not t.is_floating_point():
            raise ValueError(
                f"rms_norm_silu: {name} is {tuple(t.shape)} {t.dtype}, expected {expected}, "
                f"floating point, for x {tuple(x.shape)}"
            )
        if t.device != x.device:
            raise ValueError(f"rms_norm_silu: {name} is on {t.device}, expected {x.device}")

"""GroupNorm, modulation and SiLU: validation, choice of back end, autograd."""

import torch
from torch import Tensor

from .. import dispatch
from .layout import check_tensors, dense, is_positive, is_whole, refuse_double_backward, rows


def group_norm_silu(
    x: Tensor,  # (N, C, *S) float32, bfloat16 or float16; contiguous or channels_last
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    num_groups: int,
    eps: float = 1e-5,
    *,
    add: Tensor | None = None,  # (N, C), like scale and shift
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "silu",
    impl: str = "auto",
) -> Tensor:
    """y = act(GN(x + add) · (1 + scale) + shift), GN(u) = (u − mean)/√(var + eps) · weight + bias.

    Mean and biased variance per sample over C / num_groups channels and S, centred and in float32;
    act is SiLU (v·σ(v)) for "silu", the identity for "none". Returns y in x.dtype and x's layout;
    float32 inside. Differentiable in every tensor, the same bits on every run. weight, bias, add,
    scale and shift may have another dtype than x. float64 is served by eager alone.
    Raises ValueError for shapes, dtypes or devices that do not fit, BackendError (RuntimeError)
    when an explicit impl cannot serve.
    Sources: Wu & He 2018, eq. 1–3; Ho et al. 2020, app. B (add); Dhariwal & Nichol 2021, §3
    (AdaGN).
    """
    _check_group_norm_silu(x, weight, bias, num_groups, eps, add, scale, shift, activation)
    silu = activation == "silu"
    if x.numel() == 0:
        impl = "eager"
    shape = x.shape
    if x.dim() not in (4, 5):  # (N, C, S, 1) knows both layouts, (N, C, S) only one
        x = x.flatten(2).unsqueeze(-1) if x.dim() > 2 else x[:, :, None, None]
    args = (x, weight, bias, add, scale, shift, num_groups, eps, silu)
    backend = dispatch.pick("group_norm_silu", impl, *args)
    if backend == "eager":
        return dispatch.module("group_norm_silu", backend).group_norm_silu(*args).reshape(shape)
    x = dense(x)
    operands = [rows(t) for t in (weight, bias, add, scale, shift)]
    args = (x, *operands, num_groups, eps, silu)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *operands)):
        y = _GroupNormSilu.apply(backend, *args)
    else:
        y = dispatch.function("group_norm_silu", "fwd", backend)(*args)[0]
    return y.view(shape) if y.shape != shape else y


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, weight, bias, add, scale, shift, num_groups, eps, silu):
        fwd = dispatch.function("group_norm_silu", "fwd", backend)
        y, mean, rstd = fwd(x, weight, bias, add, scale, shift, num_groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, add, scale, shift, mean, rstd)
        ctx.backend, ctx.num_groups, ctx.silu = backend, num_groups, silu
        return y

    @staticmethod
    def backward(ctx, dy):
        bwd = dispatch.function("group_norm_silu", "bwd", ctx.backend)
        saved = ctx.saved_tensors
        refuse_double_backward("group_norm_silu", ctx.backend, saved)
        dx, *small = bwd(dense(dy), *saved, ctx.num_groups, ctx.silu)
        operands = saved[1:6]
        small = [None if t is None else d.to(t.dtype) for t, d in zip(operands, small, strict=True)]
        return None, dx, *small, None, None, None


def arguments(
    x, weight, bias, num_groups, eps=1e-5, *, add=None, scale=None, shift=None, activation="silu"
):
    _check_group_norm_silu(x, weight, bias, num_groups, eps, add, scale, shift, activation)
    return x, weight, bias, add, scale, shift, num_groups, eps, activation == "silu"


def _check_group_norm_silu(x, weight, bias, num_groups, eps, add, scale, shift, activation) -> None:
    check_tensors("group_norm_silu", x=x)
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"group_norm_silu: x is {tuple(x.shape)} {x.dtype}, expected (N, C, *S), floating point"
        )
    n, c = x.shape[:2]
    if not is_whole(num_groups):
        raise ValueError(
            f"group_norm_silu: num_groups is {num_groups!r}, a {type(num_groups).__name__}, "
            "expected an int"
        )
    if num_groups < 1 or c % num_groups:
        raise ValueError(
            f"group_norm_silu: {c} channels cannot be split into num_groups={num_groups} groups"
        )
    if activation not in ("silu", "none"):
        raise ValueError(
            f"group_norm_silu: activation is {activation!r}, expected 'silu' or 'none'"
        )
    if not is_positive(eps):
        raise ValueError(f"group_norm_silu: eps is {eps!r}, expected eps > 0")
    operands = {"weight": weight, "bias": bias, "add": add, "scale": scale, "shift": shift}
    for name, t in operands.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            check_tensors("group_norm_silu", **{name: t})
        expected = (c,) if name in ("weight", "bias") else (n, c)
        if tuple(t.shape) != expected or not t.is_floating_point():
            raise ValueError(
                f"group_norm_silu: {name} is {tuple(t.shape)} {t.dtype}, expected {expected}, "
                f"floating point, for x {tuple(x.shape)}"
            )
        if t.device != x.device:
            raise ValueError(f"group_norm_silu: {name} is on {t.device}, expected {x.device}")

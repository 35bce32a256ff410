"""GroupNorm, modulation and SiLU: validation, choice of back end, autograd."""

import torch
from torch import Tensor

from .. import dispatch
from .layout import (
    check_tensors,
    dense,
    distinct,
    is_dense,
    is_positive,
    is_whole,
    refuse_double_backward,
    rows,
)


def group_norm_silu(
    # (N, C, *S) float32, bfloat16 or float16; contiguous or channels_last. Or a pair, (N, Ca, *S)
    # and (N, Cb, *S) with Ca + Cb = C, of one dtype.
    x: Tensor | tuple[Tensor, Tensor],
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
    return_input: bool = False,
) -> Tensor | tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
    """y = act(GN(x + add) · (1 + scale) + shift), GN(u) = (u − mean)/√(var + eps) · weight + bias.

    A pair (a, b) means torch.cat((a, b), 1), read in place; a group may lie in both halves.
    Mean and biased variance per sample over C / num_groups channels and S, centred and in float32;
    act is SiLU (v·σ(v)) for "silu", the identity for "none". Returns y (N, C, *S) in x.dtype and
    x's layout (a's); float32 inside. Differentiable in every tensor, the same bits on every run.
    With return_input it returns (y, x), this x (or pair) for whoever else reads it. Gradients that
    come back by it are added, by native on the CPU, before the norm's own is rounded and written,
    instead of in a pass of autograd's.
    weight, bias, add, scale and shift may have another dtype than x. float64 is served by eager
    alone.
    Raises ValueError for shapes, dtypes or devices that do not fit, BackendError (RuntimeError)
    when an explicit impl cannot serve.
    Sources: Wu & He 2018, eq. 1–3; Ho et al. 2020, app. B (add); Dhariwal & Nichol 2021, §3
    (AdaGN).
    """
    given = x
    x, x2 = halves = _halves(x) if isinstance(x, (tuple, list)) else (x, None)
    _check_group_norm_silu(x, x2, weight, bias, num_groups, eps, add, scale, shift, activation)
    silu = activation == "silu"
    shape = x.shape
    if x.numel() == 0 or (x2 is not None and x2.numel() == 0):
        impl = "eager"
    if x2 is not None:
        shape = (shape[0], shape[1] + x2.shape[1], *shape[2:])
        x2 = _with_positions(x2)
    if x.dim() not in (4, 5):
        x = _with_positions(x)
    args = (x, x2, weight, bias, add, scale, shift, num_groups, eps, silu)
    backend = dispatch.pick("group_norm_silu", impl, *args)
    if backend == "eager":
        y = dispatch.module("group_norm_silu", backend).group_norm_silu(*args).reshape(shape)
        return (y, given) if return_input else y
    if x2 is None:
        x = dense(x)
    else:
        x, x2 = _dense_pair(x, x2)
    operands = [rows(t) for t in (weight, bias, add, scale, shift)]
    args = (x, x2, *operands, num_groups, eps, silu)
    if dispatch.wants_gradient((x, x2, *operands)):
        shares = return_input and _can_share(backend, halves, (x, x2))
        args = shares, *distinct(x, x2, *operands), num_groups, eps, silu
        y = _GroupNormSilu.apply(backend, *args)
        if shares:
            y, x, x2 = y
            given = x if x2 is None else (x, x2)
    else:
        y = dispatch.function("group_norm_silu", "fwd", backend)(*args)[0]
    y = y.view(shape) if y.shape != shape else y
    return (y, given) if return_input else y


def _can_share(backend: str, given: tuple, read: tuple) -> bool:
    """Whether the backward may add other readers' gradients: the back end has that kernel, for the
    CPU, it reads what was given, and no graph is traced, where a compiler fuses additions itself.
    """
    if torch.compiler.is_compiling():
        return False
    if not hasattr(dispatch.module("group_norm_silu", backend), "group_norm_silu_bwd_add"):
        return False
    pairs = zip(given, read, strict=True)
    return all(a is b and (a is None or (a.is_cpu and a.requires_grad)) for a, b in pairs)


def _halves(x: tuple | list) -> tuple[Tensor, Tensor]:
    if len(x) != 2 or not all(isinstance(t, Tensor) for t in x):
        found = ", ".join(type(t).__name__ for t in x)
        raise ValueError(
            f"group_norm_silu: x is a {type(x).__name__} of ({found}), expected a tensor or a pair "
            "of tensors"
        )
    return x[0], x[1]


def _with_positions(x: Tensor) -> Tensor:
    """x itself, or (N, C, S, 1): that knows both layouts, (N, C, S) only one."""
    if x.dim() in (4, 5):
        return x
    return x.flatten(2).unsqueeze(-1) if x.dim() > 2 else x[:, :, None, None]


def _dense_pair(a: Tensor, b: Tensor) -> list[Tensor]:
    """A half that is neither contiguous nor channels_last is copied, in the layout of the other."""
    form = _format(a if is_dense(a) else b)
    return [t if is_dense(t) else t.contiguous(memory_format=form) for t in (a, b)]


def _format(t: Tensor) -> torch.memory_format:
    if t.is_contiguous() or not is_dense(t):
        return torch.contiguous_format
    return torch.channels_last_3d if t.dim() == 5 else torch.channels_last


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, backend, shares, x, x2, weight, bias, add, scale, shift, num_groups, eps, silu
    ):
        fwd = dispatch.function("group_norm_silu", "fwd", backend)
        y, mean, rstd = fwd(x, x2, weight, bias, add, scale, shift, num_groups, eps, silu)
        ctx.save_for_backward(x, x2, weight, bias, add, scale, shift, mean, rstd)
        ctx.backend, ctx.num_groups, ctx.silu = backend, num_groups, silu
        return (y, x, x2) if shares else y

    @staticmethod
    def backward(ctx, dy, *others):  # those that came back by x and x2, where they are shared
        stage = "bwd_add" if others else "bwd"
        bwd = dispatch.function("group_norm_silu", stage, ctx.backend)
        saved = ctx.saved_tensors
        refuse_double_backward("group_norm_silu", ctx.backend, saved)
        others = [_laid_as(x, other) for x, other in zip(saved, others)]  # noqa: B905
        dx, dx2, *small = bwd(dense(dy), *saved, ctx.num_groups, ctx.silu, *others)
        operands = saved[2:7]
        small = [None if t is None else d.to(t.dtype) for t, d in zip(operands, small, strict=True)]
        return None, None, dx, None if saved[1] is None else dx2, *small, None, None, None


def _laid_as(x: Tensor | None, t: Tensor | None) -> Tensor | None:
    """t in the layout of x."""
    return t if x is None else t.contiguous(memory_format=_format(x))


def arguments(
    x, weight, bias, num_groups, eps=1e-5, *, add=None, scale=None, shift=None, activation="silu"
):
    x, x2 = _halves(x) if isinstance(x, (tuple, list)) else (x, None)
    _check_group_norm_silu(x, x2, weight, bias, num_groups, eps, add, scale, shift, activation)
    return x, x2, weight, bias, add, scale, shift, num_groups, eps, activation == "silu"


def _check_group_norm_silu(
    x, x2, weight, bias, num_groups, eps, add, scale, shift, activation
) -> None:
    check_tensors("group_norm_silu", x=x)
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"group_norm_silu: x is {tuple(x.shape)} {x.dtype}, expected (N, C, *S), floating point"
        )
    n, c = x.shape[:2]
    if x2 is not None:
        _check_pair(x, x2)
        c += x2.shape[1]
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
                f"floating point, for x {tuple(x.shape)}{_and(x2)}"
            )
        if t.device != x.device:
            raise ValueError(f"group_norm_silu: {name} is on {t.device}, expected {x.device}")


def _and(x2: Tensor | None) -> str:
    return "" if x2 is None else f" and {tuple(x2.shape)}"


def _check_pair(a: Tensor, b: Tensor) -> None:
    fits = a.dim() == b.dim() and a.shape[0] == b.shape[0] and a.shape[2:] == b.shape[2:]
    if not fits or a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            f"group_norm_silu: x is a pair of {tuple(a.shape)} {a.dtype} on {a.device} and "
            f"{tuple(b.shape)} {b.dtype} on {b.device}, expected (N, Ca, *S) and (N, Cb, *S) of "
            "one dtype on one device"
        )

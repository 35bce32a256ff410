"""One step of the reverse process: validation and choice of back end."""

import math

import torch
from torch import Tensor

from .. import dispatch
from .layout import at_least_4d, check_tensors, dense, is_positive, is_whole, scalar


def reverse_step(
    x: Tensor,  # (N, C, *S) the state x_t
    model_out: Tensor,  # (N, C, *S) the network's output, any floating dtype
    coeffs: Tensor,  # (n_steps, 5) float32, on x.device
    step: int | Tensor,  # row of coeffs; a tensor: one int64 on x.device
    *,
    key: int | Tensor | None = None,  # seed of the noise contract; a tensor: one int64 on x.device
    noise: Tensor | None = None,  # (N, C, *S) in place of a key
    clip: float | None = 1.0,  # x0 is kept in [−clip, clip]; None: not clipped
    offset: int = 0,  # number of x's first element in the whole batch's noise
    impl: str = "auto",
) -> Tensor:
    """x0 = clip(a·x + b·out); x_next = c·x0 + d·x + s·z, with (a, b, c, d, s) = coeffs[step].

    One launch for every sampler that is linear in (x0, x, z): engine.samplers builds the rows for
    DDPM (Ho et al. 2020, eq. 6–7, 11) and DDIM (Song et al. 2021, eq. 12). z is `noise`, or normal
    number offset + i of (key, step, stream 0) for element i (`noise`); it is not drawn where s = 0.
    Exactly one of key and noise must be given. NaN in model_out stays NaN. Returns x's dtype and
    layout; float32 inside. A step tensor outside the table gives NaN, since reading it back would
    stall a GPU. Raises ValueError for arguments that do not fit, BackendError (RuntimeError) when
    an explicit impl cannot serve; only eager has a gradient.
    """
    _check_reverse_step(x, model_out, coeffs, step, key, noise, clip, offset)
    args = _reverse_step_args(x, model_out, coeffs, step, key, noise, clip, offset)
    backend = dispatch.pick("reverse_step", "eager" if x.numel() == 0 else impl, *args)
    shape = x.shape
    if backend != "eager":
        x, model_out, coeffs, step, seed, noise, clip, offset = args
        x, model_out = dense(at_least_4d(x)), dense(at_least_4d(model_out))
        noise = None if noise is None else dense(at_least_4d(noise))
        args = (x, model_out, coeffs, step, seed, noise, clip, offset)
    y = dispatch.function("reverse_step", "fwd", backend)(*args)
    return y.view(shape) if y.shape != shape else y


def arguments(x, model_out, coeffs, step, *, key=None, noise=None, clip=1.0, offset=0):
    _check_reverse_step(x, model_out, coeffs, step, key, noise, clip, offset)
    return _reverse_step_args(x, model_out, coeffs, step, key, noise, clip, offset)


def _reverse_step_args(x, model_out, coeffs, step, key, noise, clip, offset) -> tuple:
    step = scalar("step", step, x.device, 0, coeffs.shape[0])
    seed = None if key is None else scalar("key", key, x.device, -(2**63), 2**63)
    noise = None if noise is None else noise.to(x.dtype)
    return x, model_out, coeffs, step, seed, noise, math.inf if clip is None else clip, offset


def _check_reverse_step(x, model_out, coeffs, step, key, noise, clip, offset) -> None:
    if not (isinstance(x, Tensor) and isinstance(model_out, Tensor) and isinstance(coeffs, Tensor)):
        check_tensors("reverse_step", x=x, model_out=model_out, coeffs=coeffs)
    _check_like("model_out", model_out, x)
    if noise is not None:
        check_tensors("reverse_step", noise=noise)
        _check_like("noise", noise, x)
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"reverse_step: x is {tuple(x.shape)} {x.dtype}, expected (N, C, *S) float"
        )
    if coeffs.dim() != 2 or coeffs.shape[1] != 5 or coeffs.dtype != torch.float32:
        raise ValueError(
            f"reverse_step: coeffs is {tuple(coeffs.shape)} {coeffs.dtype}, "
            "expected (n_steps, 5) float32: the second result of samplers.coefficients, .float()"
        )
    if coeffs.device != x.device or not coeffs.is_contiguous():
        raise ValueError(f"reverse_step: coeffs must be contiguous and on {x.device} like x")
    if (key is None) == (noise is None):
        raise ValueError("reverse_step: give exactly one of key (a seed) and noise (a tensor)")
    if clip is not None and not is_positive(clip):
        raise ValueError(
            f"reverse_step: clip is {clip!r}, expected clip > 0, or None for no clipping"
        )
    if not is_whole(offset) or not 0 <= offset < 2**63:
        raise ValueError(f"reverse_step: offset is {offset!r}, expected 0 <= offset < 2^63")


def _check_like(name: str, t: Tensor, x: Tensor) -> None:
    if t.shape != x.shape or t.device != x.device or not t.is_floating_point():
        raise ValueError(
            f"reverse_step: {name} is {tuple(t.shape)} {t.dtype} on {t.device}, "
            f"expected {tuple(x.shape)}, floating point, on {x.device} like x"
        )

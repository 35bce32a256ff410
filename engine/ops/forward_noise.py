"""The forward process and the loss against it: validation, choice of back end, autograd."""

import torch
from torch import Tensor

from .. import dispatch
from .layout import (
    at_least_4d,
    check_tensors,
    dense,
    is_whole,
    refuse_double_backward,
    scalar,
    second_derivative,
)

LOSSES = ("l1", "l2", "huber")
REDUCTIONS = ("none", "mean")


def forward_noise(
    x0: Tensor,  # (N, C, *S) float32, bfloat16, float16, or uint8, which means x0 / 127.5 − 1
    coeffs: Tensor,  # (T, 4) float32, on x0.device
    t: Tensor,  # (N,) int64
    *,
    key: int | Tensor | None = None,  # seed of the noise contract; a tensor: one int64 on x0.device
    step: int | Tensor = 0,  # the draw's number: the training step; a tensor as for key
    noise: Tensor | None = None,  # (N, C, *S) in place of a key
    offset: int = 0,  # number of x0's first element in the whole batch's noise
    dtype: torch.dtype | None = None,  # of x_t; None: x0.dtype, float32 for uint8
    impl: str = "auto",
) -> Tensor:
    """x_t = a·x0 + b·ε with (a, b, ·, ·) = coeffs[t], the rows of Diffusion.forward_rows().

    ε is `noise`, or normal number offset + i of (key, step, stream 2) for element i of the
    contiguous order; exactly one of key and noise must be given. Float32 inside; returns `dtype`
    in the layout of x0. A t outside the table gives NaN. Raises ValueError for arguments that do
    not fit, BackendError (RuntimeError) when an explicit impl cannot serve; only eager has a
    gradient to x0. Source: Ho et al. 2020, eq. 4.
    """
    seed, step, noise = _check(x0, coeffs, t, key, step, noise, offset)
    dtype = dtype or (torch.float32 if x0.dtype == torch.uint8 else x0.dtype)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"forward_noise: dtype is {dtype}, expected float32, bfloat16 or float16")
    shape = x0.shape
    args = (coeffs, t, seed, step, noise, offset)
    impl = "eager" if x0.numel() == 0 else impl
    backend = dispatch.pick("forward_noise", impl, x0, *args)
    if backend == "eager":
        return dispatch.module("forward_noise", backend).forward_noise(x0, *args, dtype)
    x0, noise = dense(at_least_4d(x0)), _dense(noise)
    x_t = torch.empty_like(x0, dtype=dtype)
    fwd = dispatch.function("forward_noise", "fwd", backend)
    fwd(x_t, x0, coeffs, t, seed, step, noise, offset)
    return x_t.view(shape) if x_t.shape != shape else x_t


def forward_noise_loss(
    model_out: Tensor,  # (N, C, *S) the network's output for x_t, any floating dtype
    x0: Tensor,  # as for forward_noise, like coeffs, t, key, step, noise and offset
    coeffs: Tensor,
    t: Tensor,
    *,
    loss: str = "l2",
    weights: Tensor | None = None,  # (N,) float32
    key: int | Tensor | None = None,
    step: int | Tensor = 0,
    noise: Tensor | None = None,
    offset: int = 0,
    reduction: str = "none",
    impl: str = "auto",
) -> Tensor:
    """(N,) float32: weights · mean ℓ(model_out − target), target = p·x0 + q·ε; "mean": their mean.

    (·, ·, p, q) = coeffs[t]; ε is drawn again from its key instead of being kept: forward and, on a
    GPU or in float16, backward; else the forward leaves the gradient, rounded to model_out's dtype,
    in place of model_out. ℓ(r) is |r| for "l1", r² for "l2", and for "huber" r²/2 where
    |r| < 1, |r| − ½ beyond; its mean is over C and S, added in a fixed order. Differentiable in
    model_out; only eager has gradients to weights, noise and x0. Raises as forward_noise. Source:
    Ho et al. 2020, eq. 14.
    """
    if loss not in LOSSES or reduction not in REDUCTIONS:
        name, value, known = ("loss", loss, LOSSES)
        if loss in LOSSES:
            name, value, known = ("reduction", reduction, REDUCTIONS)
        raise ValueError(
            f"forward_noise_loss: {name} is {value!r}, expected one of {', '.join(known)}"
        )
    if not isinstance(model_out, Tensor):
        check_tensors("forward_noise_loss", model_out=model_out)
    seed, step, noise = _check(x0, coeffs, t, key, step, noise, offset)
    if model_out.shape != x0.shape or model_out.device != x0.device:
        raise ValueError(
            f"forward_noise_loss: model_out is {tuple(model_out.shape)} on {model_out.device}, "
            f"expected {tuple(x0.shape)} on {x0.device} like x0"
        )
    if weights is not None and (weights.shape != t.shape or weights.dtype != torch.float32):
        raise ValueError(
            f"forward_noise_loss: weights is {tuple(weights.shape)} {weights.dtype}, "
            f"expected {tuple(t.shape)} float32"
        )
    args = (x0, coeffs, t, weights, seed, step, noise, offset, LOSSES.index(loss))
    impl = "eager" if x0.numel() == 0 else impl
    wanted = torch.is_grad_enabled() and model_out.requires_grad
    backend = dispatch.pick(
        "forward_noise", impl, model_out.detach() if wanted else model_out, *args
    )
    module = dispatch.module("forward_noise", backend)
    if backend == "eager":
        losses = module.forward_noise_loss(model_out, *args)
        return losses.mean() if reduction == "mean" else losses
    model_out, x0 = dense(at_least_4d(model_out)), dense(at_least_4d(x0))
    args = (x0, *args[1:6], _dense(noise), *args[7:], reduction)
    if not wanted:
        losses = dispatch.function("forward_noise", "loss_fwd", backend)(model_out, *args[:-1])
        return losses.mean() if reduction == "mean" else losses
    # The noise of 25,000 elements takes 18 µs of one core: there, a kept gradient is the cheaper
    # one. Not in float16, where a gradient that dloss has not scaled yet can underflow.
    kept = hasattr(module, "forward_noise_loss_grad_fwd") and model_out.dtype != torch.float16
    if kept and x0.is_cpu:
        return _ForwardNoiseLossGrad.apply(model_out, backend, args)
    return _ForwardNoiseLoss.apply(model_out, backend, args)


class _ForwardNoiseLoss(torch.autograd.Function):
    """ε is drawn again in the backward: nothing is kept but the inputs."""

    @staticmethod
    def forward(ctx, model_out, backend, args):
        *args, reduction = args
        ctx.save_for_backward(model_out, *args[:7])
        ctx.backend, ctx.args = backend, args[7:]
        losses = dispatch.function("forward_noise", "loss_fwd", backend)(model_out, *args)
        return losses.mean() if reduction == "mean" else losses

    @staticmethod
    def backward(ctx, dloss):
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint gives them no second time
        refuse_double_backward("forward_noise_loss", ctx.backend, saved)
        bwd = dispatch.function("forward_noise", "loss_bwd", ctx.backend)
        if dloss.dim() == 0:
            n = saved[0].shape[0]
            dloss = (dloss / n).expand(n)
        return bwd(dloss.contiguous(), *saved, *ctx.args), None, None


class _ForwardNoiseLossGrad(torch.autograd.Function):
    """The forward leaves the gradient of the loss: dmodel_out[n] = dloss[n] · grad[n]."""

    @staticmethod
    def forward(ctx, model_out, backend, args):
        fwd = dispatch.function("forward_noise", "loss_grad_fwd", backend)
        loss, grad = fwd(model_out, *args[:-1], args[-1] == "mean")
        ctx.save_for_backward(grad)
        ctx.backend = backend
        return loss

    @staticmethod
    def backward(ctx, dloss):
        if torch.is_grad_enabled():  # the gradient does not know that it depends on model_out
            raise second_derivative("forward_noise_loss", ctx.backend)
        (grad,) = ctx.saved_tensors
        # loss.backward() itself: a pass saved, a sixth of the loss's time at 128 x 3 x 32 x 32. Not
        # where the graph stays: who changed the result would change what the next pass finds.
        if not torch.compiler.is_compiling() and not _keeps_graph() and _is_one(dloss):
            return grad, None, None
        dloss = dloss.reshape(-1, *[1] * (grad.dim() - 1))  # not a scalar: it must widen
        return (grad * dloss).to(grad.dtype), None, None


# Of torch's own check of donated buffers; a torch without it gets the pass.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _is_one(dloss: Tensor) -> bool:
    if type(dloss) is not Tensor or dloss.dim():
        return False
    try:
        return dloss.item() == 1
    except RuntimeError:  # under vmap it has no one value
        return False


def arguments(
    x0, coeffs, t, *, key=None, step=0, noise=None, offset=0, dtype=None
):  # what explain hands to a back end's refusals
    seed, step, noise = _check(x0, coeffs, t, key, step, noise, offset)
    return x0, coeffs, t, seed, step, noise, offset


def _dense(noise: Tensor | None) -> Tensor | None:
    return None if noise is None else dense(at_least_4d(noise))


def _check(x0, coeffs, t, key, step, noise, offset):
    """→ seed, step, noise as the back ends take them."""
    if not (isinstance(x0, Tensor) and isinstance(coeffs, Tensor) and isinstance(t, Tensor)):
        check_tensors("forward_noise", x0=x0, coeffs=coeffs, t=t)
    if x0.dim() < 2 or not (x0.is_floating_point() or x0.dtype == torch.uint8):
        raise ValueError(
            f"forward_noise: x0 is {tuple(x0.shape)} {x0.dtype}, "
            "expected (N, C, *S), floating point or uint8"
        )
    if coeffs.dim() != 2 or coeffs.shape[1] != 4 or coeffs.dtype != torch.float32:
        raise ValueError(
            f"forward_noise: coeffs is {tuple(coeffs.shape)} {coeffs.dtype}, "
            "expected (T, 4) float32: Diffusion.forward_rows().float()"
        )
    if t.shape != x0.shape[:1] or t.dtype != torch.int64:
        raise ValueError(
            f"forward_noise: t is {tuple(t.shape)} {t.dtype}, expected ({x0.shape[0]},) int64"
        )
    if not coeffs.device == t.device == x0.device or not coeffs.is_contiguous():
        raise ValueError(f"forward_noise: coeffs and t must be contiguous and on {x0.device}")
    if (key is None) == (noise is None):
        raise ValueError("forward_noise: give exactly one of key (a seed) and noise (a tensor)")
    if not is_whole(offset) or not 0 <= offset < 2**63:
        raise ValueError(f"forward_noise: offset is {offset!r}, expected 0 <= offset < 2^63")
    if noise is not None:
        check_tensors("forward_noise", noise=noise)
        if noise.shape != x0.shape or noise.device != x0.device or not noise.is_floating_point():
            raise ValueError(
                f"forward_noise: noise is {tuple(noise.shape)} {noise.dtype} on {noise.device}, "
                f"expected {tuple(x0.shape)}, floating point, on {x0.device} like x0"
            )
        return None, None, noise.float()
    seed = scalar("key", key, x0.device, -(2**63), 2**63)
    return seed, scalar("step", step, x0.device, 0, 2**32), None

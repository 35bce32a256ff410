"""The `eager` back end: what a user would write without us. PyTorch differentiates it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import philox


def refusals(op: str, *args) -> list[str]:
    return []


def group_norm_silu(x, weight, bias, add, scale, shift, num_groups, eps, silu) -> Tensor:
    """group_norm, the conditioning, silu: each in x.dtype, as in a U-Net of that dtype."""

    def cast(t: Tensor | None, *shape: int) -> Tensor | None:
        return None if t is None else t.to(x.dtype).reshape(*shape, *[1] * (x.dim() - 2))

    n, c = x.shape[:2]
    if add is not None:
        x = x + cast(add, n, c)
    as_x = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    # torch.group_norm, not F.group_norm: that one refuses C/G = S = 1.
    h = torch.group_norm(x, num_groups, *as_x, eps, torch.backends.cudnn.enabled)
    if scale is not None:
        h = h * (1 + cast(scale, n, c))
    if shift is not None:
        h = h + cast(shift, n, c)
    return (F.silu(h) if silu else h).to(x.dtype)  # CUDA's autocast computes norms in float32


def attention(q, k, v, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def noise_fwd(out: Tensor, seed: Tensor, step: Tensor, stream: int, offset: int) -> None:
    z = philox.normal_reference(seed, step, stream, out.numel(), offset, out.device)
    out.copy_(z.reshape(out.shape))


def reverse_step_fwd(x, model_out, coeffs, step, seed, noise, clip: float, offset: int) -> Tensor:
    """The sequence of elementwise kernels that samplers usually launch, in float32."""
    # index_select, not coeffs[step]: that reads the step back from the device.
    n_steps = coeffs.shape[0]
    inside = (step >= 0) & (step < n_steps)
    row = torch.where(
        inside, coeffs.index_select(0, step.clamp(0, n_steps - 1).reshape(1))[0], math.nan
    )
    a, b, c, d, s = row.unbind()
    state = x.float()
    x0 = a * state + b * model_out.float()
    if clip != math.inf:
        x0 = x0.clamp(-clip, clip)
    if noise is None:
        noise = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        noise_fwd(noise, seed, step, 0, offset)
    # A row without noise must not turn an infinite z into NaN, nor a NaN row into a number.
    z = torch.where(s == 0, 0.0, s * noise.float())
    return (c * x0 + d * state + z).to(x.dtype)

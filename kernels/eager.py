"""The `eager` back end: what a user would write without us. PyTorch differentiates it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import philox


def refusals(op: str, *args) -> list[str]:
    return []


def group_norm_silu(x, x2, weight, bias, add, scale, shift, num_groups, eps, silu) -> Tensor:
    """cat, group_norm, the conditioning, silu: each in x.dtype, as in a U-Net of that dtype."""
    x = x if x2 is None else torch.cat((x, x2), dim=1)

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


def rms_norm_silu(x, weight, scale, shift, eps, silu) -> Tensor:
    """normalize, the gain, the conditioning, silu: each in x.dtype.

    In float16, as there, an eps below 6e-8 is 0 and a zero vector's result NaN.
    """

    def cast(t: Tensor, *shape: int) -> Tensor:
        return t.to(x.dtype).reshape(*shape, *[1] * (x.dim() - 2))

    n, c = x.shape[:2]
    h = F.normalize(x, dim=1, eps=eps)
    if weight is not None:
        h = h * cast(weight, 1, c)
    h = h * math.sqrt(c)
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


def _row(coeffs: Tensor, step: Tensor) -> Tensor:  # (5 or 10,)
    # index_select, not coeffs[step]: that reads the step back from the device.
    n_steps = coeffs.shape[0]
    inside = (step >= 0) & (step < n_steps)
    return torch.where(
        inside, coeffs.index_select(0, step.clamp(0, n_steps - 1).reshape(1))[0], math.nan
    )


def _step_noise(x, seed, step, noise, offset: int) -> Tensor:
    if noise is not None:
        return noise.float()
    noise = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    noise_fwd(noise, seed, step, 0, offset)
    return noise


def reverse_step_fwd(x, model_out, coeffs, step, seed, noise, clip: float, offset: int) -> Tensor:
    """The sequence of elementwise kernels that samplers usually launch, in float32."""
    a, b, c, d, s = _row(coeffs, step)[:5].unbind()
    state = x.float()
    x0 = a * state + b * model_out.float()
    if clip != math.inf:
        x0 = x0.clamp(-clip, clip)
    # A row without noise must not turn an infinite z into NaN, nor a NaN row into a number.
    z = torch.where(s == 0, 0.0, s * _step_noise(x, seed, step, noise, offset))
    return (c * x0 + d * state + z).to(x.dtype)


def reverse_step_general(
    x, model_out, uncond, grad, x0_prev, coeffs, step, seed, noise, guidance, clip, quantile,
    largest, offset,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x_next and x0 in float32. quantile: of the dynamic threshold; largest: its upper bound; or
    None."""
    row, c = _row(coeffs, step), x.shape[1]
    a, b, from_x0, from_x, s, e, g0, g1, lo, hi = F.pad(row, (0, 10 - len(row))).unbind()
    state, out, v = x.float(), model_out[:, :c].float(), model_out[:, c:].float()
    if uncond is not None:
        out = torch.lerp(uncond[:, :c].float(), out, guidance)
    x0 = a * state + b * out
    if grad is not None:
        grad = grad.float()
        x0 = x0 + g0 * grad
    if quantile is not None:
        bound = _quantile(x0.abs().flatten(1), quantile).clamp(min=1, max=largest)
        bound = bound.reshape(-1, *[1] * (x.dim() - 1))
        x0 = x0.clamp(-bound, bound) / bound
    elif clip != math.inf:
        x0 = x0.clamp(-clip, clip)
    log_variance = torch.zeros_like(state)
    if v.shape[1]:
        log_variance = torch.where(lo == hi, lo, lo + (hi - lo) * (v + 1) / 2)
    x_next = from_x0 * x0 + from_x * state
    if x0_prev is not None:  # what a zero multiplies may be anything
        x_next = x_next + torch.where(e == 0, 0.0, e * x0_prev.float())
    if grad is not None:
        x_next = x_next + g1 * log_variance.exp() * grad
    z = (0.5 * log_variance).exp() * _step_noise(x, seed, step, noise, offset)
    return x_next + torch.where(s == 0, 0.0, s * z), x0


def _quantile(values: Tensor, p: float) -> Tensor:
    """torch.quantile(values, p, 1), which takes 16 million values at most; NaN for infinity."""
    ordered = values.sort(1).values
    position = p * (values.shape[1] - 1)
    low = int(position)
    found = torch.lerp(
        ordered[:, low], ordered[:, min(low + 1, values.shape[1] - 1)], position - low
    )
    # An infinite bound would turn an overflow into a black picture.
    return torch.where(ordered[:, -1].isnan() | found.isinf(), math.nan, found)


def _rows(coeffs: Tensor, t: Tensor, dim: int) -> tuple[Tensor, ...]:
    """Columns of coeffs[t], shaped to broadcast over `dim` dimensions; NaN for a t outside."""
    inside = ((t >= 0) & (t < coeffs.shape[0]))[:, None]
    rows = torch.where(inside, coeffs[t.clamp(0, coeffs.shape[0] - 1)], math.nan)
    return rows.reshape(len(t), coeffs.shape[1], *[1] * (dim - 1)).unbind(1)


def _pictures(x0: Tensor) -> Tensor:
    return x0.float() / 127.5 - 1 if x0.dtype == torch.uint8 else x0.float()


def _training_noise(x0: Tensor, seed, step, noise, offset: int) -> Tensor:
    if noise is not None:
        return noise
    noise = torch.empty(x0.shape, dtype=torch.float32, device=x0.device)
    noise_fwd(noise, seed, step, 2, offset)
    return noise


def forward_noise(x0, coeffs, t, seed, step, noise, offset: int, dtype) -> Tensor:
    """The sequence that a training loop usually launches, in float32."""
    a, b, _, _ = _rows(coeffs, t, x0.dim())
    x_t = a * _pictures(x0) + b * _training_noise(x0, seed, step, noise, offset)
    return x_t.to(dtype)


def forward_noise_loss(
    model_out, x0, coeffs, t, weights, seed, step, noise, offset: int, loss: int
) -> Tensor:
    _, _, p, q = _rows(coeffs, t, x0.dim())
    target = p * _pictures(x0) + q * _training_noise(x0, seed, step, noise, offset)
    distance = (F.l1_loss, F.mse_loss, F.smooth_l1_loss)[loss]  # in the order of boundary.LOSSES
    mean = distance(model_out.float(), target, reduction="none").flatten(1).mean(1)
    return mean if weights is None else weights * mean

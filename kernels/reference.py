"""The truth: each op in plain PyTorch, spelled out as its equation. float64 judges the others."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(
    x: Tensor | tuple[Tensor, Tensor],  # (N, C, *S), or (N, Ca, *S) and (N, Cb, *S), Ca + Cb = C
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    num_groups: int,
    eps: float = 1e-5,
    *,
    add: Tensor | None = None,  # (N, C)
    scale: Tensor | None = None,  # (N, C)
    shift: Tensor | None = None,  # (N, C)
    silu: bool = True,
) -> Tensor:
    """y = act(((u − mean) / √(var + eps) · weight + bias) · (1 + scale) + shift), u = x + add.

    A pair (a, b) is its concatenation along the channels.
    Mean and biased variance over each group of C / num_groups channels and all of S
    (Wu & He 2018, eq. 1–3); SiLU v·σ(v); scale and shift: AdaGN (Dhariwal & Nichol 2021, §3.1).
    """
    x = x if isinstance(x, Tensor) else torch.cat(tuple(x), dim=1)
    n, c = x.shape[:2]
    per_channel = (n, c, *[1] * (x.dim() - 2))
    u = x if add is None else x + add.reshape(per_channel)
    grouped = u.reshape(n, num_groups, -1)
    mean = grouped.mean(-1, keepdim=True)
    centred = grouped - mean
    var = (centred * centred).mean(-1, keepdim=True)
    v = (centred / torch.sqrt(var + eps)).reshape(x.shape)
    if weight is not None:
        v = v * weight.reshape(1, c, *per_channel[2:])
    if bias is not None:
        v = v + bias.reshape(1, c, *per_channel[2:])
    if scale is not None:
        v = v * (1 + scale.reshape(per_channel))
    if shift is not None:
        v = v + shift.reshape(per_channel)
    return v * torch.sigmoid(v) if silu else v


def rms_norm_silu(
    x: Tensor,  # (N, C, *S)
    weight: Tensor | None,  # (C,)
    *,
    eps: float = 1e-12,
    scale: Tensor | None = None,  # (N, C)
    shift: Tensor | None = None,  # (N, C)
    silu: bool = True,
) -> Tensor:
    """y = act(x / max(|x|, eps) · √C · weight · (1 + scale) + shift), |x| = (Σ_c x²)^½ of a pixel.

    x / |x| · √C is x over its root mean square along the channels (Zhang & Sennrich 2019, eq. 4);
    where |x| < eps, eps is a constant of the derivative too, and that of |x| at 0 is 0.
    """
    n, c = x.shape[:2]
    per_channel = (n, c, *[1] * (x.dim() - 2))
    squares = (x * x).sum(1, keepdim=True)
    clamped = squares.detach().sqrt() < eps
    norm = torch.where(clamped, eps, torch.where(clamped, 1.0, squares).sqrt())
    v = x / norm * math.sqrt(c)
    if weight is not None:
        v = v * weight.reshape(1, c, *per_channel[2:])
    if scale is not None:
        v = v * (1 + scale.reshape(per_channel))
    if shift is not None:
        v = v + shift.reshape(per_channel)
    return v * torch.sigmoid(v) if silu else v


def attention(
    q: Tensor,  # (N, heads, S, D)
    k: Tensor,  # (N, heads, Sk, D)
    v: Tensor,  # (N, heads, Sk, Dv)
    scale: float | None = None,
) -> Tensor:
    """out = softmax(q kᵀ · scale) v, scale 1/√D unless given (Vaswani et al. 2017, eq. 1)."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1) @ v


def reverse_step(
    x: Tensor,  # (N, C, *S)
    model_out: Tensor,  # (N, C, *S)
    coeffs: Tensor,  # (n_steps, 5 or 10)
    step: int,
    noise: Tensor | None,  # (N, C, *S); None: zero
    clip: float | None = 1.0,
) -> Tensor:
    """x0 = clip(a·x + b·out); x' = c·x0 + d·x + s·z with (a, b, c, d, s, …) = coeffs[step]."""
    return reverse_step_general(x, model_out, coeffs, step, noise, clip)[0]


def reverse_step_general(
    x: Tensor,  # (N, C, *S)
    model_out: Tensor,  # (N, C, *S); (N, 2·C, *S) with a learned variance
    coeffs: Tensor,  # (n_steps, 5 or 10)
    step: int,
    noise: Tensor | None,  # (N, C, *S); None: zero
    clip: float | None = 1.0,
    *,
    uncond: Tensor | None = None,  # like model_out
    guidance: float = 1.0,
    grad: Tensor | None = None,  # (N, C, *S)
    x0_prev: Tensor | None = None,  # (N, C, *S)
    dynamic_threshold: float | None = None,
    dynamic_threshold_max: float | None = None,
) -> tuple[Tensor, Tensor]:
    """x_next, x0 with (a, b, c, d, s, e, g0, g1, lo, hi) = coeffs[step]; five columns: the rest 0.

    out = uncond + w·(model_out − uncond) (Ho & Salimans 2022, eq. 6, with 1 + their w)
    x0 = bound(a·x + b·out + g0·∇), ∇ = grad; bound: clip, or with a dynamic threshold p
         clip(x0, ±m)/m, m = max(1, quantile p of |x0| in the sample), NaN where that is infinite
         (Saharia et al. 2022, §2.3), and at most dynamic_threshold_max
    σ² = exp(lo + (hi − lo)·(v + 1)/2), v the second half of model_out's channels
         (Nichol & Dhariwal 2021, eq. 15), or 1
    x_next = c·x0 + d·x + e·x0_prev + g1·σ²·∇ + s·σ·z (Dhariwal & Nichol 2021, alg. 1 and 2, put
             s·σ²·∇ here and √(1−ᾱ)·∇ into the predicted noise)
    """
    a, b, c, d, s, e, g0, g1, lo, hi = F.pad(coeffs[step], (0, 10 - coeffs.shape[1])).unbind()
    channels, sigma = x.shape[1], torch.ones_like(x)
    out, v = model_out[:, :channels], model_out[:, channels:]
    if v.shape[1]:
        sigma = torch.exp((lo + (hi - lo) * (v + 1) / 2) / 2)
    if uncond is not None:
        out = uncond[:, :channels] + guidance * (out - uncond[:, :channels])
    x0 = a * x + b * out
    if grad is not None:
        x0 = x0 + g0 * grad
    if dynamic_threshold is not None:
        m = torch.quantile(x0.abs().flatten(1), dynamic_threshold, dim=1).clamp(min=1)
        m = torch.where(m.isinf(), math.nan, m).clamp(max=dynamic_threshold_max or math.inf)
        m = m.reshape(-1, *[1] * (x.dim() - 1))
        x0 = x0.clamp(-m, m) / m
    elif clip is not None and clip != math.inf:
        x0 = x0.clamp(-clip, clip)
    x_next = c * x0 + d * x
    if x0_prev is not None:
        x_next = x_next + e * x0_prev
    if grad is not None:
        x_next = x_next + g1 * sigma**2 * grad
    return x_next if noise is None else x_next + s * sigma * noise, x0


def forward_noise(
    x0: Tensor,  # (N, C, *S); uint8 means x0 / 127.5 − 1
    coeffs: Tensor,  # (T, 4)
    t: Tensor,  # (N,) int64
    noise: Tensor,  # (N, C, *S)
) -> tuple[Tensor, Tensor]:
    """x_t = a·x0 + b·ε, target = p·x0 + q·ε, (a, b, p, q) = coeffs[t] (Ho et al. 2020, eq. 4)."""
    a, b, p, q = (row.reshape(-1, *[1] * (x0.dim() - 1)) for row in coeffs[t].unbind(1))
    x0 = x0.to(coeffs.dtype) / 127.5 - 1 if x0.dtype == torch.uint8 else x0
    return a * x0 + b * noise, p * x0 + q * noise


def forward_noise_loss(
    model_out: Tensor,  # (N, C, *S)
    target: Tensor,  # (N, C, *S)
    loss: str,
    weights: Tensor | None = None,  # (N,)
) -> Tensor:
    """(N,): weights · mean ℓ(r), r = model_out − target; huber: r²/2 for |r| < 1, else |r| − ½."""
    r = model_out - target
    if loss == "l1":
        r = r.abs()
    elif loss == "l2":
        r = r * r
    else:
        r = torch.where(r.abs() < 1, 0.5 * r * r, r.abs() - 0.5)
    mean = r.flatten(1).mean(1)
    return mean if weights is None else weights * mean

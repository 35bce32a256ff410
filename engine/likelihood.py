"""Log-likelihood of a diffusion model: the Gaussian KL, the 8-bit decoder, and bits/dim.

−log₂ p(x_0) per dimension ≤ L_T + Σ_{t≥1} L_t + L_0      (Ho et al. 2020, eq. 5)
L_T = KL(q(x_T|x_0) ‖ N(0, I)),  L_t = KL(q(x_{t−1}|x_t, x_0) ‖ p(x_{t−1}|x_t)),
L_0 = −log p(x_0|x_1), an 8-bit pixel being the bin of width 2/255 around it (eq. 13)
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import ops

if TYPE_CHECKING:
    from .diffusion import Diffusion

LIKELIHOOD_NOISE = 8  # stream of the noise contract: never the draws of training or sampling


class BitsPerDim(NamedTuple):
    """What Diffusion.bits_per_dim returns; N images, column t of T belongs to step t.

    total, prior and vb are bits/dim, total = prior + Σ_t vb; vb[:, 0] is the decoder's term L_0.
    mse is the squared error of ε̂, re-derived from the clipped x̂_0, x0_mse that of x̂_0; means over
    the image.
    """

    total: Tensor  # (N,)
    prior: Tensor  # (N,)
    vb: Tensor  # (N, T)
    mse: Tensor  # (N, T)
    x0_mse: Tensor  # (N, T)


def gaussian_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(μ_1, σ_1²) ‖ N(μ_2, σ_2²)) per element, in nats; the arguments broadcast.

    = ½ (δ + e^−δ − 1 + (μ_1 − μ_2)²/σ_2²) with δ = log σ_2² − log σ_1². e^−δ − 1 is expm1: for
    variances as near as β̃_t and β_t, float32 would otherwise lose δ²/2 ≈ 1e-8 in the 1.
    """
    delta = logvar2 - logvar1
    return 0.5 * (delta + torch.expm1(-delta) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def gaussian_cdf(x: Tensor) -> Tensor:
    """Φ(x) ≈ ½ (1 + tanh(√(2/π) (x + 0.044715 x³))), wrong by at most 2e-4 (Page 1977).

    The approximation that the published bits/dim were computed with.
    """
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log ∫ N(y; mean, σ²) dy over the 8-bit bin of x, per element, in nats.

    Ho et al. 2020, eq. 13. x in [−1, 1], of the grid k/127.5 − 1; its bin reaches 1/255 to either
    side, those of −1 and 1 to infinity. log_scale = log σ. A probability below 1e-12 counts as
    1e-12, without gradient.
    """
    centred, inverse = x - mean, torch.exp(-log_scale)
    above = gaussian_cdf(inverse * (centred + 1 / 255))
    below = gaussian_cdf(inverse * (centred - 1 / 255))
    inside = torch.where(x > 0.999, 1 - below, above - below)
    return torch.where(x < -0.999, above, inside).clamp(min=1e-12).log()


def bound_term(
    x0: Tensor,  # (N, *)
    x0_hat: Tensor,  # (N, *) predicted
    t: Tensor,  # (N,)
    unit: Tensor,  # √(SNR_{t−1} − SNR_t)
    log_small: Tensor,  # log β̃_t; log β̃_1 at t = 0
    delta: Tensor,  # log σ_t² − log_small
) -> Tensor:
    """L_t → (N,) bits/dim; what Diffusion.vlb_terms says, on its tables."""
    kl = gaussian_kl(unit * x0, torch.zeros_like(unit), unit * x0_hat, delta)
    log_scale = 0.5 * (log_small + delta)
    decoder = discretized_gaussian_log_likelihood(x0, x0_hat, log_scale)
    first = (t == 0).reshape(-1, *[1] * (x0.dim() - 1))
    return torch.where(first, -decoder, kl).flatten(1).mean(1) / math.log(2)


def bits_per_dim(
    diffusion: "Diffusion",
    model: Callable,
    x0: Tensor,
    *,
    y: Tensor | None,
    clip: bool,
    seed: int,
    noise: Tensor | None,
    offset: int,
    progress: bool,
) -> BitsPerDim:
    """Diffusion.bits_per_dim, which says what the arguments are."""
    x0, T = _images(x0), diffusion.T
    if noise is not None and noise.shape != (T, *x0.shape):
        raise ValueError(
            f"noise is {tuple(noise.shape)}, expected {(T, *x0.shape)}: a draw for every step"
        )
    n, first = len(x0), offset * x0[:1].numel()
    vb, mse, x0_mse = (x0.new_empty(n, T) for _ in range(3))
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        with torch.inference_mode():
            for i in _progress(range(T), progress):
                t = torch.full((n,), i, device=x0.device)
                if noise is None:
                    z = ops.noise(
                        seed, i, LIKELIHOOD_NOISE, x0.shape, device=x0.device, offset=first
                    )
                else:
                    z = noise[i].to(x0.device)
                x_t = diffusion.q_sample(x0, t, z.to(x0.dtype))
                out = diffusion.call(model, x_t, t, y)
                vb[:, i], x0_mse[:, i] = diffusion.vlb_terms(x0, x_t, t, out, clip=clip)
    finally:
        if was_training:
            model.train()
    snr = (diffusion.alpha_bar / (1 - diffusion.alpha_bar)).to(x0)
    # ε̂ − ε = (√ᾱ/√(1−ᾱ)) (x_0 − x̂_0), since both pairs make up the same x_t
    torch.mul(x0_mse, snr, out=mse)
    prior = prior_bits_per_dim(diffusion.alpha_bar[-1].item(), x0)
    total = prior + vb.double().sum(1).to(prior)
    return BitsPerDim(total, prior, vb, mse, x0_mse)


def prior_bits_per_dim(alpha_bar: float, x0: Tensor) -> Tensor:
    """L_T = KL(N(√ᾱ_T x_0, 1 − ᾱ_T) ‖ N(0, 1)) → (N,) bits/dim.

    = ½ (ᾱ x_0² − ᾱ − log(1 − ᾱ)); the constant in float64, in which its ᾱ²/2 survives.
    """
    constant = -alpha_bar - math.log1p(-alpha_bar)
    power = (x0**2).flatten(1).mean(1)
    return 0.5 * (alpha_bar * power + constant) / math.log(2)


def _images(x0: Tensor) -> Tensor:
    """In [−1, 1], float32 or float64."""
    if not isinstance(x0, Tensor) or x0.dim() < 2 or x0.is_complex():
        found = f"{tuple(x0.shape)} {x0.dtype}" if isinstance(x0, Tensor) else type(x0).__name__
        raise ValueError(f"x0 is {found}, expected (N, C, H, W): images in [−1, 1], or uint8")
    if x0.dtype == torch.uint8:
        return x0.float() / 127.5 - 1
    x0 = x0.detach().to(torch.promote_types(x0.dtype, torch.float32))
    if x0.numel() and not x0.abs().max().item() <= 1 + 1e-6:
        raise ValueError(
            f"x0 reaches from {x0.min().item():.4g} to {x0.max().item():.4g}, expected [−1, 1]: "
            "the bits are those of 8-bit values k/127.5 − 1"
        )
    return x0


def _progress(steps: range, show: bool):
    if not show:
        return steps
    from tqdm import tqdm

    return tqdm(steps, desc="bits/dim", unit="step", leave=False)

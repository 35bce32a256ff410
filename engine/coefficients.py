"""Samplers as rows of coefficients: which noise levels are visited, and what each step multiplies.

Noise levels are told in two ways: ᾱ, and σ = √((1−ᾱ)/ᾱ), the noise beside an image of scale one,
x_σ = x_0 + σ ε. The state of every sampler is the network's own input x = √ᾱ x_σ = x_σ/√(σ²+1).
"""

import copy
import math
import re
from numbers import Real

import torch
from torch import Tensor

from . import schedules
from .diffusion import Diffusion

SAMPLERS = ("ddpm", "ddim", "dpm++", "heun")
SPACINGS = ("uniform", "karras")
RHO = 7.0  # Karras et al. 2022, table 1


def coefficients(
    diffusion: Diffusion,
    sampler: str = "ddpm",
    steps: int | str | None = None,
    eta: float = 0.0,
    *,
    spacing: str | None = None,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """→ the model's t (n,) descending, rows (n, 10) float64, one per network call; no noise in the
    last.

    x0 = bound(a·x + b·out + g0·grad), x' = c·x0 + d·x + e·x0_prev + g1·σ²·grad + s·z, row
    (a, b, c, d, s, e, g0, g1, lo, hi), as ops.reverse_step reads it.

    ddpm   posterior mean and σ_t z, over the kept steps (Ho et al. 2020, alg. 2; skipping as in
           Nichol & Dhariwal 2021, eq. 19). (lo, hi) = (log β̃_t, log β_t) and s = g1 = 1 where the
           network learned the variance, else zeros and g1 = σ_t² (Dhariwal & Nichol 2021, alg. 1)
    ddim   Song et al. 2021, eq. 12, with σ = η √((1−ᾱ')/(1−ᾱ)) √(1−ᾱ/ᾱ') and ε from the clipped
           x̂_0; g0 = (1−ᾱ)/√ᾱ takes √(1−ᾱ)·grad off ε (alg. 2 there), as for dpm++ and heun
    dpm++  DPM-Solver++(2M) (Lu et al. 2022, alg. 2): with λ = log(√ᾱ/√(1−ᾱ)), h = λ' − λ, r = h of
           the step before / h, D = (1 + 1/2r) x̂_0 − 1/2r x̂_0 of the step before,
           x' = √((1−ᾱ')/(1−ᾱ)) x − √ᾱ' (e^−h − 1) D; D = x̂_0 in the first step and the last
    heun   Karras et al. 2022, alg. 2: two rows a step, Euler's and the trapezoid's, and one in the
           last, 2·steps − 1 in all; see `_heun`. s_churn, s_min, s_max, s_noise are S_churn … there

    steps    how many noise levels, or text for schedules.respace; all T unless given
    spacing  "uniform": evenly spaced t, int64 (schedules.kept_steps); or "karras": evenly spaced
             σ^(1/7) between the σ of t = T−1 and of t = 0 (Karras et al. 2022, eq. 5), ending at 0
             like the other, with t float64, linear in log σ between the schedule's own. "karras"
             for heun unless given, "uniform" for the others
    Raises ValueError for an unknown sampler or spacing, a step count outside 1 … T, eta outside
    [0, 1], or a churn that is no number.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    if not isinstance(eta, Real) or not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta!r}, expected 0 (deterministic) … 1 (as noisy as ddpm)")
    if eta and sampler != "ddim":
        raise ValueError(
            f"eta is {eta}, but {sampler} has none: use sampler='ddim', or leave eta at 0"
        )
    churn = {"s_churn": s_churn, "s_min": s_min, "s_max": s_max, "s_noise": s_noise}
    for name, value in churn.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not value >= 0:
            raise ValueError(f"{name} is {value!r}, expected a number, 0 or more")
    if s_churn and sampler != "heun":
        raise ValueError(
            f"s_churn is {s_churn}, but {sampler} has none: use sampler='heun', or leave it at 0"
        )
    t, alpha_bar = _levels(diffusion, sampler, steps, spacing)
    if sampler == "heun":
        return _heun(diffusion, t, alpha_bar, **churn)
    alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    make = {"ddpm": _ddpm, "ddim": _ddim, "dpm++": _dpm_solver}[sampler]
    columns = make(diffusion, alpha_bar, alpha_bar_prev, eta)
    columns["s"] = torch.where(torch.arange(len(t)) == 0, 0.0, columns["s"])
    return t.flip(0), _rows(diffusion, alpha_bar, **columns).flip(0)


def time_of(diffusion: Diffusion, sigma: Tensor) -> Tensor:
    """The model's t (*) float64 at noise σ (*), linear in log σ between the process's own steps.

    A σ beyond those gives the first t or the last.
    """
    steps = diffusion.timesteps.double()
    if diffusion.T == 1:
        return steps.expand(sigma.shape)
    known, sigma = _sigma(diffusion.alpha_bar).log(), sigma.log()
    above = torch.searchsorted(known, sigma).clamp(1, diffusion.T - 1)
    share = (sigma - known[above - 1]) / (known[above] - known[above - 1])
    return torch.lerp(steps[above - 1], steps[above], share.clamp(0, 1))


def _sigma(alpha_bar: Tensor) -> Tensor:
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def asked_steps(text: str | None, sampler: str, spacing: str | None, T: int) -> int | str:
    """What a command's --steps asks for: a number, text for schedules.respace, or, of None, the
    sampler's usual number. Raises ValueError, one sentence."""
    if text is None:
        return min({"ddim": 50, "dpm++": 20, "heun": 18}.get(sampler, T), T)
    steps = int(text) if re.fullmatch(r"[+-]?\d{1,18}", text.strip()) else text
    if isinstance(steps, int) and steps < 1:
        raise ValueError(f"--steps must be at least 1, not {steps}")
    if isinstance(steps, int) and steps > T:
        raise ValueError(f"--steps {steps} is more than the {T} that the model was trained with")
    if isinstance(steps, str) and (spacing or _usual_spacing(sampler)) == "karras":
        raise ValueError(f"--steps {text!r}: karras spacing, heun's own, takes a number of steps")
    try:
        schedules.kept_steps(T, steps)
    except ValueError as error:
        raise ValueError(f"--steps {text!r}: {error}") from None
    return steps


def _usual_spacing(sampler: str) -> str:
    return "karras" if sampler == "heun" else "uniform"


def _levels(
    diffusion: Diffusion, sampler: str, steps: int | str | None, spacing: str | None
) -> tuple[Tensor, Tensor]:
    """t (n,) and ᾱ (n,) float64 of the noise levels, ascending in noise; the image itself is not
    among them."""
    spacing = _usual_spacing(sampler) if spacing is None else spacing
    if spacing not in SPACINGS:
        raise ValueError(f"spacing is {spacing!r}, expected one of {', '.join(SPACINGS)}, or None")
    if spacing == "karras" and isinstance(steps, str):
        raise ValueError(
            f"steps is {steps!r}, but karras spacing takes a number: it is spread evenly over "
            "σ^(1/7); sections of the T and ddimN go with spacing 'uniform'"
        )
    t = torch.tensor(schedules.kept_steps(diffusion.T, diffusion.T if steps is None else steps))
    if spacing == "uniform":
        return diffusion.model_steps(t), diffusion.alpha_bar[t]
    ends = _sigma(diffusion.alpha_bar[[-1, 0]]) ** (1 / RHO)
    u = torch.linspace(0, 1, len(t), dtype=torch.float64)
    sigma = ((1 - u) * ends[0] + u * ends[1]).flip(0) ** RHO
    return time_of(diffusion, sigma), 1 / (1 + sigma**2)


def _rows(diffusion: Diffusion, alpha_bar: Tensor, **columns: Tensor) -> Tensor:
    """(n, 10): a, b for these noise levels, and the columns given by name; the rest is 0."""
    here = copy.copy(diffusion)
    here.alpha_bar = alpha_bar
    columns["a"], columns["b"] = here.x0_rows()
    zero = torch.zeros_like(alpha_bar)
    names = ("a", "b", "c", "d", "s", "e", "g0", "g1", "lo", "hi")
    return torch.stack([columns.get(name, zero) for name in names], dim=1)


def _ddpm(diffusion: Diffusion, alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float) -> dict:
    c, d, variance = schedules.posterior_rows(alpha_bar, alpha_bar_prev, diffusion.variance)
    if diffusion.variance != "learned_range":
        return {"c": c, "d": d, "s": variance.sqrt(), "g1": variance}
    lo, hi = schedules.log_variance_range(alpha_bar, alpha_bar_prev)
    one = torch.ones_like(c)
    return {"c": c, "d": d, "s": one, "g1": one, "lo": lo, "hi": hi}


def _ddim(diffusion: Diffusion, alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float) -> dict:
    ratio = (1 - alpha_bar_prev) / (1 - alpha_bar)
    s = eta * ratio.sqrt() * (1 - alpha_bar / alpha_bar_prev).sqrt()
    # √(1−ᾱ'−σ²)·ε with ε = (x_t − √ᾱ x̂_0)/√(1−ᾱ), sorted by x̂_0 and x_t
    # (with 1−ᾱ'−σ² = (1−ᾱ')/(1−ᾱ)·((1−η²)(1−ᾱ) + η² ᾱ (1−ᾱ')/ᾱ'), which loses no digits at η = 1)
    noisier = alpha_bar * (1 - alpha_bar_prev) / alpha_bar_prev
    direction = (ratio * ((1 - eta**2) * (1 - alpha_bar) + eta**2 * noisier)).sqrt()
    d = direction / (1 - alpha_bar).sqrt()
    c = alpha_bar_prev.sqrt() - d * alpha_bar.sqrt()
    return {"c": c, "d": d, "s": s, "g0": (1 - alpha_bar) / alpha_bar.sqrt()}


def _dpm_solver(
    diffusion: Diffusion, alpha_bar: Tensor, alpha_bar_prev: Tensor, eta: float
) -> dict:
    d = ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt()
    log_snr = 0.5 * (alpha_bar / (1 - alpha_bar)).log()
    h = torch.cat([torch.tensor([math.inf], dtype=torch.float64), -log_snr.diff()])
    weight = torch.zeros_like(h)  # 1/2r
    weight[1:-1] = h[1:-1] / (2 * h[2:])
    e = alpha_bar_prev.sqrt() * torch.expm1(-h) * weight
    c = -alpha_bar_prev.sqrt() * torch.expm1(-h) - e
    g0 = (1 - alpha_bar) / alpha_bar.sqrt()
    return {"c": c, "d": d, "s": torch.zeros_like(c), "e": e, "g0": g0}


def _heun(
    diffusion: Diffusion,
    t: Tensor,
    alpha_bar: Tensor,
    *,
    s_churn: float,
    s_min: float,
    s_max: float,
    s_noise: float,
) -> tuple[Tensor, Tensor]:
    """Karras et al. 2022, alg. 2, for x = √ᾱ x_σ: both of its stages fit the row.

    Euler, from σ to σ' (r = σ'/σ), D = x̂_0 at x_σ:    x_σ' = r x_σ + (1 − r) D
    trapezoid, with D' = x̂_0 at x_σ':  x_σ' + ½(σ/σ' − 1)(D' − D): of what Euler's row left, x_σ'
    and D, so that x_σ itself need not be kept; there is none to σ' = 0.

    The churn raises σ to (1 + γ)σ, γ = min(S_churn/steps, √2 − 1) where S_min <= σ <= S_max, by
    new noise: it ends the trapezoid's row. No noisier than the schedule: the first step has none.
    """
    t, sigma = t.flip(0), _sigma(alpha_bar.flip(0))
    gamma = min(s_churn / len(sigma), math.sqrt(2) - 1)
    gamma = gamma * ((sigma >= s_min) & (sigma <= s_max)).double()
    churned = torch.minimum(sigma * (1 + gamma), sigma[0])
    later = torch.cat([sigma[1:], torch.zeros(1, dtype=torch.float64)])

    def levels(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ᾱ, √ᾱ, and g0 = (1−ᾱ)/√ᾱ"""
        alpha_bar = 1 / (1 + sigma**2)
        return alpha_bar, alpha_bar.sqrt(), sigma**2 * alpha_bar.sqrt()

    rows = torch.zeros(2 * len(sigma) - 1, 10, dtype=torch.float64)
    (here, scale, g0), (_, scale_later, _) = levels(churned), levels(later)
    c, d = scale_later * (1 - later / churned), scale_later / scale * (later / churned)
    rows[0::2] = _rows(diffusion, here, c=c, d=d, g0=g0)

    here, scale, g0 = levels(sigma[1:])
    scale_churned = levels(churned[1:])[1]
    d = scale_churned / scale
    c = scale_churned * (churned[:-1] / sigma[1:] - 1) / 2
    s = s_noise * scale_churned * (churned**2 - sigma**2)[1:].clamp(min=0).sqrt()
    rows[1::2] = _rows(diffusion, here, c=c, d=d, s=s, e=-c, g0=g0)

    if s_churn:
        t = t.double()
    times = torch.zeros(len(rows), dtype=t.dtype)
    times[0::2] = time_of(diffusion, churned) if s_churn else t
    times[1::2] = t[1:]
    return times, rows

"""Noise schedules β_t in float64, t = 0 … T−1, and the steps that a shorter sampling run keeps."""

import math
from numbers import Integral

import torch
from torch import Tensor


def betas(name: str, T: int) -> Tensor:  # → (T,) float64
    """The noise schedule β_0 … β_{T−1}.

    linear            linspace(1e-4, 0.02)·1000/T, any T keeps ᾱ_T ≈ 4e-5 (Nichol & Dhariwal 2021)
    linear_unscaled   linspace(1e-4, 0.02) (Ho et al. 2020, §4): for T = 1000
    cosine            β = min(1 − f((t+1)/T)/f(t/T), 0.999), f(u) = cos²((u+0.008)/1.008·π/2)
                      (Nichol & Dhariwal 2021, eq. 17)
    quadratic         linspace(√1e-4, √0.02)²
    sigmoid           σ(linspace(−6, 6))·(0.02 − 1e-4) + 1e-4

    Raises ValueError for an unknown name, T < 1, or a β outside (0, 1).
    """
    if name not in NAMES:
        raise ValueError(f"unknown schedule {name!r}: choose one of {', '.join(NAMES)}")
    if not isinstance(T, Integral) or T < 1:
        raise ValueError(f"T is {T!r}, expected a whole number, at least one diffusion step")
    beta = _linspace_schedule(name, T) if name != "cosine" else _cosine(T)
    if not bool(((beta > 0) & (beta < 1)).all()):
        raise ValueError(
            f"schedule {name!r} at T={T} has a beta of {beta.max():.3g} outside (0, 1): "
            "use more steps (linear needs T > 20)"
        )
    return beta


NAMES = ("linear", "linear_unscaled", "cosine", "quadratic", "sigmoid")
_FIRST, _LAST = 1e-4, 0.02


def _linspace_schedule(name: str, T: int) -> Tensor:
    def linspace(first: float, last: float) -> Tensor:
        return torch.linspace(first, last, T, dtype=torch.float64)

    if name == "linear":
        return linspace(1000 / T * _FIRST, 1000 / T * _LAST)
    if name == "linear_unscaled":
        return linspace(_FIRST, _LAST)
    if name == "quadratic":
        return linspace(math.sqrt(_FIRST), math.sqrt(_LAST)) ** 2
    return torch.sigmoid(linspace(-6, 6)) * (_LAST - _FIRST) + _FIRST


def _cosine(T: int) -> Tensor:
    u = torch.arange(T + 1, dtype=torch.float64) / T
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def alpha_bar(beta: Tensor) -> Tensor:
    """ᾱ_t = Π_{s≤t} (1 − β_s) (Ho et al. 2020, eq. 4); float64: float32 loses 7e-7 at the end."""
    return torch.cumprod(1 - beta.double(), dim=0)


def kept_steps(T: int, steps: int) -> list[int]:
    """`steps` of 0 … T−1, ascending, first and last included, evenly spaced.

    Each is the rounding of an accumulated stride (T−1)/(steps−1), as in Nichol & Dhariwal 2021, §4;
    that differs from linspace at some counts (21, 23, 31 … for T = 1000).
    Raises ValueError unless 1 <= steps <= T.
    """
    if not isinstance(steps, Integral):
        raise ValueError(f"steps is {steps!r}, expected a whole number")
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} sampling steps do not fit a diffusion of T={T}: use 1 … {T}")
    if steps == 1:
        # One step must start from pure noise, so it is the last one.
        return [T - 1]
    stride, position, kept = (T - 1) / (steps - 1), 0.0, []
    for _ in range(steps):
        kept.append(round(position))
        position += stride
    return kept

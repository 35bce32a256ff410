"""Noise schedules β_t in float64, t = 0 … T−1, and the steps that a shorter sampling run keeps."""

import math
import re
from collections.abc import Sequence
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


def kept_steps(T: int, steps: int | str | Sequence[int]) -> list[int]:
    """The steps of 0 … T−1 that a sampling run keeps, ascending.

    A number: evenly spaced from the first to the last, which is respace(T, steps); 1 keeps the
    last, since a run starts from pure noise. A string or a list: respace(T, steps).
    Raises ValueError unless 1 <= steps <= T, and for strings and lists as respace.
    """
    if isinstance(steps, Sequence):
        return respace(T, steps)
    if not isinstance(steps, Integral):
        raise ValueError(f"steps is {steps!r}, expected a whole number")
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} sampling steps do not fit a diffusion of T={T}: use 1 … {T}")
    return [T - 1] if steps == 1 else _spread(T, steps)


def respace(T: int, sections: int | Sequence[int] | str) -> list[int]:
    """The steps of 0 … T−1 that a respaced diffusion keeps, ascending.

    int        as many of all T, from the first to the last
    list       0 … T−1 is cut into as many sections, the first T mod k one step longer; each keeps
               the steps that it is told to, from its first to its last (its first, if told 1)
    "10,15,20" the same list in writing
    "ddimN"    0, i, 2i, … with the smallest whole stride i < T that keeps exactly N
               (Song et al. 2021, app. D: the linear choice of τ)

    Those kept in a section of n steps are position 0, s, 2s, …, s = (n−1)/(kept−1), rounded (a half
    to even), with s added up in floating point: so the released models of Nichol & Dhariwal 2021
    (§4) do it, and numpy's linspace differs at some counts (21, 23, 31 … of T = 1000).
    Raises ValueError for a count below 1 or above its section's size, more sections than steps,
    text of another form, and an N that no stride gives.
    """
    if not isinstance(T, Integral) or T < 1:
        raise ValueError(f"T is {T!r}, expected a whole number, at least one diffusion step")
    if isinstance(sections, str) and (match := re.fullmatch(r"ddim(\d+)", sections.strip())):
        return _strided(T, int(match[1]))
    counts = _counts(sections)
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = T // len(counts) + (i < T % len(counts))
        if not 1 <= count <= size:
            raise ValueError(
                f"section {i + 1} of {len(counts)} has {size} of the T={T} steps, and {count} "
                f"shall be kept: give 1 … {size}"
                if size
                else f"{len(counts)} sections do not fit a diffusion of T={T}: give at most {T}"
            )
        kept += [start + step for step in _spread(size, count)]
        start += size
    return kept


def _counts(sections: int | Sequence[int] | str) -> list[int]:
    counts = sections
    if isinstance(sections, str):
        parts = [part.strip() for part in sections.split(",")]
        counts = [int(part) for part in parts] if all(map(str.isdecimal, parts)) else None
    elif isinstance(sections, Integral):
        counts = [sections]
    whole = isinstance(counts, Sequence) and all(isinstance(n, Integral) for n in counts)
    if not whole or not counts:
        raise ValueError(
            f"sections is {sections!r}, expected a number of steps, a list of such numbers, one "
            "per section, or text like '10,15,20' or 'ddim50'"
        )
    return [int(count) for count in counts]


def _spread(size: int, count: int) -> list[int]:
    stride, position, kept = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0, []
    for _ in range(count):
        kept.append(round(position))
        position += stride
    return kept


def _strided(T: int, count: int) -> list[int]:
    lengths = {}  # steps kept → smallest stride
    for stride in range(1, T):
        lengths.setdefault(len(range(0, T, stride)), stride)
    if count not in lengths:
        near = sorted(sorted(lengths, key=lambda n: abs(n - count))[:2])
        raise ValueError(
            f"'ddim{count}': no whole stride keeps exactly {count} of T={T} steps; the nearest "
            f"counts are {' and '.join(map(str, near)) or 'none'}"
        )
    return list(range(0, T, lengths[count]))


def posterior_rows(
    alpha_bar: Tensor, alpha_bar_prev: Tensor, variance: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of x_0 and x_t in the posterior mean, and the variance; (n,) float64 each.

    Written in ᾱ of this step and of the next lower kept one, so that it also serves runs that skip
    steps: α = ᾱ/ᾱ_prev, β = 1 − α.
    """
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    from_x0 = beta * alpha_bar_prev.sqrt() / (1 - alpha_bar)
    from_x = (1 - alpha_bar_prev) * alpha.sqrt() / (1 - alpha_bar)
    small = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
    if variance != "large":
        return from_x0, from_x, small
    large = beta.clone()
    if len(large) > 1:
        large[0] = small[1]
    return from_x0, from_x, large


def log_variance_range(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> tuple[Tensor, Tensor]:
    """log β̃ and log β (n,) float64, between which a learned variance lies; β̃_1 for β̃_0 = 0."""
    small, large = (
        posterior_rows(alpha_bar, alpha_bar_prev, name)[2] for name in ("small", "large")
    )
    small = torch.cat([large[:1], small[1:]])
    return small.log(), (1 - alpha_bar / alpha_bar_prev).log()

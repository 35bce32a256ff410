"""Samplers as rows of coefficients and one loop: a network call and a fused step, T times.

Every sampler here is linear in (x̂_0, x_t, z): x_next = c·x̂_0 + d·x_t + s·z with
x̂_0 = clip(a·x_t + b·model_out); a row (a, b, c, d, s) per step is all that the kernel needs.
"""

from collections.abc import Callable, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from . import ops, schedules
from .device import usable_device
from .diffusion import Diffusion, check_output, posterior_rows

SAMPLERS = ("ddpm", "ddim")


def coefficients(
    diffusion: Diffusion, sampler: str = "ddpm", steps: int | None = None, eta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """→ t (n,) int64 descending, rows (n, 5) float64 (a, b, c, d, s), in sampling order.

    ddpm: posterior mean and σ_t z, over the kept steps (Ho et al. 2020, alg. 2; skipping as in
    Nichol & Dhariwal 2021, eq. 19). ddim: Song et al. 2021, eq. 12, with
    σ = η √((1−ᾱ')/(1−ᾱ)) √(1−ᾱ/ᾱ') and ε from the clipped x̂_0. No noise at the last step.
    Raises ValueError for an unknown sampler, a step count outside 1 … T, or eta outside [0, 1].
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    if not isinstance(eta, Real) or not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta!r}, expected 0 (deterministic) … 1 (as noisy as ddpm)")
    if eta and sampler == "ddpm":
        raise ValueError(f"eta is {eta}, but ddpm has none: use sampler='ddim', or leave eta at 0")
    t = torch.tensor(schedules.kept_steps(diffusion.T, diffusion.T if steps is None else steps))
    alpha_bar = diffusion.alpha_bar[t]
    alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    a, b = (row[t] for row in diffusion.x0_rows())
    if sampler == "ddpm":
        c, d, variance = posterior_rows(alpha_bar, alpha_bar_prev, diffusion.variance)
        s = variance.sqrt()
    else:
        ratio = (1 - alpha_bar_prev) / (1 - alpha_bar)
        s = eta * ratio.sqrt() * (1 - alpha_bar / alpha_bar_prev).sqrt()
        # √(1−ᾱ'−σ²)·ε with ε = (x_t − √ᾱ x̂_0)/√(1−ᾱ), sorted by x̂_0 and x_t
        direction = (1 - alpha_bar_prev - s**2).clamp(min=0).sqrt()
        d = direction / (1 - alpha_bar).sqrt()
        c = alpha_bar_prev.sqrt() - d * alpha_bar.sqrt()
    s = torch.where(torch.arange(len(t)) == 0, 0.0, s)
    return t.flip(0), torch.stack([a, b, c, d, s], dim=1).flip(0)


def sample(
    model: Callable,  # model(x, t) or model(x, t, y) → (N, C, H, W)
    diffusion: Diffusion,
    shape: tuple[int, ...],  # (N, C, H, W)
    *,
    sampler: str = "ddpm",
    steps: int | None = None,
    eta: float = 0.0,
    seed: int = 0,
    clip: bool = True,
    y: Tensor | None = None,
    progress: bool = False,
    trajectory: int = 0,
    offset: int = 0,
    device: torch.device | str | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Draws images x_0 (N, C, H, W) float32 by running the reverse process from x_T ~ N(0, I).

    sampler  "ddpm" (Ho et al. 2020, alg. 2) or "ddim" (Song et al. 2021, eq. 12)
    steps    network calls, evenly spaced over T; all T unless given
    eta      ddim's noise: 0 none, 1 as much as ddpm
    seed     with shape, the whole of the randomness: the same images on every device's noise
    clip     keep each x̂_0 in [−1, 1]
    y        (N,) class labels for a class-conditional model
    trajectory  also return this many states (2 or more; at most steps + 1), from x_T to x_0
    offset   global index of the first sample: batches of a run give the images of one large batch

    The model runs as it is (precision, layout), in eval mode and without gradients.
    Raises ValueError for bad names, step counts, shapes and devices.
    """
    if not isinstance(trajectory, int) or trajectory == 1 or trajectory < 0:
        raise ValueError(f"trajectory is {trajectory}, expected 0 (none) or 2 and more states")
    counts = isinstance(shape, Sequence) and all(isinstance(n, Integral) for n in shape)
    if not counts or len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"shape is {shape!r}, expected (N, C, H, W)")
    if y is not None and (not isinstance(y, Tensor) or y.shape[:1] != (shape[0],)):
        found = tuple(y.shape) if isinstance(y, Tensor) else repr(y)
        raise ValueError(f"y is {found}, expected ({shape[0]},) class labels, one per image")
    if device is None:
        parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
        device = next((p.device for p in parameters), torch.device("cpu"))
    else:
        device = usable_device(device)
    times, rows = coefficients(diffusion, sampler, steps, eta)
    times, rows = times.to(device), rows.to(device=device, dtype=torch.float32)
    first = offset * torch.Size(shape[1:]).numel()
    stops = _stops(len(times), trajectory)
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        with torch.inference_mode():
            x = ops.noise(seed, 0, ops.INITIAL_NOISE, shape, device=device, offset=first, impl=impl)
            key = torch.tensor(seed, dtype=torch.int64, device=device)
            counter = torch.arange(len(times), device=device)
            states = [x] if stops else []
            for i in _progress(range(len(times)), progress):
                t = times[i].expand(shape[0])
                out = check_output(model(x, t) if y is None else model(x, t, y))
                x = ops.reverse_step(
                    x,
                    out,
                    rows,
                    counter[i],
                    key=key,
                    clip=1.0 if clip else None,
                    offset=first,
                    impl=impl,
                )
                if i + 1 in stops:
                    states.append(x)
    finally:
        if was_training:
            model.train()
    # Out of inference mode, so that the images can be used anywhere, training included.
    x = x.clone()
    return (x, [s.clone() for s in states]) if trajectory else x


def _stops(n_steps: int, trajectory: int) -> set[int]:
    """Steps after which a state is kept: `trajectory` states with x_T and x_0 among them."""
    if trajectory < 2:
        return set()
    return {round(k * n_steps / (trajectory - 1)) for k in range(1, trajectory)}


def _progress(steps: range, show: bool):
    if not show:
        return steps
    from tqdm import tqdm

    return tqdm(steps, desc="sampling", unit="step", leave=False)

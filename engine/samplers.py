"""Samplers as rows of coefficients and one loop: a network call and a fused step, T times.

Every sampler here is linear in (x̂_0, x_t, z) and, for two-step ones, the x̂_0 of the step before:
x_next = c·x̂_0 + d·x_t + e·x̂_0' + s·z with x̂_0 = clip(a·x_t + b·model_out). A row per step,
(a, b, c, d, s, e, g0, g1, lo, hi) of ops.reverse_step, is all that the kernel needs.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from . import ops, schedules
from .device import usable_device
from .diffusion import Diffusion, check_output, log_variance_range, posterior_rows

SAMPLERS = ("ddpm", "ddim", "dpm++")


def coefficients(
    diffusion: Diffusion, sampler: str = "ddpm", steps: int | str | None = None, eta: float = 0.0
) -> tuple[Tensor, Tensor]:
    """→ the model's t (n,) int64 descending, rows (n, 10) float64; no noise in the last.

    ddpm   posterior mean and σ_t z, over the kept steps (Ho et al. 2020, alg. 2; skipping as in
           Nichol & Dhariwal 2021, eq. 19). (lo, hi) = (log β̃_t, log β_t) and s = g1 = 1 where the
           network learned the variance, else zeros and g1 = σ_t² (Dhariwal & Nichol 2021, alg. 1)
    ddim   Song et al. 2021, eq. 12, with σ = η √((1−ᾱ')/(1−ᾱ)) √(1−ᾱ/ᾱ') and ε from the clipped
           x̂_0; g0 = (1−ᾱ)/√ᾱ takes √(1−ᾱ)·grad off ε (alg. 2 there), as for dpm++
    dpm++  DPM-Solver++(2M) (Lu et al. 2022, alg. 2): with λ = log(√ᾱ/√(1−ᾱ)), h = λ' − λ, r = h of
           the step before / h, D = (1 + 1/2r) x̂_0 − 1/2r x̂_0 of the step before,
           x' = √((1−ᾱ')/(1−ᾱ)) x − √ᾱ' (e^−h − 1) D; D = x̂_0 in the first step and the last
    Raises ValueError for an unknown sampler, a step count outside 1 … T, or eta outside [0, 1].
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    if not isinstance(eta, Real) or not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta!r}, expected 0 (deterministic) … 1 (as noisy as ddpm)")
    if eta and sampler != "ddim":
        raise ValueError(
            f"eta is {eta}, but {sampler} has none: use sampler='ddim', or leave eta at 0"
        )
    t = torch.tensor(schedules.kept_steps(diffusion.T, diffusion.T if steps is None else steps))
    alpha_bar = diffusion.alpha_bar[t]
    alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    a, b = (row[t] for row in diffusion.x0_rows())
    e, g0, g1, lo, hi = torch.zeros(5, len(t), dtype=torch.float64)
    if sampler == "ddpm":
        c, d, variance = posterior_rows(alpha_bar, alpha_bar_prev, diffusion.variance)
        s, g1 = variance.sqrt(), variance
        if diffusion.variance == "learned_range":
            lo, hi = log_variance_range(alpha_bar, alpha_bar_prev)
            s = g1 = torch.ones_like(s)
    else:
        g0 = (1 - alpha_bar) / alpha_bar.sqrt()
        ratio = (1 - alpha_bar_prev) / (1 - alpha_bar)
        s = eta * ratio.sqrt() * (1 - alpha_bar / alpha_bar_prev).sqrt()
    if sampler == "ddim":
        # √(1−ᾱ'−σ²)·ε with ε = (x_t − √ᾱ x̂_0)/√(1−ᾱ), sorted by x̂_0 and x_t
        direction = (1 - alpha_bar_prev - s**2).clamp(min=0).sqrt()
        d = direction / (1 - alpha_bar).sqrt()
        c = alpha_bar_prev.sqrt() - d * alpha_bar.sqrt()
    elif sampler == "dpm++":
        d = ratio.sqrt()
        log_snr = 0.5 * (alpha_bar / (1 - alpha_bar)).log()
        h = torch.cat([torch.tensor([math.inf], dtype=torch.float64), -log_snr.diff()])
        weight = torch.zeros_like(h)  # 1/2r
        weight[1:-1] = h[1:-1] / (2 * h[2:])
        e = alpha_bar_prev.sqrt() * torch.expm1(-h) * weight
        c = -alpha_bar_prev.sqrt() * torch.expm1(-h) - e
    s = torch.where(torch.arange(len(t)) == 0, 0.0, s)
    return diffusion.model_steps(t).flip(0), torch.stack(
        [a, b, c, d, s, e, g0, g1, lo, hi], dim=1
    ).flip(0)


def sample(
    model: Callable,  # model(x, t) or model(x, t, y) → (N, C, H, W)
    diffusion: Diffusion,
    shape: tuple[int, ...],  # (N, C, H, W)
    *,
    sampler: str = "ddpm",
    steps: int | str | None = None,
    eta: float = 0.0,
    seed: int = 0,
    clip: bool = True,
    y: Tensor | None = None,
    progress: bool = False,
    trajectory: int = 0,
    offset: int = 0,
    device: torch.device | str | None = None,
    dynamic_threshold: float | None = None,
    graph: bool | str = "auto",
    impl: str = "auto",
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Draws images x_0 (N, C, H, W) float32 by running the reverse process from x_T ~ N(0, I).

    sampler  "ddpm" (Ho et al. 2020, alg. 2), "ddim" (Song et al. 2021, eq. 12) or "dpm++"
             (DPM-Solver++(2M), Lu et al. 2022, alg. 2)
    steps    network calls, evenly spaced over T, or text for schedules.respace; all T unless given
    eta      ddim's noise: 0 none, 1 as much as ddpm
    seed     with shape, the whole of the randomness: the same images on every device's noise
    clip     keep each x̂_0 in [−1, 1]
    y        (N,) class labels for a class-conditional model
    trajectory  also return this many states (2 or more; at most steps + 1), from x_T to x_0
    offset   global index of the first sample: batches of a run give the images of one large batch
    dynamic_threshold  in place of clip: quantile of |x̂_0|, 0 … 1 (Saharia et al. 2022, §2.3)
    graph    True: capture one step, network included, in a CUDA graph and replay it; a model that
             cannot be captured runs as ever, with a warning. The images stay the same. "auto" does
             not until a committed result shows it right and faster on a GPU; needs CUDA

    Nothing in the loop waits for the device: progress counts the steps that were launched.
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
    capturing = _wants_graph(graph, device)
    times, rows = coefficients(diffusion, sampler, steps, eta)
    first = offset * torch.Size(shape[1:]).numel()
    stops = _stops(len(times), trajectory)
    was_training = getattr(model, "training", False)
    if was_training:
        model.eval()
    try:
        with torch.inference_mode():
            x = ops.noise(seed, 0, ops.INITIAL_NOISE, shape, device=device, offset=first, impl=impl)
            step = _Step(
                model,
                y,
                times.to(device),
                rows.to(device=device, dtype=torch.float32),
                counter=torch.zeros(1, dtype=torch.int64, device=device),
                key=torch.tensor(seed, dtype=torch.int64, device=device),
                two_step=sampler == "dpm++",
                options={
                    "clip": 1.0 if clip or dynamic_threshold is not None else None,
                    "dynamic_threshold": dynamic_threshold,
                    "learned_range": diffusion.variance == "learned_range",
                    "offset": first,
                    "impl": impl,
                },
            )
            loop = _Static(step, x).captured() if capturing else None
            loop = loop or _Plain(step, x)
            states = [x] if stops else []
            for i in _progress(range(len(times)), progress):
                loop.advance()
                if i + 1 in stops:
                    states.append(loop.x.clone())
    finally:
        if was_training:
            model.train()
    # Out of inference mode, so that the images can be used anywhere, training included.
    x = loop.x.clone()
    return (x, [s.clone() for s in states]) if trajectory else x


@dataclass
class _Step:
    """One step of the loop. Where it stands, counter, is on the device: a replay moves it too."""

    model: Callable
    y: Tensor | None
    times: Tensor  # (n,) int64
    rows: Tensor  # (n, 10) float32
    counter: Tensor  # (1,) int64
    key: Tensor  # () int64
    two_step: bool
    options: dict

    def __call__(self, x: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor | None]:
        t = self.times.index_select(0, self.counter).expand(x.shape[0])
        out = check_output(self.model(x, t) if self.y is None else self.model(x, t, self.y))
        found = ops.reverse_step(
            x,
            out,
            self.rows,
            self.counter,
            key=self.key,
            x0_prev=x0,
            return_x0=self.two_step,
            **self.options,
        )
        self.counter.add_(1)
        return found if self.two_step else (found, None)


class _Plain:
    """The loop as it reads."""

    def __init__(self, step: _Step, x: Tensor) -> None:
        self.step, self.x = step, x
        self.x0 = torch.zeros_like(x) if step.two_step else None  # its first coefficient is 0

    def advance(self) -> None:
        self.x, self.x0 = self.step(self.x, self.x0)


class _Static:
    """The same on memory that stays where it is, as a captured step needs it."""

    def __init__(self, step: _Step, x: Tensor) -> None:
        self.step, self.start, self.x = step, x, x.clone()
        self.x0 = torch.zeros_like(x) if step.two_step else None
        self.graph = None

    def advance(self) -> None:
        self.graph.replay()

    def run(self) -> None:
        """One step: what is captured."""
        x, x0 = self.step(self.x, self.x0)
        self.x.copy_(x)
        if x0 is not None:
            self.x0.copy_(x0)

    def rewind(self) -> None:
        self.step.counter.zero_()
        self.x.copy_(self.start)
        if self.x0 is not None:
            self.x0.zero_()

    def captured(self) -> "_Static | None":
        """self, ready to replay; None, after a warning, where the step cannot be captured."""
        try:
            with torch.cuda.device_of(self.x):
                self.graph = _capture(self.run, self.rewind)
        except Exception as error:  # whatever a model may raise: the plain loop will raise it again
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(
                f"sampling without a CUDA graph: the step cannot be captured ({reason[:200]})",
                stacklevel=3,
            )
        self.rewind()
        return self if self.graph is not None else None


def _capture(run: Callable, rewind: Callable):
    """→ a CUDA graph of run(), whose replay() does what run() does."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries allocate and choose their kernels before a capture
        for _ in range(3):
            rewind()
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def _wants_graph(graph: bool | str, device: torch.device) -> bool:
    if not isinstance(graph, bool) and graph != "auto":
        raise ValueError(f"graph is {graph!r}, expected True, False or 'auto'")
    if graph is True and device.type != "cuda":
        raise ValueError(f"graph=True needs a CUDA device, not {device}: leave graph out")
    return graph is True  # no committed result yet: "auto" does not


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

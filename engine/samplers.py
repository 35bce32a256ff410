"""Every sampler by one loop: a network call and a fused step, T times (stepping.py).

Every sampler here is linear in (x̂_0, x_t, z) and, for two-step ones, the x̂_0 of the call before:
x_next = c·x̂_0 + d·x_t + e·x̂_0' + s·z with x̂_0 = clip(a·x_t + b·model_out). A row per call
(coefficients.py) is all that the kernel needs.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral, Real

import torch
from torch import Tensor

from . import ops
from .coefficients import SAMPLERS, SPACINGS, coefficients
from .device import usable_device
from .diffusion import Diffusion
from .guidance import class_gradient, find_null_label, network, takes_labels
from .prepacked import for_sampling
from .stepping import Plain, Static, Step, keeps_nothing
from .unet import UNet

__all__ = ["SAMPLERS", "SPACINGS", "coefficients", "sample"]
TWO_STEP = ("dpm++", "heun")  # their rows use the x̂_0 of the call before


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
    prepack: bool | str = "auto",
    impl: str = "auto",
    guidance: float | None = None,
    null_label: int | None = None,
    classifier: Callable | None = None,  # classifier(x, t) → (N, K) logits
    classifier_scale: float = 1.0,
    noise: Tensor | Callable | None = None,
    model_dtype: torch.dtype | str | None = "auto",
    spacing: str | None = None,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Draws images x_0 (N, C, H, W) float32 by running the reverse process from x_T ~ N(0, I).

    sampler  "ddpm" (Ho et al. 2020, alg. 2), "ddim" (Song et al. 2021, eq. 12), "dpm++"
             (DPM-Solver++(2M), Lu et al. 2022, alg. 2) or "heun" (Karras et al. 2022, alg. 2)
    steps    network calls, evenly spaced over T, or text for schedules.respace; all T unless given;
             heun makes 2·steps − 1
    spacing  "uniform" in t, or "karras" in σ, where t is float32, between whole steps; "karras" for
             heun unless given, "uniform" for the others (coefficients.py)
    eta      ddim's noise: 0 none, 1 as much as ddpm
    s_churn, s_min, s_max, s_noise  heun's noise: S_churn … of alg. 2; none unless given
    seed     with shape, the whole of the randomness: the same images on every device's noise
    clip     keep each x̂_0 in [−1, 1]
    y        (N,) class labels for a class-conditional model, or for a classifier: a U-Net without
             classes is then called without; wrap any other as lambda x, t, y: net(x, t)
    guidance   scale s of classifier-free guidance, ε = ε_u + s(ε_c − ε_u) (Ho & Salimans 2022, s =
             1 + their w): 0 unconditional, 1 conditional, more for clearer classes and less
             variety; above 0, each call is of the doubled batch. ε_u is that of `null_label`, the
             model's own (trained with label dropout) unless given. A learned variance is ε_c's
    classifier  guides to y with s·∇ log p(y | x_t), s = classifier_scale (Dhariwal & Nichol 2021):
             ddpm adds s σ_t² ∇ to the mean (alg. 1), the others take s √(1−ᾱ) ∇ off ε (alg. 2)
    noise    in place of seed: (steps + 1, N, C, H, W), or a function k → (N, C, H, W). 0 is x_T, k
             the z of step k; the last is not used
    trajectory  also return this many states, 2 or more, from x_T to x_0; steps + 1 are there
    offset   global index of the first sample: batches of a run give the images of one large batch;
             so do processes: this is a function of its own process, to which they give their own
    dynamic_threshold  in place of clip: quantile of |x̂_0|, 0 … 1 (Saharia et al. 2022, §2.3)
    model_dtype  the state is float32; the step also writes it in this dtype for the network, which
             saves the network's cast. "auto": what a UNet casts to under autocast, or its weights;
             other models get float32
    graph    True: capture one step, network included, in a CUDA graph and replay it; a model that
             cannot be captured runs as ever, with a warning. The images stay the same. "auto" does
             not until a committed result shows it right and faster on a GPU; needs CUDA
    prepack  run a twin of the model whose weights lie as oneDNN's kernels read them, made when the
             sampling begins: "auto" where that is faster, a UNet on the CPU, neither compiled nor
             accelerated. Rounding may differ

    Nothing in the loop waits for the device: progress counts the calls that were launched.
    The model runs as it is (precision, layout), in eval mode and without gradients.
    Raises ValueError for bad names, step counts, shapes and devices.
    """
    if not isinstance(offset, Integral) or offset < 0:
        raise ValueError(f"offset is {offset!r}, expected the index of the first sample, 0 or more")
    _check(model, diffusion, shape, trajectory, y, classifier, classifier_scale)
    if device is None:
        parameters = model.parameters() if isinstance(model, torch.nn.Module) else iter(())
        device = next((p.device for p in parameters), torch.device("cpu"))
    else:
        device = usable_device(device)
    if device.type == "meta":
        raise ValueError("device meta: tensors have no values there: give cpu or cuda")
    capturing = _wants_graph(graph, device)
    churn = {"s_churn": s_churn, "s_min": s_min, "s_max": s_max, "s_noise": s_noise}
    times, rows = coefficients(diffusion, sampler, steps, eta, spacing=spacing, **churn)
    calls = 2 if sampler == "heun" else 1  # network calls a step
    n_steps = (len(rows) + calls - 1) // calls
    null_label = find_null_label(model, y, guidance, null_label)
    model_dtype = _model_dtype(model, device, model_dtype)
    called = for_sampling(model, prepack)
    first = offset * torch.Size(shape[1:]).numel()
    stops = _stops(n_steps, trajectory)
    z = _injected(noise, shape, n_steps, device)
    modules = [m for m in (model, classifier) if isinstance(m, torch.nn.Module)]
    training = [layer for m in modules for layer in m.modules() if layer.training]
    for layer in training:
        layer.training = False
    try:
        # inference_mode makes tensors that a classifier's backward pass could not save.
        with torch.inference_mode(classifier is None), torch.no_grad():
            if z is None:
                start = (seed, 0, ops.INITIAL_NOISE, shape)
                x = ops.noise(*start, device=device, offset=first, impl=impl)
            else:
                x = z(0).clone(memory_format=torch.contiguous_format)
            labels = y if classifier is None or takes_labels(model) else None
            times = times.to(device, None if times.dtype == torch.int64 else torch.float32)
            step = Step(
                network(called, labels, null_label, times, shape[0]),
                None
                if classifier is None
                else partial(class_gradient, classifier, y=y, scale=classifier_scale),
                times,
                rows.to(device=device, dtype=torch.float32),
                key=torch.tensor(seed, dtype=torch.int64, device=device) if z is None else None,
                noise=None if z is None else torch.zeros_like(x),
                two_step=sampler in TWO_STEP,
                options={
                    "clip": 1.0 if clip or dynamic_threshold is not None else None,
                    "dynamic_threshold": dynamic_threshold,
                    "learned_range": diffusion.variance == "learned_range",
                    "guidance": 1.0 if null_label is None else float(guidance),
                    "offset": first,
                    "model_dtype": model_dtype,
                    "impl": impl,
                },
            )
            loop = Static(step, x).captured() if capturing else None
            loop = loop or Plain(step, x, keeps_nothing(called))
            states = [x] if stops else []
            for i in _progress(range(len(times)), progress):
                k = -(-(i + 1) // calls)  # the step that this call belongs to
                ends = (i + 1) % calls == 0 or k == n_steps
                if z is not None and ends and k < n_steps:
                    step.noise.copy_(z(k))
                loop.advance()
                if ends and k in stops:
                    states.append(loop.x.clone())
    finally:
        for layer in training:  # and no other: some may be frozen
            layer.training = True
    # Out of inference mode, so that the images can be used anywhere, training included.
    x = loop.x.clone()
    return (x, [s.clone() for s in states]) if trajectory else x


def _wants_graph(graph: bool | str, device: torch.device) -> bool:
    if not isinstance(graph, bool) and graph != "auto":
        raise ValueError(f"graph is {graph!r}, expected True, False or 'auto'")
    if graph is True and device.type != "cuda":
        raise ValueError(f"graph=True needs a CUDA device, not {device}: leave graph out")
    return graph is True  # no committed result yet: "auto" does not


def _check(model, diffusion, shape, trajectory, y, classifier, classifier_scale) -> None:
    if not isinstance(diffusion, Diffusion):
        raise ValueError(f"diffusion is {type(diffusion).__name__}, expected an engine.Diffusion")
    if not callable(model):
        raise ValueError(f"model is {type(model).__name__}, expected a function of (x, t)")
    if not isinstance(trajectory, int) or trajectory == 1 or trajectory < 0:
        raise ValueError(f"trajectory is {trajectory}, expected 0 (none) or 2 and more states")
    counts = isinstance(shape, Sequence) and all(isinstance(n, Integral) for n in shape)
    if not counts or len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"shape is {shape!r}, expected (N, C, H, W)")
    if y is not None and (not isinstance(y, Tensor) or y.shape[:1] != (shape[0],)):
        found = tuple(y.shape) if isinstance(y, Tensor) else repr(y)
        raise ValueError(f"y is {found}, expected ({shape[0]},) class labels, one per image")
    if classifier is None:
        return
    if y is None or y.shape != (shape[0],) or y.dtype != torch.int64:
        found = "nothing" if y is None else f"{tuple(y.shape)} {y.dtype}"
        raise ValueError(f"a classifier guides to y: y is {found}, expected ({shape[0]},) int64")
    number = isinstance(classifier_scale, Real) and not isinstance(classifier_scale, bool)
    if not number or not math.isfinite(classifier_scale):
        raise ValueError(f"classifier_scale is {classifier_scale!r}, expected a finite number")


def _injected(noise, shape: tuple, n_steps: int, device: torch.device) -> Callable | None:
    """k → (N, C, H, W) float32 on the device; None for keyed noise."""
    if noise is None:
        return None
    if isinstance(noise, Tensor):
        if noise.shape != (n_steps + 1, *shape):
            raise ValueError(
                f"noise is {tuple(noise.shape)}, expected {(n_steps + 1, *shape)}: x_T, and z of "
                "each step"
            )
        noise = noise.__getitem__
    elif not callable(noise):
        raise ValueError(f"noise is {type(noise).__name__}, expected a tensor or a function")

    def draw(k: int) -> Tensor:
        z = noise(k)
        if not isinstance(z, Tensor) or z.shape != tuple(shape):
            found = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"noise({k}) is {found}, expected {tuple(shape)}")
        return z.to(device, torch.float32)

    return draw


def _model_dtype(
    model: Callable, device: torch.device, wanted: torch.dtype | str | None
) -> torch.dtype | None:
    """What the network is given in place of the float32 state; None: the state itself."""
    if wanted == "auto":
        net = getattr(model, "_orig_mod", model)  # torch.compile keeps the model there
        if not isinstance(net, UNet):
            return None  # it may do more with x than convolve it
        if torch.is_autocast_enabled(device.type):
            wanted = torch.get_autocast_dtype(device.type)
        else:
            wanted = net.conv_in.weight.dtype
        if wanted == torch.float64:
            raise ValueError(
                "the model is float64, but the sampler's state is float32: call model.float(), or "
                "give lambda x, t: model(x.double(), t)"
            )
        return wanted if wanted in (torch.bfloat16, torch.float16) else None
    if wanted not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"model_dtype is {wanted!r}, expected torch.float32, bfloat16, float16, None or 'auto'"
        )
    return None if wanted == torch.float32 else wanted


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

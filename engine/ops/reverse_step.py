"""One step of the reverse process: validation and choice of back end."""

import math

import torch
from torch import Tensor

from .. import dispatch
from .layout import at_least_4d, check_tensors, dense, is_positive, is_whole, scalar
from .results import results_of, written

COLUMNS = (5, 10)
MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reverse_step(
    x: Tensor,  # (N, C, *S) the state x_t
    model_out: Tensor,  # (N, C, *S) the network's output, any floating dtype; see learned_range
    coeffs: Tensor,  # (n_steps, 5 or 10) float32, on x.device
    step: int | Tensor,  # row of coeffs; a tensor: one int64 on x.device
    *,
    key: int | Tensor | None = None,  # seed of the noise contract; a tensor: one int64 on x.device
    noise: Tensor | None = None,  # (N, C, *S) in place of a key
    clip: float | None = 1.0,  # x0 is kept in [−clip, clip]; None: not clipped
    offset: int = 0,  # number of x's first element in the whole batch's noise
    learned_range: bool = False,  # model_out, uncond: (N, 2·C, *S), the second half is v
    uncond: Tensor | None = None,  # like model_out: the output without the condition
    guidance: float = 1.0,  # classifier-free guidance scale, with uncond
    grad: Tensor | None = None,  # (N, C, *S) a classifier's ∇ log p(y | x_t), scaled
    x0_prev: Tensor | None = None,  # (N, C, *S) x0 of the step before, for DPM-Solver++(2M)
    dynamic_threshold: float | None = None,  # quantile of |x0|, 0 … 1, in place of clip
    dynamic_threshold_max: float | None = None,  # m is at most this, 1 or more
    return_x0: bool = False,  # also return x0 (x's dtype)
    model_dtype: torch.dtype | None = None,  # also return x_next in this dtype, for the network
    out: Tensor | tuple[Tensor, ...] | None = None,  # where the results are written, and returned
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """x0 = clip(a·x + b·out); x_next = c·x0 + d·x + s·z, with (a, b, c, d, s) = coeffs[step].

    One launch for every sampler that is linear in (x0, x, z): engine.samplers builds the rows for
    DDPM (Ho et al. 2020, eq. 6–7, 11), DDIM (Song et al. 2021, eq. 12) and DPM-Solver++(2M) (Lu et
    al. 2022, alg. 2). z is `noise`, or normal number offset + i of (key, step, stream 0) for
    element i (`noise`); it is not drawn where s = 0. Exactly one of key and noise must be given.
    NaN in model_out stays NaN. Returns x's dtype and layout; float32 inside.

    The variants, in the same launch, take rows of ten, (…, e, g0, g1, lo, hi); of five, the rest
    is 0:
      out = uncond + guidance·(model_out − uncond)             (Ho & Salimans 2022)
      x0 = bound(a·x + b·out + g0·grad)                        (Dhariwal & Nichol 2021, alg. 2)
      bound: clip(·, ±m)/m, m = max(1, quantile of |x0| in its sample, interpolated linearly), with
             dynamic_threshold (Saharia et al. 2022, §2.3), in one more launch; in two more with
             dynamic_threshold_max, m = min(max(1, quantile), dynamic_threshold_max)
      log σ² = lo + (hi − lo)·(v + 1)/2, with learned_range    (Nichol & Dhariwal 2021, eq. 15)
      x_next = c·x0 + d·x + e·x0_prev + g1·σ²·grad + s·σ·z     (alg. 1; σ = 1 without learned_range)
    v is that of model_out, not of uncond. What e = 0, s = 0 or lo = hi multiplies is not read.
    model_out, uncond, grad, x0_prev may be slices of larger tensors along N or C: no copy is made.
    return_x0 and model_dtype make the result a tuple (x_next, x0, x_next in model_dtype) of what
    was asked for.

    out is a tensor where one is returned, else a tuple in the same order; each as the call would
    have made it: shape, dtype, device, and the layout of x, which must be contiguous or
    channels_last to be followed: any other x gives contiguous results. x_next may be x itself.
    Nothing else of out may share memory, neither with what is read nor with each other.

    A step tensor outside the table gives NaN, since reading it back would stall a GPU. Raises
    ValueError for arguments that do not fit, BackendError (RuntimeError) when an explicit impl
    cannot serve; only eager has a gradient, and out= has none (RuntimeError).
    """
    variant = (
        uncond is not None
        or grad is not None
        or x0_prev is not None
        or learned_range
        or return_x0
        or dynamic_threshold is not None
        or dynamic_threshold_max is not None
        or model_dtype is not None
        or guidance != 1
    )
    operands = (uncond, grad, x0_prev)
    threshold = (dynamic_threshold, dynamic_threshold_max)
    _check_reverse_step(x, model_out, coeffs, step, key, noise, clip, offset, learned_range)
    if variant:
        _check_variants(x, model_out, *operands, guidance, *threshold, clip, model_dtype)
    args = _reverse_step_args(x, model_out, coeffs, step, key, noise, clip, offset)
    results = None
    if out is not None:
        reads = (x, model_out, noise, *operands, coeffs, args[3], args[4])
        results = results_of(out, x, return_x0, model_dtype, reads)
    general = variant or out is not None
    backend = dispatch.pick(
        "reverse_step", "eager" if x.numel() == 0 else impl, *args, *(operands if general else ())
    )
    if general and backend != "eager":
        more = (guidance, threshold, return_x0, model_dtype)
        found = _variant(args, operands, *more, backend, results)
    elif variant:
        more = (guidance, threshold, return_x0, model_dtype)
        found = _eager_variant(args, operands, *more)
    else:
        found = (_plain(args, backend),)
    if out is None:
        return found if len(found) > 1 else found[0]
    if backend == "eager":
        for mine, new in zip(results, found, strict=True):
            mine.copy_(new)
    else:
        written(results)
    return out


def _plain(args: tuple, backend: str) -> Tensor:
    x, model_out, coeffs, step, seed, noise, clip, offset = args
    shape = x.shape
    if backend != "eager":
        x, model_out = dense(at_least_4d(x)), dense(at_least_4d(model_out))
        noise = None if noise is None else dense(at_least_4d(noise))
        args = (x, model_out, coeffs, step, seed, noise, clip, offset)
    y = dispatch.function("reverse_step", "fwd", backend)(*args)
    return y.view(shape) if y.shape != shape else y


def _variant(args, operands, guidance, dynamic_threshold, return_x0, model_dtype, backend, out):
    x, model_out, coeffs, step, seed, noise, clip, offset = args
    shape, x = x.shape, dense(at_least_4d(x))
    model_out, noise, uncond, grad, x0_prev = (
        None if t is None else _sliced(at_least_4d(t)) for t in (model_out, noise, *operands)
    )
    rows = (coeffs, step)
    threshold = None
    quantile, largest = dynamic_threshold
    if quantile is not None:
        threshold = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        dispatch.function("reverse_step", "threshold_fwd", backend)(
            threshold, x, model_out, uncond, grad, *rows, float(guidance), float(quantile)
        )
        if largest is not None:
            threshold.clamp_(max=largest)
    if out is None:
        x_next = torch.empty_like(x)
        x0 = torch.empty_like(x) if return_x0 else None
        model_in = None if model_dtype is None else torch.empty_like(x, dtype=model_dtype)
    else:
        out = [t if t.shape == x.shape else t.view(x.shape) for t in out]
        x_next, x0 = out[0], out[1] if return_x0 else None
        model_in = None if model_dtype is None else out[-1]
    dispatch.function("reverse_step", "general_fwd", backend)(
        *(x_next, x0, model_in, x, model_out, uncond, grad, x0_prev, threshold, *rows),
        *(seed, noise, float(guidance), clip, offset),
    )
    return tuple(t.view(shape) for t in (x_next, x0, model_in) if t is not None)


def _eager_variant(args, operands, guidance, dynamic_threshold, return_x0, model_dtype):
    x, model_out, coeffs, step, seed, noise, clip, offset = args
    x_next, x0 = dispatch.function("reverse_step", "general", "eager")(
        *(x, model_out, *operands, coeffs, step, seed, noise, guidance, clip, *dynamic_threshold),
        offset,
    )
    found = [x_next.to(x.dtype)]
    if return_x0:
        found.append(x0.to(x.dtype))
    if model_dtype is not None:
        found.append(x_next.to(model_dtype))
    return tuple(found)


def is_read(t: Tensor) -> bool:
    """Whether the kernels read this operand where it lies, and in this shape."""
    return t.dim() in (4, 5) and _sliced(t) is t


def _sliced(t: Tensor) -> Tensor:  # (N, C, H, W) or (N, C, D, H, W)
    """t if its planes or its channels lie without gaps, else a contiguous copy."""
    for unit, gapless in ((1, True), (None, t.stride(1) == 1 or t.shape[1] == 1)):
        expected = unit
        for size, stride in zip(t.shape[:1:-1], t.stride()[:1:-1], strict=True):
            if size == 1:
                continue
            expected = stride if expected is None else expected
            gapless = gapless and stride == expected
            expected *= size
        if gapless:
            return t
    return t.contiguous()


def arguments(
    x, model_out, coeffs, step, *, key=None, noise=None, clip=1.0, offset=0, learned_range=False,
    uncond=None, guidance=1.0, grad=None, x0_prev=None, dynamic_threshold=None,
    dynamic_threshold_max=None, return_x0=False, model_dtype=None, out=None,
):  # fmt: skip
    operands = (uncond, grad, x0_prev)
    _check_reverse_step(x, model_out, coeffs, step, key, noise, clip, offset, learned_range)
    threshold = (dynamic_threshold, dynamic_threshold_max)
    _check_variants(x, model_out, *operands, guidance, *threshold, clip, model_dtype)
    given = [t for t in operands if t is not None]
    args = _reverse_step_args(x, model_out, coeffs, step, key, noise, clip, offset)
    if out is not None:
        reads = (x, model_out, noise, *operands, coeffs, args[3], args[4])
        results_of(out, x, return_x0, model_dtype, reads)
    return *args, *given


def _reverse_step_args(x, model_out, coeffs, step, key, noise, clip, offset) -> tuple:
    step = scalar("step", step, x.device, 0, coeffs.shape[0])
    seed = None if key is None else scalar("key", key, x.device, -(2**63), 2**63)
    noise = None if noise is None else noise.to(x.dtype)
    return x, model_out, coeffs, step, seed, noise, math.inf if clip is None else clip, offset


def _check_reverse_step(
    x, model_out, coeffs, step, key, noise, clip, offset, learned_range=False
) -> None:
    if not (isinstance(x, Tensor) and isinstance(model_out, Tensor) and isinstance(coeffs, Tensor)):
        check_tensors("reverse_step", x=x, model_out=model_out, coeffs=coeffs)
    _check_like("model_out", model_out, x, learned_range)
    if noise is not None:
        check_tensors("reverse_step", noise=noise)
        _check_like("noise", noise, x)
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"reverse_step: x is {tuple(x.shape)} {x.dtype}, expected (N, C, *S) float"
        )
    if coeffs.dim() != 2 or coeffs.shape[1] not in COLUMNS or coeffs.dtype != torch.float32:
        raise ValueError(
            f"reverse_step: coeffs is {tuple(coeffs.shape)} {coeffs.dtype}, expected (n_steps, 5) "
            "float32, or (n_steps, 10): the second result of samplers.coefficients, .float()"
        )
    if coeffs.device != x.device or not coeffs.is_contiguous():
        raise ValueError(f"reverse_step: coeffs must be contiguous and on {x.device} like x")
    if (key is None) == (noise is None):
        raise ValueError("reverse_step: give exactly one of key (a seed) and noise (a tensor)")
    if clip is not None and not is_positive(clip):
        raise ValueError(
            f"reverse_step: clip is {clip!r}, expected clip > 0, or None for no clipping"
        )
    if not is_whole(offset) or not 0 <= offset < 2**63:
        raise ValueError(f"reverse_step: offset is {offset!r}, expected 0 <= offset < 2^63")


def _check_variants(
    x, model_out, uncond, grad, x0_prev, guidance, dynamic_threshold, largest, clip, model_dtype
) -> None:
    for name, t in (("uncond", uncond), ("grad", grad), ("x0_prev", x0_prev)):
        if t is not None:
            check_tensors("reverse_step", **{name: t})
            _check_like(name, t, x, name == "uncond" and model_out.shape[1] != x.shape[1])
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float, torch.SymFloat)):
        raise ValueError(f"reverse_step: guidance is {guidance!r}, expected a number")
    if not -math.inf < guidance < math.inf:
        raise ValueError(f"reverse_step: guidance is {guidance!r}, expected a finite number")
    if guidance != 1 and uncond is None:
        raise ValueError(
            f"reverse_step: guidance is {guidance!r} without uncond: give the output without the "
            "condition as well"
        )
    if dynamic_threshold is not None:
        if not isinstance(dynamic_threshold, (int, float)) or not 0 <= dynamic_threshold <= 1:
            raise ValueError(
                f"reverse_step: dynamic_threshold is {dynamic_threshold!r}, expected a quantile, "
                "0 … 1 (Saharia et al. 2022 take 0.995), or None"
            )
        if clip != 1:
            raise ValueError(
                f"reverse_step: clip is {clip!r} beside a dynamic_threshold, which takes its place:"
                " leave clip out"
            )
        if x.numel() // max(x.shape[0], 1) >= 2**31 - 1:
            raise ValueError(
                f"reverse_step: x is {tuple(x.shape)}, expected fewer than 2^31 - 1 elements a "
                "sample with dynamic_threshold"
            )
    if largest is not None and (
        dynamic_threshold is None or not isinstance(largest, (int, float)) or not largest >= 1
    ):
        raise ValueError(
            f"reverse_step: dynamic_threshold_max is {largest!r}, expected a number, 1 or more, "
            "beside a dynamic_threshold, or None"
        )
    if model_dtype is not None and model_dtype not in MODEL_DTYPES:
        raise ValueError(
            f"reverse_step: model_dtype is {model_dtype}, expected float32, bfloat16 or float16"
        )


def _check_like(name: str, t: Tensor, x: Tensor, learned_range: bool = False) -> None:
    shape = x.shape
    if learned_range and x.dim() > 1:
        shape = torch.Size((shape[0], 2 * shape[1], *shape[2:]))
    if t.shape != shape or t.device != x.device or not t.is_floating_point():
        raise ValueError(
            f"reverse_step: {name} is {tuple(t.shape)} {t.dtype} on {t.device}, "
            f"expected {tuple(shape)}, floating point, on {x.device} like x"
        )

"""The front door to the kernels: validation, choice of back end, one autograd.Function per op.

Every op takes `impl`: "auto" (ENGINE_BACKEND, else the first back end that does not refuse),
"eager", "native" or "triton". Inputs in contiguous or channels_last layout are read in place; any
other view is copied once to contiguous for native and triton, and `explain` says so.
"""

import math

import torch
from torch import Tensor

from . import dispatch

# Streams of the noise contract: draws for different purposes never share a number.
STEP_NOISE, INITIAL_NOISE, TRAINING_NOISE = 0, 1, 2


def group_norm_silu(
    x: Tensor,  # (N, C, *S) float32, bfloat16 or float16; contiguous or channels_last
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    num_groups: int,
    eps: float = 1e-5,
    *,
    add: Tensor | None = None,  # (N, C), like scale and shift
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str = "silu",
    impl: str = "auto",
) -> Tensor:
    """y = act(GN(x + add) · (1 + scale) + shift), GN(u) = (u − mean)/√(var + eps) · weight + bias.

    Mean and biased variance per sample over C / num_groups channels and S, centred and in float32;
    act is SiLU (v·σ(v)) for "silu", the identity for "none". Returns y in x.dtype and x's layout;
    float32 inside. Differentiable in every tensor, the same bits on every run. weight, bias, add,
    scale and shift may have another dtype than x. float64 is served by eager alone.
    Raises ValueError for shapes, dtypes or devices that do not fit, BackendError (RuntimeError)
    when an explicit impl cannot serve.
    Sources: Wu & He 2018, eq. 1–3; Ho et al. 2020, app. B (add); Dhariwal & Nichol 2021, §3
    (AdaGN).
    """
    _check_group_norm_silu(x, weight, bias, num_groups, eps, add, scale, shift, activation)
    silu = activation == "silu"
    if x.numel() == 0:
        impl = "eager"
    shape = x.shape
    if x.dim() not in (4, 5):  # (N, C, S, 1) knows both layouts, (N, C, S) only one
        x = x.flatten(2).unsqueeze(-1) if x.dim() > 2 else x[:, :, None, None]
    args = (x, weight, bias, add, scale, shift, num_groups, eps, silu)
    backend = dispatch.pick("group_norm_silu", impl, *args)
    if backend == "eager":
        return dispatch.module("group_norm_silu", backend).group_norm_silu(*args).reshape(shape)
    x = _dense(x)
    operands = [_rows(t) for t in (weight, bias, add, scale, shift)]
    args = (x, *operands, num_groups, eps, silu)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *operands)):
        y = _GroupNormSilu.apply(backend, *args)
    else:
        y = dispatch.function("group_norm_silu", "fwd", backend)(*args)[0]
    return y.view(shape) if y.shape != shape else y


def _refuse_double_backward(op: str, backend: str, saved: tuple) -> None:
    """Under create_graph=True the kernels' results would be constants: a silently wrong derivative.

    once_differentiable does not help: it complains only when the cotangent requires a gradient.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in saved):
        raise RuntimeError(
            f"{op}: {backend} has no second derivative (create_graph=True): use impl='eager'"
        )


class _GroupNormSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, weight, bias, add, scale, shift, num_groups, eps, silu):
        fwd = dispatch.function("group_norm_silu", "fwd", backend)
        y, mean, rstd = fwd(x, weight, bias, add, scale, shift, num_groups, eps, silu)
        ctx.save_for_backward(x, weight, bias, add, scale, shift, mean, rstd)
        ctx.backend, ctx.num_groups, ctx.silu = backend, num_groups, silu
        return y

    @staticmethod
    def backward(ctx, dy):
        bwd = dispatch.function("group_norm_silu", "bwd", ctx.backend)
        saved = ctx.saved_tensors
        _refuse_double_backward("group_norm_silu", ctx.backend, saved)
        dx, *small = bwd(_dense(dy), *saved, ctx.num_groups, ctx.silu)
        operands = saved[1:6]
        small = [None if t is None else d.to(t.dtype) for t, d in zip(operands, small, strict=True)]
        return None, dx, *small, None, None, None


def attention(
    q: Tensor,  # (N, heads, S, D) float32, bfloat16 or float16, any strides
    k: Tensor,  # (N, heads, Sk, D)
    v: Tensor,  # (N, heads, Sk, D)
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """out = softmax(q kᵀ · scale) v, scale 1/√D unless given. Returns (N, heads, S, D) in q.dtype.

    Softmax and sums in float32. Differentiable in q, k, v. The triton kernels write out in memory
    order (N, S, heads, D), so that merging the heads costs nothing.
    Raises ValueError for shapes, dtypes or devices that do not fit, BackendError (RuntimeError)
    when an explicit impl cannot serve.
    Sources: Vaswani et al. 2017, eq. 1; Dao 2023 (FlashAttention-2), alg. 1 and 2.
    """
    _check_attention(q, k, v)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if q.numel() == 0 or k.numel() == 0:
        impl = "eager"
    backend = dispatch.pick("attention", impl, q, k, v, scale)
    if backend == "eager":
        return dispatch.module("attention", backend).attention(q, k, v, scale)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(backend, q, k, v, scale)
    return dispatch.function("attention", "fwd", backend)(q, k, v, scale)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, q, k, v, scale):
        out, lse = dispatch.function("attention", "fwd", backend)(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.backend, ctx.scale = backend, scale
        return out

    @staticmethod
    def backward(ctx, dout):
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        _refuse_double_backward("attention", ctx.backend, ctx.saved_tensors)
        bwd = dispatch.function("attention", "bwd", ctx.backend)
        return None, *bwd(dout, *ctx.saved_tensors, ctx.scale), None


def reverse_step(
    x: Tensor,  # (N, C, *S) the state x_t
    model_out: Tensor,  # (N, C, *S) the network's output, any floating dtype
    coeffs: Tensor,  # (n_steps, 5) float32, on x.device
    step: int | Tensor,  # row of coeffs; a tensor: one int64 on x.device
    *,
    key: int | Tensor | None = None,  # seed of the noise contract; a tensor: one int64 on x.device
    noise: Tensor | None = None,  # (N, C, *S) in place of a key
    clip: float | None = 1.0,  # x0 is kept in [−clip, clip]; None: not clipped
    offset: int = 0,  # number of x's first element in the whole batch's noise
    impl: str = "auto",
) -> Tensor:
    """x0 = clip(a·x + b·out); x_next = c·x0 + d·x + s·z, with (a, b, c, d, s) = coeffs[step].

    One launch for every sampler that is linear in (x0, x, z): engine.samplers builds the rows for
    DDPM (Ho et al. 2020, eq. 6–7, 11) and DDIM (Song et al. 2021, eq. 12). z is `noise`, or normal
    number offset + i of (key, step, stream 0) for element i (`noise`); it is not drawn where s = 0.
    Exactly one of key and noise must be given. NaN in model_out stays NaN. Returns x's dtype and
    layout; float32 inside. A step tensor outside the table gives NaN, since reading it back would
    stall a GPU. Raises ValueError for arguments that do not fit, BackendError (RuntimeError) when
    an explicit impl cannot serve; only eager has a gradient.
    """
    _check_reverse_step(x, model_out, coeffs, step, key, noise, clip, offset)
    args = _reverse_step_args(x, model_out, coeffs, step, key, noise, clip, offset)
    backend = dispatch.pick("reverse_step", "eager" if x.numel() == 0 else impl, *args)
    if backend != "eager":
        x, model_out, *rest = args
        noise = None if rest[3] is None else _dense(_at_least_4d(rest[3]))
        rest[3] = noise
        y = dispatch.function("reverse_step", "fwd", backend)(
            _dense(_at_least_4d(x)), _dense(_at_least_4d(model_out)), *rest
        )
        return y.view(x.shape) if y.shape != x.shape else y
    return dispatch.function("reverse_step", "fwd", backend)(*args)


def noise(
    seed: int | Tensor,
    step: int | Tensor,
    stream: int,
    shape: tuple[int, ...],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    offset: int = 0,
    impl: str = "auto",
) -> Tensor:
    """Standard normals: element i is number offset + i of (seed, step, stream).

    The same bits on every back end (Philox4x32-10, Salmon et al. 2011; Box & Muller 1958),
    |z| < 5.77. seed: int64; step: 0 … 2³²−1; each an int or an int64 tensor of one element on
    `device`. stream: 0 step noise, 1 initial noise, 2 training noise, others free. Returns `shape`,
    contiguous, drawn in float32 and rounded to dtype (float32, bfloat16 or float16). Raises
    ValueError otherwise.
    """
    args = _noise_args(seed, step, stream, shape, device=device, dtype=dtype, offset=offset)
    out = args[0]
    backend = dispatch.pick("noise", "eager" if out.numel() == 0 else impl, *args)
    dispatch.function("noise", "fwd", backend)(*args)
    return out


def explain(op: str, *args, **kwargs) -> None:
    """Prints which back ends would serve ops.<op>(*args, **kwargs), and which one `auto` takes."""
    prepare = {
        "group_norm_silu": _explain_group_norm_silu,
        "attention": _explain_attention,
        "reverse_step": _explain_reverse_step,
        "noise": _noise_args,
    }
    if op not in prepare:
        raise ValueError(f"explain: unknown op {op!r}, expected one of {', '.join(prepare)}")
    kwargs.pop("impl", None)
    call = prepare[op](*args, **kwargs)
    print(dispatch.table(op, *call))
    copied = [t for t in call if isinstance(t, Tensor) and t.dim() > 2 and not _is_dense(t)]
    if op in ("group_norm_silu", "reverse_step") and copied:
        print(
            f"  note: {len(copied)} tensor(s) neither contiguous nor channels_last (first: strides "
            f"{copied[0].stride()}); native and triton copy them once"
        )


def _explain_group_norm_silu(
    x, weight, bias, num_groups, eps=1e-5, *, add=None, scale=None, shift=None, activation="silu"
):
    _check_group_norm_silu(x, weight, bias, num_groups, eps, add, scale, shift, activation)
    return x, weight, bias, add, scale, shift, num_groups, eps, activation == "silu"


def _explain_attention(q, k, v, *, scale=None):
    _check_attention(q, k, v)
    return q, k, v, 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)


def _explain_reverse_step(x, model_out, coeffs, step, *, key=None, noise=None, clip=1.0, offset=0):
    _check_reverse_step(x, model_out, coeffs, step, key, noise, clip, offset)
    return _reverse_step_args(x, model_out, coeffs, step, key, noise, clip, offset)


def _noise_args(seed, step, stream, shape, *, device="cpu", dtype=torch.float32, offset=0):
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"noise: dtype is {dtype}, expected float32, bfloat16 or float16")
    for name, value in (("stream", stream), ("offset", offset)):
        if not isinstance(value, int) or not 0 <= value < (2**32 if name == "stream" else 2**63):
            raise ValueError(f"noise: {name} is {value}, expected an integer, 0 or more")
    out = torch.empty(shape, dtype=dtype, device=device)
    seed = _scalar("seed", seed, out.device, -(2**63), 2**63)
    return out, seed, _scalar("step", step, out.device, 0, 2**32), stream, offset


def _is_dense(t: Tensor) -> bool:
    if t.is_contiguous():
        return True
    if t.dim() == 4:
        return t.is_contiguous(memory_format=torch.channels_last)
    return t.dim() == 5 and t.is_contiguous(memory_format=torch.channels_last_3d)


def _dense(t: Tensor) -> Tensor:
    return t if _is_dense(t) else t.contiguous()


def _rows(t: Tensor | None) -> Tensor | None:
    """An operand whose last dimension is contiguous; rows of a chunked embedding stay in place."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _at_least_4d(t: Tensor) -> Tensor:
    if t.dim() in (4, 5):
        return t
    return t.flatten(2).unsqueeze(-1) if t.dim() > 2 else t.reshape(t.shape[0], -1, 1, 1)


def _scalar(name: str, value: int | Tensor, device: torch.device, low: int, high: int) -> Tensor:
    """One int64 on the device, where a captured launch can read it."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype != torch.int64 or value.device != device:
            raise ValueError(
                f"{name} is {tuple(value.shape)} {value.dtype} on {value.device}, "
                f"expected one int64 on {device}"
            )
        return value
    if isinstance(value, float) or not low <= value < high:
        raise ValueError(f"{name} is {value}, expected an integer, {low} <= {name} < {high}")
    return torch.tensor(value, dtype=torch.int64, device=device)


def _reverse_step_args(x, model_out, coeffs, step, key, noise, clip, offset) -> tuple:
    step = _scalar("step", step, x.device, 0, coeffs.shape[0])
    seed = None if key is None else _scalar("key", key, x.device, -(2**63), 2**63)
    noise = None if noise is None else noise.to(x.dtype)
    return x, model_out, coeffs, step, seed, noise, math.inf if clip is None else clip, offset


def _check_group_norm_silu(x, weight, bias, num_groups, eps, add, scale, shift, activation) -> None:
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"group_norm_silu: x is {tuple(x.shape)} {x.dtype}, expected (N, C, *S), floating point"
        )
    n, c = x.shape[:2]
    if isinstance(num_groups, float) or num_groups < 1 or c % num_groups:
        raise ValueError(
            f"group_norm_silu: {c} channels cannot be split into num_groups={num_groups} groups"
        )
    if activation not in ("silu", "none"):
        raise ValueError(
            f"group_norm_silu: activation is {activation!r}, expected 'silu' or 'none'"
        )
    if not eps > 0:
        raise ValueError(f"group_norm_silu: eps is {eps}, expected eps > 0")
    operands = {"weight": weight, "bias": bias, "add": add, "scale": scale, "shift": shift}
    for name, t in operands.items():
        if t is None:
            continue
        expected = (c,) if name in ("weight", "bias") else (n, c)
        if tuple(t.shape) != expected or not t.is_floating_point():
            raise ValueError(
                f"group_norm_silu: {name} is {tuple(t.shape)} {t.dtype}, expected {expected}, "
                f"floating point, for x {tuple(x.shape)}"
            )
        if t.device != x.device:
            raise ValueError(f"group_norm_silu: {name} is on {t.device}, expected {x.device}")


def _check_attention(q, k, v) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    fits = q.dim() == k.dim() == v.dim() == 4 and k.shape == v.shape
    if not (fits and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]):
        raise ValueError(
            f"attention: {shapes}, expected (N, heads, S, D) and twice (N, heads, Sk, D)"
        )
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(
            f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, expected one floating dtype"
        )
    if not q.device == k.device == v.device:
        raise ValueError(
            f"attention: q, k, v are on {q.device}, {k.device}, {v.device}, expected one device"
        )


def _check_reverse_step(x, model_out, coeffs, step, key, noise, clip, offset) -> None:
    tensors = {"model_out": model_out} | ({} if noise is None else {"noise": noise})
    for name, t in tensors.items():
        if t.shape != x.shape or t.device != x.device or not t.is_floating_point():
            raise ValueError(
                f"reverse_step: {name} is {tuple(t.shape)} {t.dtype} on {t.device}, "
                f"expected {tuple(x.shape)}, floating point, on {x.device} like x"
            )
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(
            f"reverse_step: x is {tuple(x.shape)} {x.dtype}, expected (N, C, *S) float"
        )
    if coeffs.dim() != 2 or coeffs.shape[1] != 5 or coeffs.dtype != torch.float32:
        raise ValueError(
            f"reverse_step: coeffs is {tuple(coeffs.shape)} {coeffs.dtype}, "
            "expected (n_steps, 5) float32: the second result of samplers.coefficients, .float()"
        )
    if coeffs.device != x.device or not coeffs.is_contiguous():
        raise ValueError(f"reverse_step: coeffs must be contiguous and on {x.device} like x")
    if (key is None) == (noise is None):
        raise ValueError("reverse_step: give exactly one of key (a seed) and noise (a tensor)")
    if clip is not None and not clip > 0:
        raise ValueError(
            f"reverse_step: clip is {clip}, expected clip > 0, or None for no clipping"
        )
    if offset < 0:
        raise ValueError(f"reverse_step: offset is {offset}, expected offset >= 0")

"""The registered boundary of each op: its schema, and its fake, which says the shapes.

`native` (namespace `engine`, schemas repeated in csrc/ops_<op>.cpp) and `triton` (namespace
`engine_triton`) register the same ops, so that torch.compile sees one opaque node per call.
"""

import math

import torch

NATIVE, TRITON = "engine", "engine_triton"

SCHEMAS = {
    "group_norm_silu_fwd": (
        "(Tensor x, Tensor? x2, Tensor? weight, Tensor? bias, Tensor? add, Tensor? scale, "
        "Tensor? shift, int num_groups, float eps, bool silu) -> "
        "(Tensor y, Tensor mean, Tensor rstd)"
    ),
    "group_norm_silu_bwd": (
        "(Tensor dy, Tensor x, Tensor? x2, Tensor? weight, Tensor? bias, Tensor? add, "
        "Tensor? scale, Tensor? shift, Tensor mean, Tensor rstd, int num_groups, bool silu) -> "
        "(Tensor dx, Tensor dx2, Tensor dweight, Tensor dbias, Tensor dadd, Tensor dscale, "
        "Tensor dshift)"
    ),
    "group_norm_silu_bwd_add": (  # native on the CPU alone
        "(Tensor dy, Tensor x, Tensor? x2, Tensor? weight, Tensor? bias, Tensor? add, "
        "Tensor? scale, Tensor? shift, Tensor mean, Tensor rstd, int num_groups, bool silu, "
        "Tensor dx_add, Tensor? dx2_add) -> (Tensor dx, Tensor dx2, Tensor dweight, "
        "Tensor dbias, Tensor dadd, Tensor dscale, Tensor dshift)"
    ),
    "rms_norm_silu_fwd": (
        "(Tensor x, Tensor? weight, Tensor? scale, Tensor? shift, float eps, bool silu) -> "
        "(Tensor y, Tensor rstd)"
    ),
    "rms_norm_silu_bwd": (
        "(Tensor dy, Tensor x, Tensor? weight, Tensor? scale, Tensor? shift, Tensor rstd, "
        "bool silu) -> (Tensor dx, Tensor dweight, Tensor dscale, Tensor dshift)"
    ),
    "attention_fwd": "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor out, Tensor lse)",
    "attention_bwd": (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale) -> "
        "(Tensor dq, Tensor dk, Tensor dv)"
    ),
    "attention_qkv_fwd": (
        "(Tensor qkv, int heads, str order, float scale) -> (Tensor out, Tensor lse)"
    ),
    "attention_qkv_bwd": (
        "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, int heads, str order, float scale) -> "
        "Tensor"
    ),
    "reverse_step_fwd": (
        "(Tensor x, Tensor model_out, Tensor coeffs, Tensor step, Tensor? seed, Tensor? noise, "
        "float clip, int offset) -> Tensor"
    ),
    "reverse_step_general_fwd": (
        "(Tensor(a!) x_next, Tensor(b!)? x0, Tensor(c!)? model_in, Tensor x, Tensor model_out, "
        "Tensor? uncond, Tensor? grad, Tensor? x0_prev, Tensor? threshold, Tensor coeffs, "
        "Tensor step, Tensor? seed, Tensor? noise, float guidance, float clip, int offset) -> ()"
    ),
    "reverse_step_threshold_fwd": (
        "(Tensor(a!) threshold, Tensor x, Tensor model_out, Tensor? uncond, Tensor? grad, "
        "Tensor coeffs, Tensor step, float guidance, float quantile) -> ()"
    ),
    "forward_noise_fwd": (
        "(Tensor(a!) x_t, Tensor x0, Tensor coeffs, Tensor t, Tensor? seed, Tensor? step, "
        "Tensor? noise, int offset) -> ()"
    ),
    "forward_noise_loss_fwd": (
        "(Tensor model_out, Tensor x0, Tensor coeffs, Tensor t, Tensor? weights, Tensor? seed, "
        "Tensor? step, Tensor? noise, int offset, int loss) -> Tensor"
    ),
    "forward_noise_loss_grad_fwd": (  # native on the CPU alone
        "(Tensor model_out, Tensor x0, Tensor coeffs, Tensor t, Tensor? weights, Tensor? seed, "
        "Tensor? step, Tensor? noise, int offset, int loss, bool mean) -> "
        "(Tensor loss, Tensor grad)"
    ),
    "forward_noise_loss_bwd": (
        "(Tensor dloss, Tensor model_out, Tensor x0, Tensor coeffs, Tensor t, Tensor? weights, "
        "Tensor? seed, Tensor? step, Tensor? noise, int offset, int loss) -> Tensor"
    ),
    "noise_fwd": "(Tensor(a!) out, Tensor seed, Tensor step, int stream, int offset) -> ()",
}


def empty_heads(q: torch.Tensor, length: int, head_dim: int) -> torch.Tensor:
    """(N, heads, length, D) whose memory is (N, length, heads, D): merging heads is then free."""
    n, heads = q.shape[:2]
    return q.new_empty((n, length, heads, head_dim)).transpose(1, 2)


def _formats(t: torch.Tensor) -> tuple[bool, bool]:
    """Whether t is contiguous, whether it is channels_last; both where S or C is 1."""
    last = torch.channels_last_3d if t.dim() == 5 else torch.channels_last
    return t.is_contiguous(), t.is_contiguous(memory_format=last)


def mixed(x: torch.Tensor, x2: torch.Tensor) -> bool:
    """Whether one half of a pair is contiguous, the other channels_last."""
    a, b = _formats(x), _formats(x2)
    return any(a) and any(b) and not ((a[0] and b[0]) or (a[1] and b[1]))


def empty_like_pair(x: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
    """(N, C + C2, *S) in the layout of x, or of x2 where x is both contiguous and channels_last."""
    first = _formats(x)
    last = not first[0] or (first[1] and not x2.is_contiguous())
    form = torch.contiguous_format
    if last:
        form = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
    shape = (x.shape[0], x.shape[1] + x2.shape[1], *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)


def eps_refusals(eps: float) -> list[str]:
    """Why rms_norm_silu's kernels do not take this eps: beside it squares must not underflow."""
    return [] if eps >= 1e-18 else [f"needs eps >= 1e-18 (its square in float32), got {eps}"]


# Order of the channels, slowest first → the permutation to (3, N, heads, S, D) of
# (N, S, <the three>).
_QKV = {"3hd": (2, 0, 3, 1, 4), "h3d": (3, 0, 2, 1, 4), "hd3": (4, 0, 2, 1, 3)}


def split_qkv(
    qkv: torch.Tensor,  # (N, S, 3·heads·D)
    heads: int,
    order: str,  # of the channels, slowest first: "3hd", "h3d" or "hd3"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v (N, heads, S, D): views, for "hd3" of stride 3 along D."""
    sizes = {"3": 3, "h": heads, "d": qkv.shape[2] // (3 * heads)}
    a, b, c = order
    parts = qkv.unflatten(2, (sizes[a], sizes[b], sizes[c]))
    return parts.permute(_QKV[order]).unbind()


def merged(out: torch.Tensor) -> torch.Tensor:
    """(N, heads, S, D) of empty_heads as (N, S, heads·D), a view."""
    return out.transpose(1, 2).flatten(2)


def _group_norm_silu_fwd(x, x2, weight, bias, add, scale, shift, num_groups, eps, silu):
    stats = (x.shape[0], num_groups)
    return (
        torch.empty_like(x) if x2 is None else empty_like_pair(x, x2),
        x.new_empty(stats, dtype=torch.float32),
        x.new_empty(stats, dtype=torch.float32),
    )


def _group_norm_silu_fwd_strict(*args):  # and `strict`; CUDA ops of `native` alone
    return _group_norm_silu_fwd(*args[:-1])


def _group_norm_silu_bwd(
    dy, x, x2, weight, bias, add, scale, shift, mean, rstd, num_groups, silu
):  # absent operands have gradients of shape (0,)
    def grad(operand, *shape):
        return x.new_empty(shape if operand is not None else (0,), dtype=torch.float32)

    n, c = dy.shape[:2]
    return (
        torch.empty_like(x),
        x.new_empty((0,)) if x2 is None else torch.empty_like(x2),
        grad(weight, c),
        grad(bias, c),
        grad(add, n, c),
        grad(scale, n, c),
        grad(shift, n, c),
    )


def _group_norm_silu_bwd_strict(*args):
    return _group_norm_silu_bwd(*args[:-1])


def _group_norm_silu_bwd_add(*args):
    return _group_norm_silu_bwd(*args[:-2])


def _rms_norm_silu_fwd(x, weight, scale, shift, eps, silu):
    rstd = x.new_empty((x.shape[0], math.prod(x.shape[2:])), dtype=torch.float32)
    return torch.empty_like(x), rstd


def _rms_norm_silu_bwd(dy, x, weight, scale, shift, rstd, silu):
    def grad(operand):  # absent operands have gradients of shape (0,)
        shape = (0,) if operand is None else operand.shape
        return x.new_empty(shape, dtype=torch.float32)

    return torch.empty_like(x), grad(weight), grad(scale), grad(shift)


def _attention_fwd(q, k, v, scale):
    out = empty_heads(q, q.shape[2], v.shape[3])
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


def _attention_bwd(dout, q, k, v, out, lse, scale):
    return tuple(empty_heads(t, t.shape[2], t.shape[3]) for t in (q, k, v))


def _attention_qkv_fwd(qkv, heads, order, scale):
    n, s, channels = qkv.shape
    return qkv.new_empty((n, s, channels // 3)), qkv.new_empty((n, heads, s), dtype=torch.float32)


def _attention_qkv_bwd(dout, qkv, out, lse, heads, order, scale):
    return torch.empty_like(qkv)


def _reverse_step_fwd(x, model_out, coeffs, step, seed, noise, clip, offset):
    return torch.empty_like(x)


def _writes_its_results(*args):
    return None


LOSSES = ("l1", "l2", "huber")  # the schemas' int loss, as csrc/kernels.h numbers them


def _forward_noise_fwd(x_t, x0, coeffs, t, seed, step, noise, offset):
    return None


def _forward_noise_loss_fwd(model_out, x0, coeffs, t, weights, seed, step, noise, offset, loss):
    return model_out.new_empty((model_out.shape[0],), dtype=torch.float32)


def _forward_noise_loss_grad_fwd(model_out, *args):
    losses = _forward_noise_loss_fwd(model_out, *args[:-1])
    return losses.new_empty(()) if args[-1] else losses, torch.empty_like(model_out)


def _forward_noise_loss_bwd(
    dloss, model_out, x0, coeffs, t, weights, seed, step, noise, offset, loss
):
    return torch.empty_like(model_out)


# Native on the CPU alone, like all convolutions: their schemas stand in csrc/ops_conv2d*.cpp.
def _conv2d_winograd_fwd(x, x2, weight, bias, add, upsample):
    n, _, height, width = x.shape
    times = 2 if upsample else 1
    return x.new_empty((n, times * height, times * width, 16 * weight.shape[0])).permute(0, 3, 1, 2)


def _conv2d_winograd_weight(weight, transposed):
    k, c = weight.shape[:2]
    k, c = (c, k) if transposed else (k, c)
    return weight.new_empty((k // 16, 16, c, 16))


def _conv2d_bf16_fwd(
    x, x2, x3, x4, weight, bias, add, out_channels, kernel, stride, padding, upsample
):
    def length(n):
        return 2 * n if upsample else (n + 2 * padding - kernel) // stride + 1

    shape = x.shape[0], length(x.shape[2]), length(x.shape[3]), out_channels
    return x.new_empty(shape).permute(0, 3, 1, 2)


def _linear_bf16_fwd(x, weight, bias, add, out_features):
    return x.new_empty((*x.shape[:-1], out_features))


def _conv2d_winograd_bwd_weight(dy, x, channels_last, bias):
    k, c = dy.shape[1], x.shape[1]
    shape = (k, 3, 3, c) if channels_last else (k, c, 3, 3)
    dweight = x.new_empty(shape)
    return dweight.permute(0, 3, 1, 2) if channels_last else dweight, x.new_empty(k if bias else 0)


def _noise_fwd(out, seed, step, stream, offset):
    return None


FAKES = {
    "group_norm_silu_fwd": _group_norm_silu_fwd,
    "group_norm_silu_fwd_cluster": _group_norm_silu_fwd_strict,
    "group_norm_silu_fwd_blocked": _group_norm_silu_fwd_strict,
    "group_norm_silu_bwd": _group_norm_silu_bwd,
    "group_norm_silu_bwd_blocked": _group_norm_silu_bwd_strict,
    "group_norm_silu_bwd_add": _group_norm_silu_bwd_add,
    "rms_norm_silu_fwd": _rms_norm_silu_fwd,
    "rms_norm_silu_bwd": _rms_norm_silu_bwd,
    "attention_fwd": _attention_fwd,
    "attention_bwd": _attention_bwd,
    "attention_qkv_fwd": _attention_qkv_fwd,
    "attention_qkv_bwd": _attention_qkv_bwd,
    "reverse_step_fwd": _reverse_step_fwd,
    "reverse_step_general_fwd": _writes_its_results,
    "reverse_step_threshold_fwd": _writes_its_results,
    "forward_noise_fwd": _forward_noise_fwd,
    "forward_noise_loss_fwd": _forward_noise_loss_fwd,
    "forward_noise_loss_grad_fwd": _forward_noise_loss_grad_fwd,
    "forward_noise_loss_bwd": _forward_noise_loss_bwd,
    "conv2d_winograd_fwd": _conv2d_winograd_fwd,
    "conv2d_winograd_weight": _conv2d_winograd_weight,
    "conv2d_bf16_fwd": _conv2d_bf16_fwd,
    "linear_bf16_fwd": _linear_bf16_fwd,
    "conv2d_winograd_bwd_weight": _conv2d_winograd_bwd_weight,
    "noise_fwd": _noise_fwd,
}


def register_fakes(namespace: str, ops: tuple[str, ...]) -> None:
    for op in ops:
        torch.library.register_fake(f"{namespace}::{op}", FAKES[op])


def define(namespace: str, functions: dict) -> torch.library.Library:
    """Registers Python launchers (op name → function) for CPU and CUDA; keep the result alive."""
    library = torch.library.Library(namespace, "FRAGMENT")
    for op, function in functions.items():
        library.define(op + SCHEMAS[op])
        library.impl(op, function, "CPU")
        library.impl(op, function, "CUDA")
    register_fakes(namespace, tuple(functions))
    return library

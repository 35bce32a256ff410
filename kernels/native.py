"""The C++ back end: loads engine/_C and names its ops. One library for CPU and CUDA tensors."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from . import conv2d_bf16
from .boundary import NATIVE, eps_refusals, mixed, register_fakes

OPS = (
    "group_norm_silu_fwd",
    "group_norm_silu_bwd",
    "group_norm_silu_bwd_add",
    "rms_norm_silu_fwd",
    "rms_norm_silu_bwd",
    "attention_fwd",
    "attention_bwd",
    "attention_qkv_fwd",
    "attention_qkv_bwd",
    "reverse_step_fwd",
    "reverse_step_general_fwd",
    "reverse_step_threshold_fwd",
    "forward_noise_fwd",
    "forward_noise_loss_fwd",
    "forward_noise_loss_grad_fwd",
    "forward_noise_loss_bwd",
    "conv2d_winograd_fwd",
    "conv2d_winograd_weight",
    "conv2d_bf16_fwd",
    "linear_bf16_fwd",
    "conv2d_winograd_bwd_weight",
    "noise_fwd",
)
# CUDA tensors have no kernel of them.
CPU_OPS = (
    "group_norm_silu_bwd_add",
    "rms_norm_silu_fwd",
    "rms_norm_silu_bwd",
    "attention_fwd",
    "attention_bwd",
    "attention_qkv_fwd",
    "attention_qkv_bwd",
    "forward_noise_loss_grad_fwd",
    "conv2d_winograd_fwd",
    "conv2d_winograd_weight",
    "conv2d_bf16_fwd",
    "linear_bf16_fwd",
    "conv2d_winograd_bwd_weight",
)
MAX_SCALE = 1e38  # of attention: times log2 e, still a float32
# GPUs, by name, where test_clusters (tests/test_group_norm_silu_plan.py) passed;
# there large contiguous groups take it. No GPU has run it yet: it is compiled, and not taken.
CLUSTERS: tuple[str, ...] = ()
# The same of test_blocked and the cooperative kernel, for groups that a cluster does not hold.
BLOCKED: tuple[str, ...] = ()
BLOCKED_OPS = ("group_norm_silu_fwd_blocked", "group_norm_silu_bwd_blocked")
CLUSTER_BYTES = 8 * 48 * 1024  # of x in the largest group: csrc/cuda/group_norm_silu_cluster.cu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BUILD = "pip install -e . --no-build-isolation"


def _candidates() -> list[Path]:
    """Where the library may lie: beside this package, or, when the source tree shadows an
    installed package, in another `engine` folder on sys.path."""
    here = Path(__file__).resolve().parent
    folders = [here.parent / "engine", here.parent]
    folders += [Path(p, "engine").resolve() for p in sys.path]
    return [path for folder in dict.fromkeys(folders) for path in sorted(folder.glob("_C*.so"))]


def _load() -> str | None:
    """Loads the library once; returns why it could not."""
    failures = []
    for path in _candidates():
        try:
            torch.ops.load_library(path)
        except (OSError, RuntimeError) as error:
            failures.append(f"{path} does not load ({error.__cause__ or error})")
            continue
        register_fakes(NATIVE, (*OPS, "group_norm_silu_fwd_cluster", *BLOCKED_OPS))
        return None
    found = "; ".join(failures) or "the extension engine/_C is not built"
    return f"{found}: run `make build` or `{BUILD}`"


_REASON = _load()


def available() -> str | None:
    """None when the extension is loaded, else a sentence that says why not and how to build it."""
    return _REASON


def refusals(op: str, *args) -> list[str]:
    """Why this call cannot be served; empty when it can. args: those of <op>_fwd."""
    if f"{op}_fwd" not in OPS:
        return [f"has no {op} kernel"]
    if _REASON is not None:
        return [_REASON]
    if not args[0].is_cpu:
        if not args[0].is_cuda:
            return [f"needs a CPU or CUDA tensor, got {args[0].device.type}"]
        if f"{op}_fwd" in CPU_OPS:
            return [f"has no {op} kernel for CUDA tensors: triton has"]
        if not has_cuda():
            return ["was built without CUDA (no toolkit with nvcc was found then)"]
    for t in args:
        if isinstance(t, Tensor) and t.dtype not in DTYPES and t.is_floating_point():
            return [f"needs float32, bfloat16 or float16, got {t.dtype}"]
    if op == "group_norm_silu" and args[1] is not None:
        return pair_refusals(args[0], args[1])
    if op == "rms_norm_silu":
        return eps_refusals(args[4])
    if op == "attention" and not abs(args[3]) <= MAX_SCALE:
        return [f"scale {args[3]} is not within ±{MAX_SCALE:g}"]
    return []


def pair_refusals(x: Tensor, x2: Tensor) -> list[str]:
    """Why x and x2 are not read as one tensor."""
    return ["needs both halves of x in one layout"] if mixed(x, x2) else []


def has_cuda() -> bool:
    """Whether the library holds the CUDA kernels."""
    return _REASON is None and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"{NATIVE}::noise_fwd", "CUDA"
    )


def group_norm_silu_fwd(
    x: Tensor,  # (N, C, *S), or of a pair (N, C - C2, *S)
    x2: Tensor | None,  # (N, C2, *S)
    weight: Tensor | None,  # (C,), like bias
    bias: Tensor | None,
    add: Tensor | None,  # (N, C), like scale and shift
    scale: Tensor | None,
    shift: Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # y (N, C, *S) like x; mean, rstd (N, G) float32
    args = x, x2, weight, bias, add, scale, shift, num_groups, eps, silu
    if (CLUSTERS or BLOCKED) and x.is_cuda:
        clusters, blocked = _proven(x.device)
        elements = x.numel() + (x2.numel() if x2 is not None else 0)
        if blocked and elements * x.itemsize > CLUSTER_BYTES * x.shape[0] * num_groups:
            return torch.ops.engine.group_norm_silu_fwd_blocked.default(*args, False)
        if clusters:
            return torch.ops.engine.group_norm_silu_fwd_cluster.default(*args, False)
    return torch.ops.engine.group_norm_silu_fwd.default(*args)


def _proven(device: torch.device) -> tuple[bool, bool]:
    """Whether the clusters, and the cooperative kernel, may be taken on this GPU."""
    name = torch.cuda.get_device_name(device)
    return name in CLUSTERS, name in BLOCKED


_proven._dynamo_marked_constant = True  # as dispatch._constant: no import of Dynamo


def notes(op: str, device: torch.device) -> list[str]:
    """What `explain` adds: kernels that are there and are not taken."""
    if op != "group_norm_silu" or device.type != "cuda":
        return []
    kernels = "kernel of thread-block clusters", "cooperative kernel that reads x again from L2"
    return [
        f"native has a {kernel} for large groups; it is not taken: no test has run it on this "
        "kind of GPU"
        for kernel, proven in zip(kernels, _proven(device), strict=True)
        if not proven
    ]


def group_norm_silu_bwd(
    dy: Tensor,  # (N, C, *S), either layout
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,  # (N, G) float32, like rstd
    rstd: Tensor,
    num_groups: int,
    silu: bool,
) -> tuple[
    Tensor, ...
]:  # dx, dx2, dweight, dbias, dadd, dscale, dshift; (0,) for an absent operand
    args = dy, x, x2, weight, bias, add, scale, shift, mean, rstd, num_groups, silu
    if BLOCKED and x.is_cuda and _proven(x.device)[1]:
        return torch.ops.engine.group_norm_silu_bwd_blocked.default(*args, False)
    return torch.ops.engine.group_norm_silu_bwd.default(*args)


def group_norm_silu_bwd_add(*args) -> tuple[Tensor, ...]:
    """As group_norm_silu_bwd, on the CPU; dx_add and, of a pair, dx2_add, in the layouts of x and
    x2, come last: what is added to dx and dx2 before they are rounded."""
    return torch.ops.engine.group_norm_silu_bwd_add.default(*args)


def rms_norm_silu_fwd(
    x: Tensor,  # (N, C, *S) dense contiguous or channels_last
    weight: Tensor | None,  # (C,)
    scale: Tensor | None,  # (N, C) any row stride, like shift
    shift: Tensor | None,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:  # y like x; rstd (N, S) float32
    return torch.ops.engine.rms_norm_silu_fwd.default(x, weight, scale, shift, eps, silu)


def rms_norm_silu_bwd(
    dy: Tensor,  # (N, C, *S), either layout
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    rstd: Tensor,  # (N, S) float32
    silu: bool,
) -> tuple[Tensor, ...]:  # dx, dweight, dscale, dshift; (0,) for an absent operand
    return torch.ops.engine.rms_norm_silu_bwd.default(dy, x, weight, scale, shift, rstd, silu)


def attention_fwd(
    q: Tensor,  # (N, heads, S, D) any strides
    k: Tensor,  # (N, heads, Sk, D), like v
    v: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # out (N, heads, S, D) of memory (N, S, heads, D); lse float32
    return torch.ops.engine.attention_fwd.default(q, k, v, scale)


def attention_bwd(
    dout: Tensor,  # (N, heads, S, D) any strides
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,  # (N, heads, S) float32
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # dq, dk, dv, in memory as out
    return torch.ops.engine.attention_bwd.default(dout, q, k, v, out, lse, scale)


def attention_qkv_fwd(
    qkv: Tensor,  # (N, S, 3·heads·D) any strides
    heads: int,
    order: str,
    scale: float,
) -> tuple[Tensor, Tensor]:  # out (N, S, heads·D), lse (N, heads, S) float32
    return torch.ops.engine.attention_qkv_fwd.default(qkv, heads, order, scale)


def attention_qkv_bwd(
    dout: Tensor,  # (N, S, heads·D) any strides
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: int,
    order: str,
    scale: float,
) -> Tensor:  # dqkv, like qkv
    return torch.ops.engine.attention_qkv_bwd.default(dout, qkv, out, lse, heads, order, scale)


def reverse_step_fwd(
    x: Tensor,  # (N, C, *S), like model_out and noise
    model_out: Tensor,
    coeffs: Tensor,  # (n_steps, 5 or 10) float32
    step: Tensor,  # one int64, like seed
    seed: Tensor | None,
    noise: Tensor | None,
    clip: float,
    offset: int,
) -> Tensor:  # like x
    return torch.ops.engine.reverse_step_fwd.default(
        x, model_out, coeffs, step, seed, noise, clip, offset
    )


def reverse_step_general_fwd(
    x_next: Tensor,  # written, like x0 and model_in; all dense, in x's layout
    x0: Tensor | None,
    model_in: Tensor | None,
    x: Tensor,  # (N, C, *S), like grad, x0_prev and noise
    model_out: Tensor,  # (N, C or 2·C, *S), like uncond
    uncond: Tensor | None,
    grad: Tensor | None,
    x0_prev: Tensor | None,
    threshold: Tensor | None,  # (N,) float32
    coeffs: Tensor,  # (n_steps, 5 or 10) float32
    step: Tensor,  # one int64, like seed
    seed: Tensor | None,
    noise: Tensor | None,
    guidance: float,
    clip: float,
    offset: int,
) -> None:
    torch.ops.engine.reverse_step_general_fwd.default(
        *(x_next, x0, model_in, x, model_out, uncond, grad, x0_prev, threshold, coeffs, step),
        *(seed, noise, guidance, clip, offset),
    )


def reverse_step_threshold_fwd(
    threshold: Tensor,  # (N,) float32, written
    x: Tensor,  # as in reverse_step_general_fwd
    model_out: Tensor,
    uncond: Tensor | None,
    grad: Tensor | None,
    coeffs: Tensor,
    step: Tensor,
    guidance: float,
    quantile: float,
) -> None:
    torch.ops.engine.reverse_step_threshold_fwd.default(
        threshold, x, model_out, uncond, grad, coeffs, step, guidance, quantile
    )


def conv2d_winograd_fwd(
    x: Tensor,  # (N, C - C2, H, W) float32, channels_last, like x2 and add; on the CPU
    x2: Tensor | None,  # (N, C2, H, W)
    weight: Tensor,  # engine/winograd.py packs it
    bias: Tensor | None,  # (K,) float32
    add: Tensor | None,  # like the result
    upsample: bool,
) -> Tensor:  # (N, K, H, W), of 2 H and 2 W with upsample
    return torch.ops.engine.conv2d_winograd_fwd.default(x, x2, weight, bias, add, upsample)


def conv2d_winograd_weight(
    weight: Tensor,  # (K, C, 3, 3) float32 on the CPU
    transposed: bool,  # of the convolution that takes dy to dx
) -> Tensor:
    return torch.ops.engine.conv2d_winograd_weight.default(weight, transposed)


def conv2d_bf16_level() -> int:
    """3 where the library is there, and the CPU, its system and ATEN_CPU_CAPABILITY grant AMX, 2
    where they grant AVX512_BF16 alone, else 0."""
    return 0 if _REASON else torch.ops.engine.conv2d_bf16_level()


pack_conv2d_bf16 = conv2d_bf16.pack


def conv2d_bf16_fwd(
    x: Tensor,  # (N, C, H, W) bfloat16 channels_last, like all images
    x2: Tensor | None,  # (N, C2, H, W), whose channels follow those of x
    x3: Tensor | None,  # (N, C3, H', W') of the result's size: of a 1×1 convolution, like x4
    x4: Tensor | None,
    weight: Tensor,  # conv2d_bf16.pack of each, concatenated along dimension 1
    bias: Tensor | None,  # (out_channels,) float32
    add: Tensor | None,  # like the result
    out_channels: int,
    kernel: int,  # 3 or 1
    stride: int,
    padding: int,
    upsample: bool,  # x and x2 are read as if each pixel were 2×2
) -> Tensor:  # (N, out_channels, H', W') channels_last
    return torch.ops.engine.conv2d_bf16_fwd.default(
        *(x, x2, x3, x4, weight, bias, add, out_channels, kernel, stride, padding, upsample)
    )


def linear_bf16_fwd(
    x: Tensor,  # (…, C) bfloat16 contiguous
    weight: Tensor,  # conv2d_bf16.pack
    bias: Tensor | None,  # (out_features,) float32
    add: Tensor | None,  # like the result
    out_features: int,
) -> Tensor:  # (…, out_features)
    return torch.ops.engine.linear_bf16_fwd.default(x, weight, bias, add, out_features)


def conv2d_winograd_bwd_weight(
    dy: Tensor,  # (N, K, H, W) float32, channels_last, like x; on the CPU
    x: Tensor,  # (N, C, H, W)
    channels_last: bool,  # layout of dweight; else contiguous
    bias: bool,  # whether dbias is wanted
) -> tuple[Tensor, Tensor]:  # dweight (K, C, 3, 3), dbias (K,) or (0,)
    return torch.ops.engine.conv2d_winograd_bwd_weight.default(dy, x, channels_last, bias)


def noise_fwd(out: Tensor, seed: Tensor, step: Tensor, stream: int, offset: int) -> None:
    torch.ops.engine.noise_fwd.default(out, seed, step, stream, offset)


def forward_noise_fwd(
    x_t: Tensor,  # (N, C, *S), written; like x0 and noise in either layout
    x0: Tensor,  # uint8 too
    coeffs: Tensor,  # (T, 4) float32
    t: Tensor,  # (N,) int64
    seed: Tensor | None,  # one int64, like step
    step: Tensor | None,
    noise: Tensor | None,  # float32
    offset: int,
) -> None:
    torch.ops.engine.forward_noise_fwd.default(x_t, x0, coeffs, t, seed, step, noise, offset)


def forward_noise_loss_fwd(
    model_out: Tensor,  # (N, C, *S), either layout
    x0: Tensor,
    coeffs: Tensor,
    t: Tensor,
    weights: Tensor | None,  # (N,) float32
    seed: Tensor | None,
    step: Tensor | None,
    noise: Tensor | None,
    offset: int,
    loss: int,  # number in boundary.LOSSES
) -> Tensor:  # (N,) float32
    return torch.ops.engine.forward_noise_loss_fwd.default(
        model_out, x0, coeffs, t, weights, seed, step, noise, offset, loss
    )


def forward_noise_loss_grad_fwd(
    model_out, x0, coeffs, t, weights, seed, step, noise, offset, loss, mean
) -> tuple[Tensor, Tensor]:
    """As forward_noise_loss_fwd, on the CPU, or its mean (), and the gradient like model_out."""
    return torch.ops.engine.forward_noise_loss_grad_fwd.default(
        model_out, x0, coeffs, t, weights, seed, step, noise, offset, loss, mean
    )


def forward_noise_loss_bwd(
    dloss: Tensor,  # (N,) float32
    model_out: Tensor,
    x0: Tensor,
    coeffs: Tensor,
    t: Tensor,
    weights: Tensor | None,
    seed: Tensor | None,
    step: Tensor | None,
    noise: Tensor | None,
    offset: int,
    loss: int,
) -> Tensor:  # like model_out
    return torch.ops.engine.forward_noise_loss_bwd.default(
        dloss, model_out, x0, coeffs, t, weights, seed, step, noise, offset, loss
    )


def program_new(constants: list[Tensor], strings: list[str], code: list[int]) -> int:
    """The number of a program, in the language of csrc/ops_program.cpp."""
    return torch.ops.engine.program_new.default(constants, strings, code)


def program_run(number: int, x: Tensor, rows: Tensor) -> Tensor:
    return torch.ops.engine.program_run.default(number, x, rows)


def program_free(number: int) -> None:
    torch.ops.engine.program_free.default(number)


# The optimiser's: on the CPU, and never in a graph that is traced.


def adamw_norm(
    grads: list[Tensor],  # float32 or bfloat16
) -> Tensor:  # () float32: the 2-norm of all of them together
    return torch.ops.engine.adamw_norm.default(grads)


def adamw_step(
    weights: list[Tensor],  # float32, written as all here but the gradients
    grads: list[Tensor],  # float32 or bfloat16
    exp_avgs: list[Tensor],  # float32, in the layout of the weights
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],  # float32, one element each: steps done before this
    averages: list[Tensor],  # float32, in the layout of the weights; or []
    lows: list[Tensor],  # bfloat16, in the layout of the weights; empty tensors: not wanted
    grad_scale: Tensor,  # one float32
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    average_weight: float,
) -> None:
    torch.ops.engine.adamw_step.default(
        *(weights, grads, exp_avgs, exp_avg_sqs, steps, averages, lows, grad_scale),
        *(lr, beta1, beta2, eps, weight_decay, average_weight),
    )

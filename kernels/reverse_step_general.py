"""Triton: the variants of one reverse step, in one launch; dynamic thresholds in one more.

forward   (a, b, c, d, s, e, g0, g1, lo, hi) = coeffs[step]; five columns: the rest is 0
          out = uncond + guidance·(model_out − uncond)
          x0 = bound(a·x + b·out + g0·grad), bound: clamp to ±clip, or clamp to ±m over m, m of the
          sample: max(1, quantile of |x0|)
          var = exp(lo + (hi − lo)·(v + 1)/2), v the second half of model_out's channels, or 1
          x_next = c·x0 + d·x + e·x0_prev + g1·var·grad + s·√var·z
backward  none: the sampler runs under inference_mode
grid      step: programs of BLOCK quads of a sample's elements, in the contiguous order;
          threshold: a program per sample, radix selection on the bits of |x0|, 8 at a time, with
          x0 computed again in each of 5 passes (the operands of a sample stay in the cache)
refused   as reverse_step.py; samples of 2³¹ − 1 elements and more
bound by  one read of each operand, one write of each result

An absent operand is None: a kernel is compiled for each set of operands. Operands may be slices of
larger tensors: element (n, c, s) lies at n·sample + c·pitch + s or, channels_last, at
n·sample + s·pitch + c. x_next may be x's memory: a program reads its elements before it writes
them. Launched with enable_fp_fusion=False (noise.py).
"""

import torch
import triton
import triton.language as tl

from . import boundary
from .noise import normals
from .triton_base import loop_count, programs, rounded

BLOCK = 256  # quads a program
THRESHOLD_BLOCK = 2048  # elements a program looks at in turn
STEP_NOISE = tl.constexpr(0)  # the stream
# Where element i of a sample lies: at i itself, in planes of `pitch`, in rows of `pitch`.
FLAT, PLANES, ROWS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _load(ptr, sample, pitch, n, i, S, mask, LAYOUT: tl.constexpr):
    """Elements i, in the contiguous order, of sample n."""
    if LAYOUT == FLAT:
        at = i
    elif LAYOUT == ROWS:
        at = (i % S) * pitch + i // S
    else:
        at = (i // S) * pitch + i % S
    return tl.load(ptr + n * sample + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _column(coeffs_ptr, step, n_steps, k: tl.constexpr, COLUMNS: tl.constexpr):
    if k >= COLUMNS:
        return 0.0
    else:
        inside = (step >= 0) & (step < n_steps)
        return tl.load(coeffs_ptr + step * COLUMNS + k, mask=inside, other=float("nan"))


@triton.jit
def _unbounded_x0(
    x, model_out_ptr, model_out_sample, model_out_pitch, uncond_ptr, uncond_sample, uncond_pitch,
    grad, coeffs_ptr, step, n_steps, guidance, n, i, S, mask,
    MODEL_OUT: tl.constexpr, UNCOND: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    out = _load(model_out_ptr, model_out_sample, model_out_pitch, n, i, S, mask, MODEL_OUT)
    if uncond_ptr is not None:
        uncond = _load(uncond_ptr, uncond_sample, uncond_pitch, n, i, S, mask, UNCOND)
        out = uncond + guidance * (out - uncond)
    a = _column(coeffs_ptr, step, n_steps, 0, COLUMNS)
    x0 = a * x + _column(coeffs_ptr, step, n_steps, 1, COLUMNS) * out
    if grad is not None:
        x0 += _column(coeffs_ptr, step, n_steps, 6, COLUMNS) * grad
    return x0


@triton.jit
def _reverse_step_general_kernel(
    x_next_ptr, x0_ptr, model_in_ptr,  # None: not wanted
    x_ptr, x_sample, x_pitch,
    model_out_ptr, model_out_sample, model_out_pitch,
    v_ptr,  # None: the variance is the row's; else lies like model_out
    uncond_ptr, uncond_sample, uncond_pitch,
    grad_ptr, grad_sample, grad_pitch,
    x0_prev_ptr, x0_prev_sample, x0_prev_pitch,
    noise_ptr, noise_sample, noise_pitch,  # None: drawn from the key
    threshold_ptr,
    coeffs_ptr, step_ptr, seed_ptr,
    guidance, clip, C, S, n_steps, offset, blocks_of_sample,
    X: tl.constexpr,  # like the next six: FLAT, PLANES or ROWS
    MODEL_OUT: tl.constexpr,
    UNCOND: tl.constexpr,
    GRAD: tl.constexpr,
    X0_PREV: tl.constexpr,
    NOISE: tl.constexpr,
    RESULT: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    n = program // blocks_of_sample
    block = program % blocks_of_sample * BLOCK
    count = C * S
    start = offset + n * count  # number of the sample's first normal; programs cut whole quads
    first = start // 4 + block
    i = 4 * first - start + tl.arange(0, 4 * BLOCK)
    mask = (i >= 0) & (i < count)
    step = tl.load(step_ptr)

    x = _load(x_ptr, x_sample, x_pitch, n, i, S, mask, X)
    if grad_ptr is None:
        grad = None
    else:
        grad = _load(grad_ptr, grad_sample, grad_pitch, n, i, S, mask, GRAD)
    x0 = _unbounded_x0(
        x, model_out_ptr, model_out_sample, model_out_pitch, uncond_ptr, uncond_sample,
        uncond_pitch, grad, coeffs_ptr, step, n_steps, guidance, n, i, S, mask,
        MODEL_OUT, UNCOND, COLUMNS,
    )  # fmt: skip
    if threshold_ptr is None:
        limit = clip
    else:
        limit = tl.load(threshold_ptr + n)
    x0 = tl.where(x0 > limit, limit, x0)  # comparisons are false for NaN: it passes
    x0 = tl.where(x0 < -limit, -limit, x0)
    if threshold_ptr is not None:
        x0 = x0 / limit

    c = _column(coeffs_ptr, step, n_steps, 2, COLUMNS)
    x_next = c * x0 + _column(coeffs_ptr, step, n_steps, 3, COLUMNS) * x
    if x0_prev_ptr is not None:
        e = _column(coeffs_ptr, step, n_steps, 5, COLUMNS)
        if e != 0:
            x_next += e * _load(x0_prev_ptr, x0_prev_sample, x0_prev_pitch, n, i, S, mask, X0_PREV)
    if v_ptr is not None:
        v = _load(v_ptr, model_out_sample, model_out_pitch, n, i, S, mask, MODEL_OUT)
        lo = _column(coeffs_ptr, step, n_steps, 8, COLUMNS)
        hi = _column(coeffs_ptr, step, n_steps, 9, COLUMNS)
        log_var = tl.where(lo != hi, 0.5 * (hi + lo) + 0.5 * (hi - lo) * v, lo)
    if grad is not None:
        push = _column(coeffs_ptr, step, n_steps, 7, COLUMNS) * grad
        if v_ptr is not None:
            push = push * tl.exp(log_var)
        x_next += push
    s = _column(coeffs_ptr, step, n_steps, 4, COLUMNS)
    if s != 0:
        if noise_ptr is None:
            z = normals(tl.load(seed_ptr), step, STEP_NOISE, first + tl.arange(0, BLOCK))
        else:
            z = _load(noise_ptr, noise_sample, noise_pitch, n, i, S, mask, NOISE)
        z = s * z
        if v_ptr is not None:
            z = z * tl.exp(0.5 * log_var)
        x_next += z

    at = i
    if RESULT == ROWS:
        at = (i % S) * C + i // S
    at += n * count
    tl.store(x_next_ptr + at, rounded(x_next, x_next_ptr.dtype.element_ty), mask=mask)
    if x0_ptr is not None:
        tl.store(x0_ptr + at, rounded(x0, x0_ptr.dtype.element_ty), mask=mask)
    if model_in_ptr is not None:
        tl.store(model_in_ptr + at, rounded(x_next, model_in_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _magnitude_bits(
    x_ptr, x_sample, x_pitch, model_out_ptr, model_out_sample, model_out_pitch,
    uncond_ptr, uncond_sample, uncond_pitch, grad_ptr, grad_sample, grad_pitch,
    coeffs_ptr, step, n_steps, guidance, n, i, S, mask,
    X: tl.constexpr, MODEL_OUT: tl.constexpr, UNCOND: tl.constexpr, GRAD: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    x = _load(x_ptr, x_sample, x_pitch, n, i, S, mask, X)
    if grad_ptr is None:
        grad = None
    else:
        grad = _load(grad_ptr, grad_sample, grad_pitch, n, i, S, mask, GRAD)
    x0 = _unbounded_x0(
        x, model_out_ptr, model_out_sample, model_out_pitch, uncond_ptr, uncond_sample,
        uncond_pitch, grad, coeffs_ptr, step, n_steps, guidance, n, i, S, mask,
        MODEL_OUT, UNCOND, COLUMNS,
    )  # fmt: skip
    return x0.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _reverse_step_threshold_kernel(
    threshold_ptr,
    x_ptr, x_sample, x_pitch,
    model_out_ptr, model_out_sample, model_out_pitch,
    uncond_ptr, uncond_sample, uncond_pitch,
    grad_ptr, grad_sample, grad_pitch,
    coeffs_ptr, step_ptr,
    guidance, fraction, rank, count, S, n_steps,
    blocks,  # cdiv(count, BLOCK)
    X: tl.constexpr,
    MODEL_OUT: tl.constexpr,
    UNCOND: tl.constexpr,
    GRAD: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    step = tl.load(step_ptr)
    bins = tl.arange(0, 256)
    prefix = tl.zeros((), tl.int32)
    left = tl.zeros((), tl.int32) + rank  # among the elements that begin with prefix
    inside = tl.zeros((), tl.int32)  # elements that equal prefix, at last
    nans = tl.zeros((), tl.int32)
    above = tl.zeros((), tl.int32) + 0x7F800000  # the least bits above prefix, at last
    for level in tl.static_range(5):  # 8 bits at a time; the last pass looks for `above`
        counts = tl.zeros((256,), tl.int32)
        for b in range(blocks):
            i = b * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
            mask = i < count
            bits = _magnitude_bits(
                x_ptr, x_sample, x_pitch, model_out_ptr, model_out_sample, model_out_pitch,
                uncond_ptr, uncond_sample, uncond_pitch, grad_ptr, grad_sample, grad_pitch,
                coeffs_ptr, step, n_steps, guidance, n, i, S, mask, X, MODEL_OUT, UNCOND, GRAD,
                COLUMNS,
            )  # fmt: skip
            if level == 4:
                larger = tl.where(mask & (bits > prefix), bits, 0x7F800000)
                above = tl.minimum(above, tl.min(larger, 0))
            else:
                if level == 0:
                    nans += tl.sum((mask & (bits > 0x7F800000)).to(tl.int32), 0)
                    matching = mask
                else:
                    matching = mask & ((bits >> (32 - 8 * level)) == prefix)
                digit = (bits >> (24 - 8 * level)) & 255
                # what does not match is counted as digit 0, and taken off again
                others = BLOCK - tl.sum(matching.to(tl.int32), 0)
                found = tl.histogram(tl.where(matching, digit, 0), 256)
                counts += found - tl.where(bins == 0, others, 0)
        if level < 4:
            upto = tl.cumsum(counts, 0)
            chosen = tl.sum((upto <= left).to(tl.int32), 0)
            below = tl.sum(tl.where(bins < chosen, counts, 0), 0)
            inside = tl.sum(tl.where(bins == chosen, counts, 0), 0)
            prefix = (prefix << 8) | chosen
            left -= below
    low = prefix.to(tl.float32, bitcast=True)
    high = tl.where(left + 1 < inside, prefix, above).to(tl.float32, bitcast=True)
    gap = tl.where((fraction == 0.0) | (high == low), 0.0, high - low)  # not infinity · 0
    value = low + fraction * gap
    # An infinite bound would turn an overflow into a black picture.
    usable = (nans == 0) & (value < float("inf"))
    tl.store(threshold_ptr + n, tl.where(usable, tl.maximum(value, 1.0), float("nan")))


def _described(t: torch.Tensor | None, channels: int, positions: int) -> tuple:
    """→ (pointer, sample, pitch), layout."""
    if t is None:
        return (None, 0, 0), FLAT.value
    sample = t.stride(0)
    inner = [
        (size, stride)
        for size, stride in zip(t.shape[2:], t.stride()[2:], strict=True)
        if size != 1
    ]
    if not inner or inner[-1][1] == 1:
        pitch = t.stride(1) if t.shape[1] > 1 else positions
        return (t, sample, pitch), FLAT.value if pitch == positions else PLANES.value
    return (t, sample, inner[-1][1]), ROWS.value


def reverse_step_general_fwd(
    x_next: torch.Tensor,  # written, like x0 and model_in; all dense, in x's layout
    x0: torch.Tensor | None,
    model_in: torch.Tensor | None,
    x: torch.Tensor,  # (N, C, *S), like grad, x0_prev and noise
    model_out: torch.Tensor,  # (N, C or 2·C, *S), like uncond
    uncond: torch.Tensor | None,
    grad: torch.Tensor | None,
    x0_prev: torch.Tensor | None,
    threshold: torch.Tensor | None,  # (N,) float32
    coeffs: torch.Tensor,  # (n_steps, 5 or 10) float32
    step: torch.Tensor,  # one int64, like seed
    seed: torch.Tensor | None,
    noise: torch.Tensor | None,
    guidance: float,
    clip: float,
    offset: int,
) -> None:
    samples, channels = x.shape[:2]
    count = x.numel() // samples
    positions = count // channels
    operands = [_described(t, channels, positions) for t in (x, model_out, uncond, grad, x0_prev)]
    drawn = _described(noise, channels, positions)
    result = _described(x_next, channels, positions)[1]
    v = model_out[:, channels:] if model_out.shape[1] == 2 * channels else None
    offset = offset if noise is None else 0
    blocks = triton.cdiv(count // 4 + 2, BLOCK)  # a sample may begin and end inside a quad
    with torch.cuda.device_of(x):
        _reverse_step_general_kernel[programs(samples * blocks)](
            *(x_next, x0, model_in, *operands[0][0], *operands[1][0], v, *operands[2][0]),
            *(*operands[3][0], *operands[4][0], *drawn[0], threshold, coeffs, step, seed),
            *(guidance, clip, channels, positions, coeffs.shape[0], offset, blocks),
            X=operands[0][1],
            MODEL_OUT=operands[1][1],
            UNCOND=operands[2][1],
            GRAD=operands[3][1],
            X0_PREV=operands[4][1],
            NOISE=drawn[1],
            RESULT=result,
            COLUMNS=coeffs.shape[1],
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )


def reverse_step_threshold_fwd(
    threshold: torch.Tensor,  # (N,) float32, written
    x: torch.Tensor,  # as in reverse_step_general_fwd
    model_out: torch.Tensor,
    uncond: torch.Tensor | None,
    grad: torch.Tensor | None,
    coeffs: torch.Tensor,
    step: torch.Tensor,
    guidance: float,
    quantile: float,
) -> None:
    samples, channels = x.shape[:2]
    count = x.numel() // samples
    operands = [_described(t, channels, count // channels) for t in (x, model_out, uncond, grad)]
    position = quantile * (count - 1)
    rank = int(position)
    with torch.cuda.device_of(x):
        _reverse_step_threshold_kernel[programs(samples)](
            *(threshold, *operands[0][0], *operands[1][0], *operands[2][0], *operands[3][0]),
            *(coeffs, step, guidance, position - rank, rank, count, count // channels),
            *(coeffs.shape[0], loop_count(triton.cdiv(count, THRESHOLD_BLOCK))),
            X=operands[0][1],
            MODEL_OUT=operands[1][1],
            UNCOND=operands[2][1],
            GRAD=operands[3][1],
            COLUMNS=coeffs.shape[1],
            BLOCK=THRESHOLD_BLOCK,
            num_warps=8,
            enable_fp_fusion=False,
        )


_library = boundary.define(
    boundary.TRITON,
    {
        "reverse_step_general_fwd": reverse_step_general_fwd,
        "reverse_step_threshold_fwd": reverse_step_threshold_fwd,
    },
)

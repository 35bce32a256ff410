"""Triton: one reverse step in one launch.

forward   row = coeffs[step] = (a, b, c, d, s, …);  x0 = clamp(a·x + b·model_out, ±clip)
          x_next = c·x0 + d·x + s·z,  z = noise, or normal offset + i of (seed, step, stream 0)
backward  none: the sampler runs under inference_mode
grid      one program per BLOCK quads of elements, in the contiguous (N, C, *S) order
refused   dtypes other than float32, bfloat16, float16; CPU tensors outside the interpreter
bound by  reads of x and model_out, one write: 6 bytes an element in bf16, 12 in float32

step, seed and the row are read from device memory, so that a captured launch can be replayed with
other values. A noise that is given has x's dtype (ops rounds it). A channels_last tensor is
addressed element by element: the number of its noise is that of the contiguous order whatever the
layout. Launched with enable_fp_fusion=False (noise.py). Variants: reverse_step_general.py.
"""

import torch
import triton
import triton.language as tl

from . import boundary
from . import reverse_step_general as general
from .noise import normals
from .triton_base import programs, rounded
from .triton_base import refusals as base_refusals

BLOCK = 256  # quads a program
STEP_NOISE = tl.constexpr(0)  # the stream


@triton.jit
def _at(i, C, S, CHANNELS_LAST: tl.constexpr):
    """Where element i of the contiguous order lies."""
    if CHANNELS_LAST:
        s = i % S
        nc = i // S
        return ((nc // C) * S + s) * C + nc % C
    else:
        return i


@triton.jit
def _reverse_step_fwd_kernel(
    x_ptr,
    model_out_ptr,
    noise_ptr,  # None: drawn from the key
    x_next_ptr,
    coeffs_ptr,
    step_ptr,
    seed_ptr,  # None: noise is given
    clip,
    n,  # elements
    C,
    S,
    n_steps,
    offset,
    COLUMNS: tl.constexpr,
    X_LAST: tl.constexpr,  # channels_last: x and x_next
    MODEL_OUT_LAST: tl.constexpr,
    NOISE_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    step = tl.load(step_ptr)
    inside = (step >= 0) & (step < n_steps)
    row_ptr = coeffs_ptr + step * COLUMNS
    a = tl.load(row_ptr, mask=inside, other=float("nan"))
    b = tl.load(row_ptr + 1, mask=inside, other=float("nan"))
    c = tl.load(row_ptr + 2, mask=inside, other=float("nan"))
    d = tl.load(row_ptr + 3, mask=inside, other=float("nan"))
    s = tl.load(row_ptr + 4, mask=inside, other=float("nan"))

    # Programs cut the normals at whole quads; element i is normal offset + i.
    first = tl.cast(offset, tl.int64) // 4
    block = tl.program_id(0).to(tl.int64) * BLOCK
    i = 4 * (first + block) - offset + tl.arange(0, 4 * BLOCK)
    mask = (i >= 0) & (i < n)
    x_at = _at(i, C, S, X_LAST)
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    model_out_at = _at(i, C, S, MODEL_OUT_LAST)
    model_out = tl.load(model_out_ptr + model_out_at, mask=mask, other=0.0).to(tl.float32)

    x0 = a * x + b * model_out
    x0 = tl.where(x0 > clip, clip, x0)  # comparisons are false for NaN: it passes
    x0 = tl.where(x0 < -clip, -clip, x0)
    x_next = c * x0 + d * x
    if s != 0:
        if noise_ptr is None:
            quad = first + block + tl.arange(0, BLOCK)
            z = normals(tl.load(seed_ptr), step, STEP_NOISE, quad)
        else:
            z = tl.load(noise_ptr + _at(i, C, S, NOISE_LAST), mask=mask, other=0.0).to(tl.float32)
        x_next += s * z
    tl.store(x_next_ptr + x_at, rounded(x_next, x_next_ptr.dtype.element_ty), mask=mask)


def reverse_step_fwd(
    x: torch.Tensor,  # (N, C, *S) dense contiguous or channels_last
    model_out: torch.Tensor,  # (N, C, *S) either layout
    coeffs: torch.Tensor,  # (n_steps, 5 or 10) float32 contiguous
    step: torch.Tensor,  # (1,) int64
    seed: torch.Tensor | None,  # (1,) int64
    noise: torch.Tensor | None,  # (N, C, *S) either layout
    clip: float,
    offset: int,
) -> torch.Tensor:
    x_next = torch.empty_like(x)
    n, channels = x.numel(), x.shape[1]
    offset = offset if noise is None else 0
    quads = (offset + n + 3) // 4 - offset // 4
    last = [t is not None and not t.is_contiguous() for t in (x, model_out, noise)]
    if noise is not None and all(last):
        last = [False] * 3  # no numbering to keep: any common order will do
    with torch.cuda.device_of(x):
        _reverse_step_fwd_kernel[programs(triton.cdiv(quads, BLOCK))](
            x,
            model_out,
            noise,
            x_next,
            coeffs,
            step,
            seed,
            clip,
            n,
            channels,
            n // (x.shape[0] * channels),
            coeffs.shape[0],
            offset,
            COLUMNS=coeffs.shape[1],
            X_LAST=last[0],
            MODEL_OUT_LAST=last[1],
            NOISE_LAST=last[2],
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return x_next


def refusals(
    op: str, x, model_out, coeffs, step, seed, noise, clip, offset, *operands
) -> list[str]:
    found = base_refusals(x, model_out, noise, *operands)
    if operands and x.numel() // max(x.shape[0], 1) >= 2**31 - 1:
        found.append("a sample has 2^31 - 1 elements or more")
    return found


reverse_step_general_fwd = general.reverse_step_general_fwd
reverse_step_threshold_fwd = general.reverse_step_threshold_fwd


_library = boundary.define(boundary.TRITON, {"reverse_step_fwd": reverse_step_fwd})

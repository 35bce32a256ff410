"""Triton: channel RMS norm with modulation and SiLU, forward (backward: rms_norm_silu_bwd.py).

forward   x̂ = x·rstd, rstd = √C / max(|x|, eps), |x|² = Σ_c x² of a pixel;
          v = x̂·weight·(1 + scale) + shift;  y = v·σ(v)
grid      one program per (n, block of positions) holds all channels of its pixels: x is read once.
          More channels than a tile holds: it walks over them twice, the second time from a cache
saved     rstd (N, S) float32, 4/C bytes an element; making it again would read x, 2 to 4 bytes an
          element. Its sign is free: negative where |x| < eps, for there its gradient is 0
refused   dtypes other than float32, bfloat16, float16; eps < 1e-18; samples of 2³¹ elements; CPU
          tensors outside the interpreter
bound by  bytes: 4 an element in bf16 (x in, y out), 8 in float32; a walk's second look is the L2's
Contiguous, the norm runs over a strided dimension: a row of a tile is a channel's positions.
"""

import torch
import triton
import triton.language as tl

from . import boundary
from .group_norm_silu_tiles import act, affine, channels_last, pointers, row_stride
from .rms_norm_silu_bwd import rms_norm_silu_bwd
from .rms_norm_silu_tiles import load_tile, plan
from .triton_base import loop_count, programs, rounded
from .triton_base import refusals as base_refusals


@triton.jit
def _store_act(
    y_ptr, x, rstd, weight_ptr, scale_ptr, shift_ptr, n, c0, s0, C, S, stride_scalen, stride_shiftn,
    SILU: tl.constexpr, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    c = c0 + tl.arange(0, BLOCK_C)
    mask = (c < C)[:, None] & (tl.arange(0, BLOCK_S) < S - s0)[None, :]
    gain, offset = affine(
        weight_ptr, None, scale_ptr, shift_ptr, n, c, c < C, stride_scalen, stride_shiftn
    )
    y = act(x * rstd[None, :], gain, offset, SILU)
    y_at = pointers(y_ptr, n, c0, s0, C, S, LAST, BLOCK_C, BLOCK_S)
    tl.store(y_at, rounded(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_silu_fwd_kernel(
    x_ptr,  # (N, C, S), or (N, S, C) in memory if LAST; y too
    weight_ptr,  # (C,) or None
    scale_ptr,  # (N, C) with its row stride, or None, like shift
    shift_ptr,
    y_ptr,
    rstd_ptr,  # (N, S)
    stride_scalen,
    stride_shiftn,
    C,
    S,
    eps,
    root_c,  # √C
    CHUNKS,  # of BLOCK_C channels
    WHOLE: tl.constexpr,  # there is one
    SILU: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    blocks = tl.cdiv(S, BLOCK_S)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    s0 = (tl.program_id(0) % blocks) * BLOCK_S
    if WHOLE:
        x = load_tile(x_ptr, n, 0, s0, C, S, LAST, BLOCK_C, BLOCK_S)
        squares = tl.sum(x * x, axis=0)
    else:
        squares = tl.zeros((BLOCK_S,), tl.float32)
        for i in range(CHUNKS):
            x = load_tile(x_ptr, n, i * BLOCK_C, s0, C, S, LAST, BLOCK_C, BLOCK_S)
            squares += tl.sum(x * x, axis=0)
    norm = tl.sqrt_rn(squares)
    clamped = norm < eps  # a NaN is not
    rstd = root_c / tl.where(clamped, eps, norm)
    s = s0 + tl.arange(0, BLOCK_S)
    tl.store(rstd_ptr + n * S + s, tl.where(clamped, -rstd, rstd), mask=s < S)
    if WHOLE:
        _store_act(
            y_ptr, x, rstd, weight_ptr, scale_ptr, shift_ptr, n, 0, s0, C, S,
            stride_scalen, stride_shiftn, SILU, LAST, BLOCK_C, BLOCK_S,
        )  # fmt: skip
    else:
        for i in range(CHUNKS):
            x = load_tile(x_ptr, n, i * BLOCK_C, s0, C, S, LAST, BLOCK_C, BLOCK_S)
            _store_act(
                y_ptr, x, rstd, weight_ptr, scale_ptr, shift_ptr, n, i * BLOCK_C, s0, C, S,
                stride_scalen, stride_shiftn, SILU, LAST, BLOCK_C, BLOCK_S,
            )  # fmt: skip


def rms_norm_silu_fwd(
    x: torch.Tensor,  # (N, C, *S) dense contiguous or channels_last
    weight: torch.Tensor | None,  # (C,)
    scale: torch.Tensor | None,  # (N, C) any row stride, like shift
    shift: torch.Tensor | None,
    eps: float,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # y like x; rstd (N, S) float32
    N, C = x.shape[:2]
    S, last = x.numel() // (N * C), channels_last(x)
    p = plan("fwd", C, S, x.element_size(), (last,))
    y, rstd = torch.empty_like(x), x.new_empty((N, S), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _rms_norm_silu_fwd_kernel[programs(N * triton.cdiv(S, p.block_s))](
            x,
            weight,
            scale,
            shift,
            y,
            rstd,
            row_stride(scale),
            row_stride(shift),
            C,
            S,
            eps,
            C**0.5,
            loop_count(p.chunks),
            WHOLE=p.chunks == 1,
            SILU=silu,
            LAST=last,
            **p.options,
        )
    return y, rstd


def refusals(op: str, x, weight, scale, shift, eps, silu) -> list[str]:
    reasons = base_refusals(x, weight, scale, shift) + boundary.eps_refusals(eps)
    if x.numel() // x.shape[0] >= 2**31:
        reasons.append("has 32-bit offsets: needs fewer than 2^31 elements a sample")
    return reasons


_library = boundary.define(
    boundary.TRITON,
    {"rms_norm_silu_fwd": rms_norm_silu_fwd, "rms_norm_silu_bwd": rms_norm_silu_bwd},
)

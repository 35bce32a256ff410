"""Triton: channel RMS norm with modulation and SiLU, backward.

backward  x̂ = x·|rstd|;  dv = dy·σ(v)·(1 + v·(1 - σ(v)));  γ = weight·(1 + scale)
          P = Σ_c γ·dv·x̂ / C of a pixel, 0 where rstd < 0 (|x| < eps);  dx = |rstd|·(γ·dv - x̂·P)
          per (n, c) over S: A = Σdv, B = Σdv·x̂;  dshift = A;  dscale = weight·B;
          dweight = Σₙ(1 + scale)·B
grid      one program per (n, part of the positions) holds all channels of a block of pixels at a
          time; more channels than a tile holds: one block, walked over twice.
          Then merge, A and B of a sample from its parts, and weight, over n
sums      single writer, fixed order, no atomics: the same bits on every run. A part has up to 8
          tiles: its A and B, 8 bytes a channel, are written and read once
bound by  bytes: 6 an element in bf16 (x, dy in, dx out), 12 in float32
A pixel of one channel has x̂ = ±1: dx is 0 exactly, or |rstd|·γ·dv where rstd < 0.
"""

import torch
import triton
import triton.language as tl

from .group_norm_silu_tiles import (
    act_grad,
    affine,
    channels_last,
    operand,
    plane,
    pointers,
    row_stride,
)
from .rms_norm_silu_tiles import load_tile, plan
from .triton_base import loop_count, programs, rounded

PROGRAMS = 264  # two a processor of an H100: beyond, a program takes several tiles
MAX_TILES = 8
MERGE = tl.constexpr(16)  # parts added at a time
BLOCK_N, BLOCK_OF_C = 32, 32  # tile of the last launch


@triton.jit
def _dx(rstd, dots, gain, dv, x_hat, C, ALONE: tl.constexpr):
    """(BLOCK_C, BLOCK_S), from the sums over all channels (BLOCK_S,)."""
    size = tl.abs(rstd)
    if ALONE:
        return tl.where(rstd < 0, size, 0.0 * size)[None, :] * (gain[:, None] * dv)
    pull = tl.where(rstd < 0, 0.0, dots / tl.cast(C, tl.float32))
    return size[None, :] * (gain[:, None] * dv - x_hat * pull[None, :])


@triton.jit
def _store_tile(
    ptr, value, n, c0, s0, C, S,
    LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    mask = (tl.arange(0, BLOCK_C) < C - c0)[:, None] & (tl.arange(0, BLOCK_S) < S - s0)[None, :]
    at = pointers(ptr, n, c0, s0, C, S, LAST, BLOCK_C, BLOCK_S)
    tl.store(at, rounded(value, ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_sums(ab_ptr, size, at, mask, A, B):
    if ab_ptr is not None:
        tl.store(ab_ptr + at, A, mask=mask)
        tl.store(plane(ab_ptr, 1, size) + at, B, mask=mask)


@triton.jit
def _rms_norm_silu_bwd_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,  # (C,) or None
    scale_ptr,  # (N, C) with its row stride, or None, like shift
    shift_ptr,
    rstd_ptr,  # (N, S)
    dx_ptr,
    ab_ptr,  # (2, N·PARTS, C) or None: A, B of a part
    stride_scalen,
    stride_shiftn,
    ab_size,  # N·PARTS·C
    C,
    S,
    PARTS,
    TILES,  # of BLOCK_S positions in a part
    SILU: tl.constexpr,
    LAST: tl.constexpr,
    DY_LAST: tl.constexpr,
    ALONE: tl.constexpr,  # C is 1
    BLOCK_C: tl.constexpr,  # >= C
    BLOCK_S: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n = row // PARTS
    c = tl.arange(0, BLOCK_C)
    gain, offset = affine(
        weight_ptr, None, scale_ptr, shift_ptr, n, c, c < C, stride_scalen, stride_shiftn
    )
    A = tl.zeros((BLOCK_C,), tl.float32)
    B = tl.zeros((BLOCK_C,), tl.float32)
    for i in range(TILES):
        s0 = ((tl.program_id(0) % PARTS) * TILES + i) * BLOCK_S
        s = s0 + tl.arange(0, BLOCK_S)
        rstd = tl.load(rstd_ptr + n * S + s, mask=s < S, other=0.0)
        x_hat = load_tile(x_ptr, n, 0, s0, C, S, LAST, BLOCK_C, BLOCK_S) * tl.abs(rstd)[None, :]
        dy = load_tile(dy_ptr, n, 0, s0, C, S, DY_LAST, BLOCK_C, BLOCK_S)
        dv = act_grad(dy, x_hat, gain, offset, SILU)  # 0 where masked, as dy is
        A += tl.sum(dv, axis=1)
        B += tl.sum(dv * x_hat, axis=1)
        dots = tl.sum(gain[:, None] * dv * x_hat, axis=0)
        dx = _dx(rstd, dots, gain, dv, x_hat, C, ALONE)
        _store_tile(dx_ptr, dx, n, 0, s0, C, S, LAST, BLOCK_C, BLOCK_S)
    _store_sums(ab_ptr, ab_size, row * C + c, c < C, A, B)


@triton.jit
def _rms_norm_silu_bwd_walk_kernel(
    dy_ptr, x_ptr, weight_ptr, scale_ptr, shift_ptr, rstd_ptr, dx_ptr, ab_ptr,
    stride_scalen, stride_shiftn, ab_size, C, S, PARTS,
    CHUNKS,  # of BLOCK_C channels
    SILU: tl.constexpr, LAST: tl.constexpr, DY_LAST: tl.constexpr, ALONE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """As above, a part of one tile, whose channels do not fit: a look for the sums, one for dx."""
    row = tl.program_id(0).to(tl.int64)
    n = row // PARTS
    s0 = (tl.program_id(0) % PARTS) * BLOCK_S
    s = s0 + tl.arange(0, BLOCK_S)
    rstd = tl.load(rstd_ptr + n * S + s, mask=s < S, other=0.0)
    size = tl.abs(rstd)[None, :]
    dots = tl.zeros((BLOCK_S,), tl.float32)
    for i in range(CHUNKS):
        c = i * BLOCK_C + tl.arange(0, BLOCK_C)
        gain, offset = affine(
            weight_ptr, None, scale_ptr, shift_ptr, n, c, c < C, stride_scalen, stride_shiftn
        )
        x_hat = load_tile(x_ptr, n, i * BLOCK_C, s0, C, S, LAST, BLOCK_C, BLOCK_S) * size
        dy = load_tile(dy_ptr, n, i * BLOCK_C, s0, C, S, DY_LAST, BLOCK_C, BLOCK_S)
        dv = act_grad(dy, x_hat, gain, offset, SILU)
        product = dv * x_hat
        dots += tl.sum(gain[:, None] * product, axis=0)
        A, B = tl.sum(dv, axis=1), tl.sum(product, axis=1)
        _store_sums(ab_ptr, ab_size, row * C + c, c < C, A, B)
    for i in range(CHUNKS):
        c = i * BLOCK_C + tl.arange(0, BLOCK_C)
        gain, offset = affine(
            weight_ptr, None, scale_ptr, shift_ptr, n, c, c < C, stride_scalen, stride_shiftn
        )
        x_hat = load_tile(x_ptr, n, i * BLOCK_C, s0, C, S, LAST, BLOCK_C, BLOCK_S) * size
        dy = load_tile(dy_ptr, n, i * BLOCK_C, s0, C, S, DY_LAST, BLOCK_C, BLOCK_S)
        dv = act_grad(dy, x_hat, gain, offset, SILU)
        dx = _dx(rstd, dots, gain, dv, x_hat, C, ALONE)
        _store_tile(dx_ptr, dx, n, i * BLOCK_C, s0, C, S, LAST, BLOCK_C, BLOCK_S)


@triton.jit
def _rms_norm_silu_merge_kernel(
    weight_ptr,
    ab_ptr,  # (2, N·PARTS, C)
    b_ptr,  # (N, C): B of a sample
    dscale_ptr,  # (N, C) or None, like dshift
    dshift_ptr,
    ab_size,
    C,
    PARTS,
    STEPS,  # of MERGE parts
    BLOCK_C: tl.constexpr,
):
    blocks = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    A = tl.zeros((BLOCK_C,), tl.float32)
    B = tl.zeros((BLOCK_C,), tl.float32)
    for i in range(STEPS):
        part = i * MERGE + tl.arange(0, MERGE)
        at = (n * PARTS + part)[:, None] * C + c[None, :]
        mask = (part < PARTS)[:, None] & (c < C)[None, :]
        A += tl.sum(tl.load(ab_ptr + at, mask=mask, other=0.0), axis=0)
        B += tl.sum(tl.load(plane(ab_ptr, 1, ab_size) + at, mask=mask, other=0.0), axis=0)
    at = n * C + c
    tl.store(b_ptr + at, B, mask=c < C)
    if dshift_ptr is not None:
        tl.store(dshift_ptr + at, A, mask=c < C)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + at, operand(weight_ptr, c, c < C, 1.0) * B, mask=c < C)


@triton.jit
def _rms_norm_silu_weight_kernel(
    scale_ptr,  # (ROWS, C) with its row stride, or None
    b_ptr,  # (ROWS, C)
    dweight_ptr,  # (C,)
    stride_scalen,
    C,
    ROWS,
    STEPS,  # of BLOCK_N rows
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dweight = tl.zeros((BLOCK_C,), tl.float32)
    for i in range(STEPS):
        n = (i * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]).to(tl.int64)
        mask = (n < ROWS) & (c < C)[None, :]
        B = tl.load(b_ptr + n * C + c[None, :], mask=mask, other=0.0)
        gain = 1.0 + operand(scale_ptr, n * stride_scalen + c[None, :], mask, 0.0)
        dweight += tl.sum(gain * B, axis=0)
    tl.store(dweight_ptr + c, dweight, mask=c < C)


def rms_norm_silu_bwd(
    dy: torch.Tensor,  # (N, C, *S) dense contiguous or channels_last
    x: torch.Tensor,  # (N, C, *S) either layout
    weight: torch.Tensor | None,  # (C,)
    scale: torch.Tensor | None,  # (N, C) any row stride, like shift
    shift: torch.Tensor | None,
    rstd: torch.Tensor,  # (N, S)
    silu: bool,
) -> tuple[torch.Tensor, ...]:  # dx; dweight, dscale, dshift float32, (0,) for an absent operand
    N, C = x.shape[:2]
    S, last, dy_last = x.numel() // (N * C), channels_last(x), channels_last(dy)
    p = plan("bwd", C, S, x.element_size(), (last, dy_last))
    blocks = triton.cdiv(S, p.block_s)
    tiles = max(1, min(MAX_TILES, blocks, N * blocks // PROGRAMS)) if p.chunks == 1 else 1
    parts = triton.cdiv(blocks, tiles)

    def workspace(*shape: int) -> torch.Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    dx = torch.empty_like(x)
    dweight, dscale, dshift = (
        None if t is None else workspace(*t.shape) for t in (weight, scale, shift)
    )
    wanted = weight is not None or scale is not None or shift is not None
    ab = workspace(2, N * parts, C) if wanted else None
    sizes = (row_stride(scale), row_stride(shift), N * parts * C, C, S, parts)
    flags = {"SILU": silu, "LAST": last, "DY_LAST": dy_last, "ALONE": C == 1, **p.options}
    with torch.cuda.device_of(x):
        kernel, loops = _rms_norm_silu_bwd_kernel, tiles
        if p.chunks > 1:
            kernel, loops = _rms_norm_silu_bwd_walk_kernel, p.chunks
        kernel[programs(N * parts)](
            dy, x, weight, scale, shift, rstd, dx, ab, *sizes, loop_count(loops), **flags
        )
        rows, b = N * parts, ab[1] if wanted else None
        if scale is not None or shift is not None:
            rows, b = N, workspace(N, C)
            steps = loop_count(triton.cdiv(parts, MERGE.value))
            _rms_norm_silu_merge_kernel[programs(N * triton.cdiv(C, 64))](
                weight, ab, b, dscale, dshift, N * parts * C, C, parts, steps, BLOCK_C=64,
                enable_fp_fusion=True,
            )  # fmt: skip
        if weight is not None:
            steps = loop_count(triton.cdiv(rows, BLOCK_N))
            _rms_norm_silu_weight_kernel[(triton.cdiv(C, BLOCK_OF_C),)](
                scale, b, dweight, row_stride(scale), C, rows, steps,
                BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_OF_C, enable_fp_fusion=True,
            )  # fmt: skip
    return dx, *(workspace(0) if t is None else t for t in (dweight, dscale, dshift))

"""Triton: GroupNorm + SiLU, backward of groups that are too large for one program.

Equations and names: group_norm_silu_bwd.py, which launches these three.
sums      A, B, X of a chunk, one program per (n, slab, channel chunk, position chunk)
merge     A, B, X of a channel, S1, S2 of a group, in a fixed order; one program per (n, slab)
dx        with the grid of sums
"""

import triton
import triton.language as tl

from .group_norm_silu_tiles import (
    act_grad,
    affine,
    by_group,
    channels,
    halves,
    operand,
    place,
    plane,
    pointers,
    store_sums,
)
from .triton_base import rounded

MERGE = tl.constexpr(16)  # chunks added at a time


@triton.jit
def _group_norm_silu_sums_kernel(
    dy_ptr,
    x_ptr,
    x2_ptr,
    weight_ptr,
    bias_ptr,
    add_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    rstd_ptr,
    sums_ptr,  # (3, S_CHUNKS, N·C): A, B, X of a position chunk
    stride_addn,
    stride_scalen,
    stride_shiftn,
    sums_size,  # S_CHUNKS·N·C
    chunk_size,  # N·C
    C,
    CA,
    S,
    G,
    C_CHUNKS,
    S_CHUNKS,
    TILES,
    GROUP: tl.constexpr,
    SILU: tl.constexpr,
    X_LAST: tl.constexpr,
    X2_LAST: tl.constexpr,
    DY_LAST: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    n, g0, chunk_c, chunk_s = place(tl.program_id(0), G, C_CHUNKS, S_CHUNKS, BLOCK_G)
    c, c_mask = channels(g0, chunk_c * BLOCK_C, C, GROUP, BLOCK_G, BLOCK_C)
    c0 = g0 * GROUP + chunk_c * BLOCK_C
    mean = tl.load(mean_ptr + n * G + c // GROUP, mask=c_mask, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + n * G + c // GROUP, mask=c_mask, other=0.0)[:, None]
    add = operand(add_ptr, n * stride_addn + c, c_mask, 0.0)[:, None]
    gain, offset = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, c_mask, stride_scalen, stride_shiftn
    )
    A = tl.zeros((BLOCK_C,), tl.float32)
    B = tl.zeros((BLOCK_C,), tl.float32)
    X = tl.zeros((BLOCK_C,), tl.float32)
    for i in range(TILES):
        s0 = (chunk_s * TILES + i) * BLOCK_S
        mask = c_mask[:, None] & (tl.arange(0, BLOCK_S) < S - s0)[None, :]
        x_at = halves(x_ptr, x2_ptr, n, c0, s0, C, CA, S, X_LAST, X2_LAST, BLOCK_C, BLOCK_S)
        u = tl.load(x_at, mask=mask, other=0.0).to(tl.float32) + add
        dy_at = pointers(dy_ptr, n, c0, s0, C, S, DY_LAST, BLOCK_C, BLOCK_S)
        dy = tl.load(dy_at, mask=mask, other=0.0).to(tl.float32)
        x_hat = tl.where(mask, (u - mean) * rstd, 0.0)
        dv = act_grad(dy, x_hat, gain, offset, SILU)
        A += tl.sum(dv, axis=1)
        B += tl.sum(dv * x_hat, axis=1)
        X += tl.sum(x_hat, axis=1)
    at = chunk_s.to(tl.int64) * chunk_size + n * C + c
    store_sums(sums_ptr, sums_size, at, c_mask, A, B, X)


@triton.jit
def _added(sums_ptr, chunk_size, at, mask, S_CHUNKS, STEPS):
    """Sum over the position chunks, (BLOCK_C,)."""
    total = tl.zeros(mask.shape, tl.float32)
    for i in range(STEPS):
        k = i * MERGE + tl.arange(0, MERGE)[None, :]
        parts = tl.load(
            sums_ptr + at[:, None] + k.to(tl.int64) * chunk_size,
            mask=mask[:, None] & (k < S_CHUNKS),
            other=0.0,
        )
        total += tl.sum(parts, axis=1)
    return total


@triton.jit
def _group_norm_silu_merge_kernel(
    weight_ptr,
    scale_ptr,
    sums_ptr,
    abx_ptr,
    s12_ptr,  # (3, N·G): S1, S2 and the mean of x̂, which is what rounding the mean left
    stride_scalen,
    sums_size,
    chunk_size,  # N·C
    s12_size,  # N·G
    C,
    S,
    G,
    C_CHUNKS,
    S_CHUNKS,
    STEPS,  # of MERGE chunks
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    slabs = tl.cdiv(G, BLOCK_G)
    n = (tl.program_id(0) // slabs).to(tl.int64)
    g0 = (tl.program_id(0) % slabs) * BLOCK_G
    S1 = tl.zeros((BLOCK_G,), tl.float32)
    S2 = tl.zeros((BLOCK_G,), tl.float32)
    rest = tl.zeros((BLOCK_G,), tl.float32)
    for i in range(C_CHUNKS):
        c, mask = channels(g0, i * BLOCK_C, C, GROUP, BLOCK_G, BLOCK_C)
        at = n * C + c
        A = _added(sums_ptr, chunk_size, at, mask, S_CHUNKS, STEPS)
        B = _added(plane(sums_ptr, 1, sums_size), chunk_size, at, mask, S_CHUNKS, STEPS)
        X = _added(plane(sums_ptr, 2, sums_size), chunk_size, at, mask, S_CHUNKS, STEPS)
        store_sums(abx_ptr, chunk_size, at, mask, A, B, X)
        gain = operand(weight_ptr, c, mask, 1.0)
        gain *= 1.0 + operand(scale_ptr, n * stride_scalen + c, mask, 0.0)
        S1 += by_group(gain * A, GROUP, BLOCK_G)
        S2 += by_group(gain * B, GROUP, BLOCK_G)
        rest += by_group(X, GROUP, BLOCK_G)
    rest /= tl.cast(S, tl.float32) * GROUP
    g = g0 + tl.arange(0, BLOCK_G)
    tl.store(s12_ptr + n * G + g, S1, mask=g < G)
    tl.store(plane(s12_ptr, 1, s12_size) + n * G + g, S2 - rest * S1, mask=g < G)
    tl.store(plane(s12_ptr, 2, s12_size) + n * G + g, rest, mask=g < G)


@triton.jit
def _group_norm_silu_dx_kernel(
    dy_ptr,
    x_ptr,
    x2_ptr,
    weight_ptr,
    bias_ptr,
    add_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    rstd_ptr,
    s12_ptr,
    dx_ptr,
    dx2_ptr,
    stride_addn,
    stride_scalen,
    stride_shiftn,
    s12_size,
    C,
    CA,
    S,
    G,
    C_CHUNKS,
    S_CHUNKS,
    TILES,
    GROUP: tl.constexpr,
    SILU: tl.constexpr,
    X_LAST: tl.constexpr,
    X2_LAST: tl.constexpr,
    DY_LAST: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # Backwards: what the sums kernel read last is what the cache still holds.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    n, g0, chunk_c, chunk_s = place(pid, G, C_CHUNKS, S_CHUNKS, BLOCK_G)
    c, c_mask = channels(g0, chunk_c * BLOCK_C, C, GROUP, BLOCK_G, BLOCK_C)
    c0 = g0 * GROUP + chunk_c * BLOCK_C
    row = n * G + c // GROUP
    mean = tl.load(mean_ptr + row, mask=c_mask, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + row, mask=c_mask, other=0.0)[:, None]
    count = tl.cast(S, tl.float32) * GROUP
    S1 = tl.load(s12_ptr + row, mask=c_mask, other=0.0)[:, None] / count
    S2 = tl.load(plane(s12_ptr, 1, s12_size) + row, mask=c_mask, other=0.0)[:, None] / count
    rest = tl.load(plane(s12_ptr, 2, s12_size) + row, mask=c_mask, other=0.0)[:, None]
    add = operand(add_ptr, n * stride_addn + c, c_mask, 0.0)[:, None]
    gain, offset = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, c_mask, stride_scalen, stride_shiftn
    )
    for i in range(TILES):
        s0 = (chunk_s * TILES + i) * BLOCK_S
        mask = c_mask[:, None] & (tl.arange(0, BLOCK_S) < S - s0)[None, :]
        x_at = halves(x_ptr, x2_ptr, n, c0, s0, C, CA, S, X_LAST, X2_LAST, BLOCK_C, BLOCK_S)
        u = tl.load(x_at, mask=mask, other=0.0, eviction_policy="evict_first")
        u = u.to(tl.float32) + add
        dy_at = pointers(dy_ptr, n, c0, s0, C, S, DY_LAST, BLOCK_C, BLOCK_S)
        dy = tl.load(dy_at, mask=mask, other=0.0, eviction_policy="evict_first")
        x_hat = (u - mean) * rstd - rest
        dv = act_grad(dy.to(tl.float32), x_hat, gain, offset, SILU)
        dx = rstd * (gain[:, None] * dv - (S1 + x_hat * S2))
        dx_at = halves(dx_ptr, dx2_ptr, n, c0, s0, C, CA, S, X_LAST, X2_LAST, BLOCK_C, BLOCK_S)
        # Neither is read again here: let them not push out what is.
        tl.store(
            dx_at, rounded(dx, dx_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first"
        )

"""Triton: GroupNorm with conditioning and SiLU, forward (backward: group_norm_silu_bwd.py).

forward   u = x + add;  x̂ = (u - mean)·rstd;  v = (x̂·weight + bias)·(1 + scale) + shift;  y = v·σ(v)
pair      x may be two tensors, concatenated along the channels, each in its own layout
grid      resident: one program per (n, slab of groups), x read once;
          walk: the same, x read again from a cache (group_norm_silu_walk.py);
          large: stats per (n, slab, channel chunk, position chunk), then apply with the same grid
saved     mean, rstd (N, G) float32; centred sums, merged by Chan et al. 1983, never E[x²] - E[x]²
refused   dtypes other than float32, bfloat16, float16; CPU tensors outside the interpreter
bound by  bytes: 4 an element in bf16 resident or walk (x in, y out), 6 large; float32 twice that
"""

import torch
import triton
import triton.language as tl

from . import boundary
from .group_norm_silu_bwd import group_norm_silu_bwd
from .group_norm_silu_plan import Shape, device_of, plan
from .group_norm_silu_tiles import (
    act,
    affine,
    centred,
    channels,
    channels_last,
    halves,
    in_order,
    layouts,
    merged_tile,
    operand,
    place,
    plane,
    pointers,
    row_stride,
    to_channels,
    unless_alone,
)
from .group_norm_silu_walk import _group_norm_silu_walk_kernel
from .triton_base import loop_count, programs, rounded
from .triton_base import refusals as base_refusals


@triton.jit
def _group_norm_silu_fwd_kernel(
    x_ptr,
    x2_ptr,  # (N, C - CA, S) or None
    weight_ptr,  # (C,) or None, like bias
    bias_ptr,
    add_ptr,  # (N, C) with its row stride, or None, like scale and shift
    scale_ptr,
    shift_ptr,
    y_ptr,
    mean_ptr,  # (N, G)
    rstd_ptr,
    stride_addn,
    stride_scalen,
    stride_shiftn,
    C,
    CA,  # channels of x
    S,
    G,
    eps,
    GROUP: tl.constexpr,  # channels of a group
    SILU: tl.constexpr,
    X_LAST: tl.constexpr,
    X2_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    slabs = tl.cdiv(G, BLOCK_G)
    n = (tl.program_id(0) // slabs).to(tl.int64)
    g0 = (tl.program_id(0) % slabs) * BLOCK_G
    c, c_mask = channels(g0, 0, C, GROUP, BLOCK_G, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    mask = c_mask[:, None] & (s < S)[None, :]
    x_at = halves(x_ptr, x2_ptr, n, g0 * GROUP, 0, C, CA, S, X_LAST, X2_LAST, BLOCK_C, BLOCK_S)
    u = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    u += operand(add_ptr, n * stride_addn + c, c_mask, 0.0)[:, None]

    count = tl.cast(S, tl.float32) * GROUP
    mean, rest, d, m2 = centred(u, mask, count, GROUP, BLOCK_G, BLOCK_C)
    rstd = 1.0 / tl.sqrt_rn(m2 / count + eps)
    g = g0 + tl.arange(0, BLOCK_G)
    tl.store(mean_ptr + n * G + g, mean + rest, mask=g < G)
    tl.store(rstd_ptr + n * G + g, rstd, mask=g < G)

    gain, offset = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, c_mask, stride_scalen, stride_shiftn
    )
    rstd = to_channels(unless_alone(rstd, S, GROUP), GROUP, BLOCK_G, BLOCK_C)
    y = act(d * rstd[:, None], gain, offset, SILU)
    y_at = pointers(y_ptr, n, g0 * GROUP, 0, C, S, Y_LAST, BLOCK_C, BLOCK_S)
    tl.store(y_at, rounded(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _group_norm_silu_stats_kernel(
    x_ptr,
    x2_ptr,
    add_ptr,
    stats_ptr,  # (3, N·G, C_CHUNKS·S_CHUNKS): base, mean - base, centred sum of squares
    stride_addn,
    stats_size,  # N·G·C_CHUNKS·S_CHUNKS
    C,
    CA,
    S,
    G,
    C_CHUNKS,
    S_CHUNKS,
    TILES,  # of BLOCK_S positions in a chunk
    GROUP: tl.constexpr,
    X_LAST: tl.constexpr,
    X2_LAST: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    n, g0, chunk_c, chunk_s = place(tl.program_id(0), G, C_CHUNKS, S_CHUNKS, BLOCK_G)
    c, c_mask = channels(g0, chunk_c * BLOCK_C, C, GROUP, BLOCK_G, BLOCK_C)
    c0 = g0 * GROUP + chunk_c * BLOCK_C
    add = operand(add_ptr, n * stride_addn + c, c_mask, 0.0)[:, None]
    width = tl.minimum(BLOCK_C, GROUP - chunk_c * BLOCK_C)  # channels of each group
    count = tl.cast(0.0, tl.float32)
    base = tl.zeros((BLOCK_G,), tl.float32)
    delta = tl.zeros((BLOCK_G,), tl.float32)
    m2 = tl.zeros((BLOCK_G,), tl.float32)
    for i in range(TILES):
        s0 = (chunk_s * TILES + i) * BLOCK_S
        mask = c_mask[:, None] & (tl.arange(0, BLOCK_S) < S - s0)[None, :]
        x_at = halves(x_ptr, x2_ptr, n, c0, s0, C, CA, S, X_LAST, X2_LAST, BLOCK_C, BLOCK_S)
        u = tl.load(x_at, mask=mask, other=0.0).to(tl.float32) + add
        more = (width * tl.maximum(0, tl.minimum(BLOCK_S, S - s0))).to(tl.float32)
        count, base, delta, m2 = merged_tile(
            i == 0, count, base, delta, m2, u, mask, more, GROUP, BLOCK_G, BLOCK_C
        )
    g = g0 + tl.arange(0, BLOCK_G)
    at = (n * G + g) * (C_CHUNKS * S_CHUNKS) + chunk_c * S_CHUNKS + chunk_s
    tl.store(stats_ptr + at, base, mask=g < G)
    tl.store(plane(stats_ptr, 1, stats_size) + at, delta, mask=g < G)
    tl.store(plane(stats_ptr, 2, stats_size) + at, m2, mask=g < G)


@triton.jit
def _merged(
    stats_ptr,
    stats_size,
    row,  # n·G + g, (BLOCK_G,)
    row_mask,
    S,
    C_CHUNKS,
    S_CHUNKS,
    CHUNK_S,  # positions
    GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,  # >= C_CHUNKS·S_CHUNKS
):
    """Chan's merge of all chunks of a group: base, mean - base, variance."""
    chunks = C_CHUNKS * S_CHUNKS
    k = tl.arange(0, BLOCK_K)
    at = (row * chunks)[:, None] + k[None, :]
    mask = row_mask[:, None] & (k < chunks)[None, :]
    base = tl.load(stats_ptr + row * chunks, mask=row_mask, other=0.0)
    delta = tl.load(stats_ptr + at, mask=mask, other=0.0) - base[:, None]
    delta += tl.load(plane(stats_ptr, 1, stats_size) + at, mask=mask, other=0.0)
    m2 = tl.load(plane(stats_ptr, 2, stats_size) + at, mask=mask, other=0.0)
    positions = tl.minimum(CHUNK_S, S - (k % S_CHUNKS) * CHUNK_S)
    width = tl.minimum(BLOCK_C, GROUP - (k // S_CHUNKS) * BLOCK_C)
    count = tl.where(mask, (positions * width).to(tl.float32)[None, :], 0.0)
    total = tl.cast(S, tl.float32) * GROUP
    mean = tl.sum(count * delta, axis=1) / total
    apart = delta - mean[:, None]
    return base, mean, tl.sum(m2 + count * apart * apart, axis=1) / total


@triton.jit
def _group_norm_silu_apply_kernel(
    x_ptr,
    x2_ptr,
    weight_ptr,
    bias_ptr,
    add_ptr,
    scale_ptr,
    shift_ptr,
    stats_ptr,  # from the stats kernel
    y_ptr,
    mean_ptr,
    rstd_ptr,
    stride_addn,
    stride_scalen,
    stride_shiftn,
    stats_size,
    C,
    CA,
    S,
    G,
    eps,
    C_CHUNKS,
    S_CHUNKS,
    TILES,
    GROUP: tl.constexpr,
    SILU: tl.constexpr,
    X_LAST: tl.constexpr,
    X2_LAST: tl.constexpr,
    Y_LAST: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Backwards: what the stats kernel read last is what the cache still holds.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    n, g0, chunk_c, chunk_s = place(pid, G, C_CHUNKS, S_CHUNKS, BLOCK_G)
    g = g0 + tl.arange(0, BLOCK_G)
    base, mean, var = _merged(
        stats_ptr,
        stats_size,
        n * G + g,
        g < G,
        S,
        C_CHUNKS,
        S_CHUNKS,
        TILES * BLOCK_S,
        GROUP,
        BLOCK_C,
        BLOCK_K,
    )
    rstd = 1.0 / tl.sqrt_rn(var + eps)
    if chunk_c + chunk_s == 0:
        tl.store(mean_ptr + n * G + g, base + mean, mask=g < G)
        tl.store(rstd_ptr + n * G + g, rstd, mask=g < G)

    c, c_mask = channels(g0, chunk_c * BLOCK_C, C, GROUP, BLOCK_G, BLOCK_C)
    c0 = g0 * GROUP + chunk_c * BLOCK_C
    add = operand(add_ptr, n * stride_addn + c, c_mask, 0.0)[:, None]
    gain, offset = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, c_mask, stride_scalen, stride_shiftn
    )
    base = to_channels(base, GROUP, BLOCK_G, BLOCK_C)[:, None]
    mean = to_channels(mean, GROUP, BLOCK_G, BLOCK_C)[:, None]
    rstd = to_channels(rstd, GROUP, BLOCK_G, BLOCK_C)[:, None]
    for i in range(TILES):
        s0 = (chunk_s * TILES + i) * BLOCK_S
        mask = c_mask[:, None] & (tl.arange(0, BLOCK_S) < S - s0)[None, :]
        x_at = halves(x_ptr, x2_ptr, n, c0, s0, C, CA, S, X_LAST, X2_LAST, BLOCK_C, BLOCK_S)
        u = tl.load(x_at, mask=mask, other=0.0, eviction_policy="evict_first")
        u = u.to(tl.float32) + add
        y = act(((u - base) - mean) * rstd, gain, offset, SILU)
        y_at = pointers(y_ptr, n, c0, s0, C, S, Y_LAST, BLOCK_C, BLOCK_S)
        # Neither is read again here: let them not push out what is.
        tl.store(y_at, rounded(y, y_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


def group_norm_silu_fwd(
    x: torch.Tensor,  # (N, C, *S) dense contiguous or channels_last
    x2: torch.Tensor | None,  # (N, C2, *S) either layout: the last channels of a pair
    weight: torch.Tensor | None,  # (C,)
    bias: torch.Tensor | None,  # (C,)
    add: torch.Tensor | None,  # (N, C) any row stride, like scale and shift
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # y like x; mean, rstd (N, G) float32
    N, CA, G = x.shape[0], x.shape[1], num_groups
    S = x.numel() // (N * CA)
    if x2 is None:
        C, y = CA, torch.empty_like(x)
    else:
        C, y = CA + x2.shape[1], boundary.empty_like_pair(x, x2)
    lasts, y_last = layouts(x, x2), channels_last(y)
    order = (*in_order(lasts, x, x2), y_last)
    p = plan(Shape("fwd", N, C // G, S, G, x.element_size(), order, C - CA), device_of(x))
    mean = x.new_empty((N, G), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    operands = (x, x2, weight, bias, add, scale, shift)
    strides = (row_stride(add), row_stride(scale), row_stride(shift))
    flags = {"GROUP": C // G, "X_LAST": lasts[0], "X2_LAST": lasts[1], **p.blocks, **p.options}
    out = {"SILU": silu, "Y_LAST": y_last}
    with torch.cuda.device_of(x):
        if p.kind == "walk":
            cuts = (loop_count(p.c_chunks), loop_count(p.tiles))
            _group_norm_silu_walk_kernel[programs(N * p.slabs)](
                *operands, y, mean, rstd, *strides, C, CA, S, G, eps, *cuts, **out, **flags
            )
            return y, mean, rstd
        if p.kind == "resident":
            _group_norm_silu_fwd_kernel[programs(N * p.slabs)](
                *operands, y, mean, rstd, *strides, C, CA, S, G, eps, **out, **flags
            )
            return y, mean, rstd
        chunks = p.c_chunks * p.s_chunks
        grid = programs(N * p.slabs * chunks)
        stats = x.new_empty((3, N * G, chunks), dtype=torch.float32)
        sizes = (stats[0].numel(), C, CA, S, G)
        cuts = (p.c_chunks, p.s_chunks, loop_count(p.tiles))
        _group_norm_silu_stats_kernel[grid](x, x2, add, stats, strides[0], *sizes, *cuts, **flags)
        _group_norm_silu_apply_kernel[grid](
            *operands,
            stats,
            y,
            mean,
            rstd,
            *strides,
            *sizes,
            eps,
            *cuts,
            **out,
            BLOCK_K=triton.next_power_of_2(chunks),
            **flags,
        )
    return y, mean, rstd


def refusals(op: str, x, x2, weight, bias, add, scale, shift, num_groups, eps, silu) -> list[str]:
    reasons = base_refusals(x, x2, weight, bias, add, scale, shift)
    if x.numel() // (x.shape[0] * x.shape[1]) >= 2**31:
        reasons.append("has 32-bit positions: needs fewer than 2^31 a channel")
    return reasons


_library = boundary.define(
    boundary.TRITON,
    {"group_norm_silu_fwd": group_norm_silu_fwd, "group_norm_silu_bwd": group_norm_silu_bwd},
)

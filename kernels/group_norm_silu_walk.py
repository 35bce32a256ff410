"""Triton: GroupNorm + SiLU, a program that walks over its groups twice. Equations:
group_norm_silu.py and group_norm_silu_bwd.py, which launch these two.

grid      one program per (n, slab of groups), one launch: tile by tile it sums, then, last tile
          first, it applies to what is still in a cache. For groups that are too large for registers
          but, times the programs that run at once, not for L2 (`plan`)
bound by  bytes from memory: those of the resident kernels (4 an element in bf16, backward 6); the
          second reading (2, 4) comes from L1 or L2
"""

import triton
import triton.language as tl

from .group_norm_silu_tiles import (
    act,
    act_grad,
    affine,
    by_group,
    channels,
    halves,
    merged_tile,
    operand,
    plane,
    pointers,
    store_sums,
    to_channels,
)
from .triton_base import rounded


@triton.jit
def _group_norm_silu_walk_kernel(
    x_ptr,
    x2_ptr,
    weight_ptr,
    bias_ptr,
    add_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    stride_addn,
    stride_scalen,
    stride_shiftn,
    C,
    CA,
    S,
    G,
    eps,
    C_CHUNKS,  # of BLOCK_C channels of the slab
    TILES,  # of BLOCK_S positions of a chunk
    GROUP: tl.constexpr,
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
    count = tl.cast(0.0, tl.float32)
    base = tl.zeros((BLOCK_G,), tl.float32)
    delta = tl.zeros((BLOCK_G,), tl.float32)
    m2 = tl.zeros((BLOCK_G,), tl.float32)
    for chunk in range(C_CHUNKS):
        c, c_mask = channels(g0, chunk * BLOCK_C, C, GROUP, BLOCK_G, BLOCK_C)
        c0 = g0 * GROUP + chunk * BLOCK_C
        add = operand(add_ptr, n * stride_addn + c, c_mask, 0.0)[:, None]
        width = tl.minimum(BLOCK_C, GROUP - chunk * BLOCK_C)  # channels of each group
        for i in range(TILES):
            s0 = i * BLOCK_S
            mask = c_mask[:, None] & (tl.arange(0, BLOCK_S) < S - s0)[None, :]
            x_at = halves(x_ptr, x2_ptr, n, c0, s0, C, CA, S, X_LAST, X2_LAST, BLOCK_C, BLOCK_S)
            u = tl.load(x_at, mask=mask, other=0.0).to(tl.float32) + add
            more = (width * tl.minimum(BLOCK_S, S - s0)).to(tl.float32)
            count, base, delta, m2 = merged_tile(
                chunk + i == 0, count, base, delta, m2, u, mask, more, GROUP, BLOCK_G, BLOCK_C
            )
    rstd = 1.0 / tl.sqrt_rn(m2 / count + eps)
    g = g0 + tl.arange(0, BLOCK_G)
    tl.store(mean_ptr + n * G + g, base + delta, mask=g < G)
    tl.store(rstd_ptr + n * G + g, rstd, mask=g < G)

    base = to_channels(base, GROUP, BLOCK_G, BLOCK_C)[:, None]
    delta = to_channels(delta, GROUP, BLOCK_G, BLOCK_C)[:, None]
    rstd = to_channels(rstd, GROUP, BLOCK_G, BLOCK_C)[:, None]
    for back in range(C_CHUNKS):
        chunk = C_CHUNKS - 1 - back
        c, c_mask = channels(g0, chunk * BLOCK_C, C, GROUP, BLOCK_G, BLOCK_C)
        c0 = g0 * GROUP + chunk * BLOCK_C
        add = operand(add_ptr, n * stride_addn + c, c_mask, 0.0)[:, None]
        gain, offset = affine(
            weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, c_mask, stride_scalen, stride_shiftn
        )
        for i in range(TILES):
            s0 = (TILES - 1 - i) * BLOCK_S
            mask = c_mask[:, None] & (tl.arange(0, BLOCK_S) < S - s0)[None, :]
            x_at = halves(x_ptr, x2_ptr, n, c0, s0, C, CA, S, X_LAST, X2_LAST, BLOCK_C, BLOCK_S)
            u = tl.load(x_at, mask=mask, other=0.0, eviction_policy="evict_first")
            u = u.to(tl.float32) + add
            y = act(((u - base) - delta) * rstd, gain, offset, SILU)
            y_at = pointers(y_ptr, n, c0, s0, C, S, Y_LAST, BLOCK_C, BLOCK_S)
            tl.store(
                y_at, rounded(y, y_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first"
            )


@triton.jit
def _group_norm_silu_bwd_walk_kernel(
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
    dx_ptr,
    dx2_ptr,
    abx_ptr,  # (3, N, C) or None: A, B, X
    s12_ptr,  # (3, N, G): S1, S2 and the mean of x̂, which is what rounding the mean left
    stride_addn,
    stride_scalen,
    stride_shiftn,
    abx_size,
    s12_size,
    C,
    CA,
    S,
    G,
    C_CHUNKS,
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
    slabs = tl.cdiv(G, BLOCK_G)
    n = (tl.program_id(0) // slabs).to(tl.int64)
    g0 = (tl.program_id(0) % slabs) * BLOCK_G
    S1 = tl.zeros((BLOCK_G,), tl.float32)
    S2 = tl.zeros((BLOCK_G,), tl.float32)
    rest = tl.zeros((BLOCK_G,), tl.float32)
    for chunk in range(C_CHUNKS):
        c, c_mask = channels(g0, chunk * BLOCK_C, C, GROUP, BLOCK_G, BLOCK_C)
        c0 = g0 * GROUP + chunk * BLOCK_C
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
            s0 = i * BLOCK_S
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
        store_sums(abx_ptr, abx_size, n * C + c, c_mask, A, B, X)
        S1 += by_group(gain * A, GROUP, BLOCK_G)
        S2 += by_group(gain * B, GROUP, BLOCK_G)
        rest += by_group(X, GROUP, BLOCK_G)
    count = tl.cast(S, tl.float32) * GROUP
    rest /= count
    S2 -= rest * S1
    g = g0 + tl.arange(0, BLOCK_G)
    tl.store(s12_ptr + n * G + g, S1, mask=g < G)
    tl.store(plane(s12_ptr, 1, s12_size) + n * G + g, S2, mask=g < G)
    tl.store(plane(s12_ptr, 2, s12_size) + n * G + g, rest, mask=g < G)

    S1_c = to_channels(S1 / count, GROUP, BLOCK_G, BLOCK_C)[:, None]
    S2_c = to_channels(S2 / count, GROUP, BLOCK_G, BLOCK_C)[:, None]
    rest_c = to_channels(rest, GROUP, BLOCK_G, BLOCK_C)[:, None]
    for back in range(C_CHUNKS):
        chunk = C_CHUNKS - 1 - back
        c, c_mask = channels(g0, chunk * BLOCK_C, C, GROUP, BLOCK_G, BLOCK_C)
        c0 = g0 * GROUP + chunk * BLOCK_C
        mean = tl.load(mean_ptr + n * G + c // GROUP, mask=c_mask, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + n * G + c // GROUP, mask=c_mask, other=0.0)[:, None]
        add = operand(add_ptr, n * stride_addn + c, c_mask, 0.0)[:, None]
        gain, offset = affine(
            weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, c_mask, stride_scalen, stride_shiftn
        )
        for i in range(TILES):
            s0 = (TILES - 1 - i) * BLOCK_S
            mask = c_mask[:, None] & (tl.arange(0, BLOCK_S) < S - s0)[None, :]
            x_at = halves(x_ptr, x2_ptr, n, c0, s0, C, CA, S, X_LAST, X2_LAST, BLOCK_C, BLOCK_S)
            u = tl.load(x_at, mask=mask, other=0.0, eviction_policy="evict_first")
            dy_at = pointers(dy_ptr, n, c0, s0, C, S, DY_LAST, BLOCK_C, BLOCK_S)
            dy = tl.load(dy_at, mask=mask, other=0.0, eviction_policy="evict_first")
            x_hat = (u.to(tl.float32) + add - mean) * rstd - rest_c
            dv = act_grad(dy.to(tl.float32), x_hat, gain, offset, SILU)
            dx = rstd * (gain[:, None] * dv - (S1_c + x_hat * S2_c))
            dx_at = halves(dx_ptr, dx2_ptr, n, c0, s0, C, CA, S, X_LAST, X2_LAST, BLOCK_C, BLOCK_S)
            tl.store(
                dx_at,
                rounded(dx, dx_ptr.dtype.element_ty),
                mask=mask,
                eviction_policy="evict_first",
            )

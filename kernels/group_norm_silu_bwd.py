"""Triton: GroupNorm with conditioning and SiLU, backward.

backward  dv = dy·σ(v)·(1 + v·(1 - σ(v))), v and x̂ recomputed from x, mean, rstd
          per (n, c) over S: A = Σdv, B = Σdv·x̂, X = Σx̂
          γ = weight·(1 + scale);  per (n, g): S1 = Σγ·A, S2 = Σγ·B;  M = (C/G)·S
          dx = rstd·(γ·dv - (S1 + x̂·S2)/M);  dadd = rstd·(γ·A - (S·S1 + X·S2)/M);  dshift = A
          dscale = weight·B + bias·A;  dweight = Σₙ(1 + scale)·B;  dbias = Σₙ(1 + scale)·A
grid      resident: one program per (n, slab of groups), x and dy read once;
          walk: the same, read again from a cache (group_norm_silu_walk.py);
          large: sums, merge, dx (group_norm_silu_bwd_large.py);
          all end with one small launch per channel block, over n
sums      single writer, fixed order, no atomics: the same bits on every run
bound by  bytes: 6 an element in bf16 resident or walk (x, dy in, dx out), 10 large; float32: twice
x may be a pair (x, x2), each half and dy in its own layout.
"""

import torch
import triton
import triton.language as tl

from .group_norm_silu_bwd_large import (
    MERGE,
    _group_norm_silu_dx_kernel,
    _group_norm_silu_merge_kernel,
    _group_norm_silu_sums_kernel,
)
from .group_norm_silu_plan import Shape, device_of, plan
from .group_norm_silu_tiles import (
    act_grad,
    affine,
    by_group,
    channels,
    channels_last,
    halves,
    in_order,
    layouts,
    operand,
    plane,
    pointers,
    row_stride,
    store_sums,
    to_channels,
    unless_alone,
)
from .group_norm_silu_walk import _group_norm_silu_bwd_walk_kernel
from .triton_base import loop_count, programs, rounded

SMALL_N, SMALL_C = 32, 32  # tile of the last launch


@triton.jit
def _group_norm_silu_bwd_kernel(
    dy_ptr,
    x_ptr,
    x2_ptr,  # (N, C - CA, S) or None, like dx2
    weight_ptr,  # (C,) or None, like bias
    bias_ptr,
    add_ptr,  # (N, C) with its row stride, or None, like scale and shift
    scale_ptr,
    shift_ptr,
    mean_ptr,  # (N, G)
    rstd_ptr,
    dx_ptr,
    dx2_ptr,
    abx_ptr,  # (3, N, C) or None: A, B, X
    s12_ptr,  # (3, N, G) or None: S1, S2, unused
    stride_addn,
    stride_scalen,
    stride_shiftn,
    abx_size,
    s12_size,
    C,
    CA,
    S,
    G,
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
    c, c_mask = channels(g0, 0, C, GROUP, BLOCK_G, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    mask = c_mask[:, None] & (s < S)[None, :]
    x_at = halves(x_ptr, x2_ptr, n, g0 * GROUP, 0, C, CA, S, X_LAST, X2_LAST, BLOCK_C, BLOCK_S)
    x = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    dy_at = pointers(dy_ptr, n, g0 * GROUP, 0, C, S, DY_LAST, BLOCK_C, BLOCK_S)
    dy = tl.load(dy_at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + n * G + c // GROUP, mask=c_mask, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + n * G + c // GROUP, mask=c_mask, other=0.0)[:, None]
    rstd = unless_alone(rstd, S, GROUP)

    u = x + operand(add_ptr, n * stride_addn + c, c_mask, 0.0)[:, None]
    count = tl.cast(S, tl.float32) * GROUP
    d = tl.where(mask, u - mean, 0.0)
    rest = by_group(tl.sum(d, axis=1), GROUP, BLOCK_G) / count  # of rounding the mean
    rest = to_channels(rest, GROUP, BLOCK_G, BLOCK_C)[:, None]
    x_hat = tl.where(mask, (d - rest) * rstd, 0.0)
    gain, offset = affine(
        weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, c_mask, stride_scalen, stride_shiftn
    )
    dv = act_grad(dy, x_hat, gain, offset, SILU)  # 0 where masked, as dy is
    A = tl.sum(dv, axis=1)
    B = tl.sum(dv * x_hat, axis=1)
    X = tl.sum(x_hat, axis=1)
    S1 = by_group(gain * A, GROUP, BLOCK_G)
    S2 = by_group(gain * B, GROUP, BLOCK_G)
    S1_c = to_channels(S1 / count, GROUP, BLOCK_G, BLOCK_C)[:, None]
    S2_c = to_channels(S2 / count, GROUP, BLOCK_G, BLOCK_C)[:, None]
    dx = rstd * (gain[:, None] * dv - (S1_c + x_hat * S2_c))
    dx_at = halves(dx_ptr, dx2_ptr, n, g0 * GROUP, 0, C, CA, S, X_LAST, X2_LAST, BLOCK_C, BLOCK_S)
    tl.store(dx_at, rounded(dx, dx_ptr.dtype.element_ty), mask=mask)
    store_sums(abx_ptr, abx_size, n * C + c, c_mask, A, B, X)
    if s12_ptr is not None:
        g = g0 + tl.arange(0, BLOCK_G)
        tl.store(s12_ptr + n * G + g, S1, mask=g < G)
        tl.store(plane(s12_ptr, 1, s12_size) + n * G + g, S2, mask=g < G)


@triton.jit
def _group_norm_silu_small_kernel(
    weight_ptr,
    bias_ptr,
    scale_ptr,
    rstd_ptr,
    abx_ptr,
    s12_ptr,
    dweight_ptr,  # (C,) or None, like dbias
    dbias_ptr,
    dadd_ptr,  # (N, C) or None, like dscale and dshift
    dscale_ptr,
    dshift_ptr,
    stride_scalen,
    abx_size,
    s12_size,
    C,
    S,
    G,
    N,
    STEPS,  # of BLOCK_N samples
    HAS_REST: tl.constexpr,  # A, B, X were summed before it was known
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    weight = operand(weight_ptr, c, c < C, 1.0)
    bias = operand(bias_ptr, c, c < C, 0.0)
    positions = tl.cast(S, tl.float32)
    dweight = tl.zeros((BLOCK_C,), tl.float32)
    dbias = tl.zeros((BLOCK_C,), tl.float32)
    for i in range(STEPS):
        n = (i * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]).to(tl.int64)
        mask = (n < N) & (c < C)
        at = n * C + c
        A = tl.load(abx_ptr + at, mask=mask, other=0.0)
        B = tl.load(plane(abx_ptr, 1, abx_size) + at, mask=mask, other=0.0)
        row = n * G + c // GROUP
        if HAS_REST:
            rest = tl.load(plane(s12_ptr, 2, s12_size) + row, mask=mask, other=0.0)
            B -= rest * A
        gain = 1.0 + operand(scale_ptr, n * stride_scalen + c, mask, 0.0)
        dweight += tl.sum(gain * B, axis=0)
        dbias += tl.sum(gain * A, axis=0)
        if dshift_ptr is not None:
            tl.store(dshift_ptr + at, A, mask=mask)
        if dscale_ptr is not None:
            tl.store(dscale_ptr + at, weight * B + bias * A, mask=mask)
        if dadd_ptr is not None:
            X = tl.load(plane(abx_ptr, 2, abx_size) + at, mask=mask, other=0.0)
            if HAS_REST:
                X -= rest * positions
            S1 = tl.load(s12_ptr + row, mask=mask, other=0.0)
            S2 = tl.load(plane(s12_ptr, 1, s12_size) + row, mask=mask, other=0.0)
            rstd = unless_alone(tl.load(rstd_ptr + row, mask=mask, other=0.0), S, GROUP)
            mean = (positions * S1 + X * S2) / (positions * GROUP)
            tl.store(dadd_ptr + at, rstd * (weight * gain * A - mean), mask=mask)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + c, dweight, mask=c < C)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + c, dbias, mask=c < C)


def group_norm_silu_bwd(
    dy: torch.Tensor,  # (N, C, *S) dense contiguous or channels_last
    x: torch.Tensor,  # (N, C, *S) either layout
    x2: torch.Tensor | None,  # (N, C2, *S) either layout
    weight: torch.Tensor | None,  # (C,)
    bias: torch.Tensor | None,  # (C,)
    add: torch.Tensor | None,  # (N, C) any row stride, like scale and shift
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    mean: torch.Tensor,  # (N, G)
    rstd: torch.Tensor,  # (N, G)
    num_groups: int,
    silu: bool,
) -> tuple[torch.Tensor, ...]:  # dx, dx2; dweight, dbias, dadd, dscale, dshift float32
    N, C, G, CA = x.shape[0], dy.shape[1], num_groups, x.shape[1]
    S = x.numel() // (N * CA)
    lasts, dy_last = layouts(x, x2), channels_last(dy)
    order = (*in_order(lasts, x, x2), dy_last)
    p = plan(Shape("bwd", N, C // G, S, G, x.element_size(), order, C - CA), device_of(x))

    def grad(like: torch.Tensor | None) -> torch.Tensor | None:
        return None if like is None else x.new_empty(like.shape, dtype=torch.float32)

    def workspace(*shape: int) -> torch.Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    dx, dx2 = torch.empty_like(x), None if x2 is None else torch.empty_like(x2)
    grads = [grad(t) for t in (weight, bias, add, scale, shift)]
    wanted = any(t is not None for t in grads)
    abx = workspace(3, N, C) if wanted else None
    s12 = workspace(3, N, G) if p.kind != "resident" or add is not None else None
    operands = (dy, x, x2, weight, bias, add, scale, shift, mean, rstd)
    strides = (row_stride(add), row_stride(scale), row_stride(shift))
    group = {"GROUP": C // G, "enable_fp_fusion": True}
    flags = {"SILU": silu, "X_LAST": lasts[0], "X2_LAST": lasts[1], "DY_LAST": dy_last}
    flags |= group | p.blocks | p.options
    with torch.cuda.device_of(x):
        if p.kind == "walk":
            cuts = (loop_count(p.c_chunks), loop_count(p.tiles))
            _group_norm_silu_bwd_walk_kernel[programs(N * p.slabs)](
                *operands, dx, dx2, abx, s12, *strides, N * C, N * G, C, CA, S, G, *cuts, **flags
            )
        elif p.kind == "resident":
            _group_norm_silu_bwd_kernel[programs(N * p.slabs)](
                *operands, dx, dx2, abx, s12, *strides, N * C, N * G, C, CA, S, G, **flags
            )
        else:
            grid = programs(N * p.slabs * p.c_chunks * p.s_chunks)
            sums = workspace(3, p.s_chunks, N * C)
            sizes = (sums[0].numel(), N * C)
            cuts = (p.c_chunks, p.s_chunks, loop_count(p.tiles))
            _group_norm_silu_sums_kernel[grid](
                *operands, sums, *strides, *sizes, C, CA, S, G, *cuts, **flags
            )
            steps = loop_count(triton.cdiv(p.s_chunks, MERGE.value))
            cuts_c = (loop_count(p.c_chunks), p.s_chunks, steps)
            blocks = {"BLOCK_G": p.block_g, "BLOCK_C": p.block_c}
            _group_norm_silu_merge_kernel[(N * p.slabs,)](
                weight, scale, sums, abx, s12, strides[1], *sizes, N * G, C, S, G, *cuts_c,
                **group, **blocks,
            )  # fmt: skip
            _group_norm_silu_dx_kernel[grid](
                *operands, s12, dx, dx2, *strides, N * G, C, CA, S, G, *cuts, **flags
            )
        if wanted:
            steps = loop_count(triton.cdiv(N, SMALL_N))
            sizes = (strides[1], N * C, N * G, C, S, G, N, steps)
            blocks = {"HAS_REST": p.kind != "resident", "BLOCK_N": SMALL_N, "BLOCK_C": SMALL_C}
            _group_norm_silu_small_kernel[(triton.cdiv(C, SMALL_C),)](
                weight, bias, scale, rstd, abx, s12, *grads, *sizes, **group, **blocks
            )
    dx2 = x.new_empty((0,)) if x2 is None else dx2
    return dx, dx2, *(workspace(0) if t is None else t for t in grads)

"""Triton: what the forward and the backward of GroupNorm + SiLU share.

A tile is (BLOCK_C channels, BLOCK_S positions) whatever the layout: the offsets make the layout,
and the compiler spreads threads along the dimension that is contiguous. Its channels are a slab of
BLOCK_G whole groups, or a chunk of one group; group_norm_silu_plan.py chooses.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def channels(g0, c0, C, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels (BLOCK_C,) of the slab of groups g0 …, from its c0-th; and which of them exist."""
    i = c0 + tl.arange(0, BLOCK_C)
    c = g0 * GROUP + i
    return c, (i < BLOCK_G * GROUP) & (c < C)


@triton.jit
def pointers(
    ptr,
    n,  # 64-bit
    c0,  # the tile's first channel and position
    s0,
    C,
    S,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Pointers (BLOCK_C, BLOCK_S) to a tile. The tensor may pass 2³¹ elements, a tile's extent not
    (`plan`): only the offset of its corner is 64-bit, which saves registers."""
    i = tl.arange(0, BLOCK_C)[:, None]
    j = tl.arange(0, BLOCK_S)[None, :]
    if CHANNELS_LAST:
        return ptr + (n * S + s0) * C + c0 + (j * C + i)
    else:
        return ptr + (n * C + c0) * S + s0 + (i * S + j)


@triton.jit
def halves(
    a_ptr,
    b_ptr,  # None: a has all channels
    n,
    c0,
    s0,
    C,
    CA,  # channels of a
    S,
    A_LAST: tl.constexpr,
    B_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """`pointers` to a tile of the concatenation of a and b, each in its own layout."""
    if b_ptr is None:
        return pointers(a_ptr, n, c0, s0, C, S, A_LAST, BLOCK_C, BLOCK_S)
    else:
        a = pointers(a_ptr, n, c0, s0, CA, S, A_LAST, BLOCK_C, BLOCK_S)
        b = pointers(b_ptr, n, c0 - CA, s0, C - CA, S, B_LAST, BLOCK_C, BLOCK_S)
        return tl.where((c0 + tl.arange(0, BLOCK_C) < CA)[:, None], a, b)


@triton.jit
def by_group(t, GROUP: tl.constexpr, BLOCK_G: tl.constexpr):
    """Sums of a slab's channels (BLOCK_C,) per group, (BLOCK_G,)."""
    if BLOCK_G == 1:
        return tl.sum(t[None, :], axis=1)
    else:
        g = tl.arange(0, t.shape[0]) // GROUP
        member = g[None, :] == tl.arange(0, BLOCK_G)[:, None]
        return tl.sum(tl.where(member, t[None, :], 0.0), axis=1)


@triton.jit
def to_channels(t, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """The value of each channel's group: (BLOCK_G,) → (BLOCK_C,)"""
    if BLOCK_G == 1:
        return tl.broadcast_to(t, (BLOCK_C,))
    else:
        g = tl.arange(0, BLOCK_C) // GROUP
        member = g[None, :] == tl.arange(0, BLOCK_G)[:, None]
        return tl.sum(tl.where(member, t[:, None], 0.0), axis=0)


@triton.jit
def operand(ptr, at, mask, absent: tl.constexpr):
    """A small operand in float32, (BLOCK_C,); `absent` where there is none."""
    if ptr is None:
        return tl.where(mask, absent, 0.0)
    else:
        return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, n, c, mask, stride_scalen, stride_shiftn):
    """v = x̂·gain + offset: (gain, offset), each (BLOCK_C,)."""
    gain = 1.0 + operand(scale_ptr, n * stride_scalen + c, mask, 0.0)
    offset = operand(bias_ptr, c, mask, 0.0) * gain
    offset += operand(shift_ptr, n * stride_shiftn + c, mask, 0.0)
    return gain * operand(weight_ptr, c, mask, 1.0), offset


@triton.jit
def act(x_hat, gain, offset, SILU: tl.constexpr):
    v = x_hat * gain[:, None] + offset[:, None]
    if SILU:
        v = v / (1.0 + tl.exp(-v))
    return v


@triton.jit
def act_grad(dy, x_hat, gain, offset, SILU: tl.constexpr):
    """dv"""
    if SILU:
        v = x_hat * gain[:, None] + offset[:, None]
        sigmoid = 1.0 / (1.0 + tl.exp(-v))
        dy = dy * sigmoid * (1.0 + v * (1.0 - sigmoid))
    return dy


@triton.jit
def unless_alone(rstd, S, GROUP: tl.constexpr):
    """rstd, or 0 where a group is one element: x̂ and dx are 0 there, exactly.

    Its own rstd, 1/√eps, is large and would multiply what a contracted γ·dv - S1 or an inexact
    division left of a difference of equals.
    """
    if GROUP == 1:
        return tl.where(S == 1, 0.0, rstd)
    else:
        return rstd


@triton.jit
def centred(u, mask, count, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """Per group: mean and what its rounding left; u less both; per group its sum of squares.

    One float32 mean of values near 1000 is off by 3e-5, which is a lot when they differ by 0.01.
    """
    mean = by_group(tl.sum(tl.where(mask, u, 0.0), axis=1), GROUP, BLOCK_G) / count
    d = tl.where(mask, u - to_channels(mean, GROUP, BLOCK_G, BLOCK_C)[:, None], 0.0)
    rest = by_group(tl.sum(d, axis=1), GROUP, BLOCK_G) / count
    d = tl.where(mask, d - to_channels(rest, GROUP, BLOCK_G, BLOCK_C)[:, None], 0.0)
    return mean, rest, d, by_group(tl.sum(d * d, axis=1), GROUP, BLOCK_G)


@triton.jit
def merged_tile(
    first,  # whether this is the first tile
    count,
    base,
    delta,
    m2,
    u,
    mask,
    more,  # elements of each group in this tile
    GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Chan's merge of the tiles before, (count, base, mean - base, centred sum of squares), and
    this one. The mean is kept in two parts to keep its digits."""
    mean_i, rest_i, _d, m2_i = centred(u, mask, tl.maximum(more, 1.0), GROUP, BLOCK_G, BLOCK_C)
    base = tl.where(first, mean_i, base)
    apart = (mean_i - base) + rest_i - delta
    share = more / (count + more)
    return count + more, base, delta + apart * share, m2 + m2_i + apart * apart * count * share


@triton.jit
def plane(ptr, i: tl.constexpr, size):
    """The i-th plane of `size` elements; i·size may pass 2³¹ where `size` does not."""
    return ptr + i * tl.cast(size, tl.int64)


@triton.jit
def store_sums(abx_ptr, size, at, mask, A, B, X):
    """A, B, X in three planes of `size` elements."""
    if abx_ptr is not None:
        tl.store(abx_ptr + at, A, mask=mask)
        tl.store(plane(abx_ptr, 1, size) + at, B, mask=mask)
        tl.store(plane(abx_ptr, 2, size) + at, X, mask=mask)


@triton.jit
def place(pid, G, C_CHUNKS, S_CHUNKS, BLOCK_G: tl.constexpr):
    """Program number → (n, first group, channel chunk, position chunk) of a large launch."""
    chunk_s = pid % S_CHUNKS
    chunk_c = (pid // S_CHUNKS) % C_CHUNKS
    slab = pid // (S_CHUNKS * C_CHUNKS)
    slabs = tl.cdiv(G, BLOCK_G)
    return (slab // slabs).to(tl.int64), (slab % slabs) * BLOCK_G, chunk_c, chunk_s


def channels_last(t: torch.Tensor) -> bool:
    """Whether t is to be read as (N, S, C); where both layouts hold, contiguous."""
    return not t.is_contiguous()


def layouts(x: torch.Tensor, x2: torch.Tensor | None) -> tuple[bool, bool]:
    """channels_last of x and x2; twice that of x where there is no x2."""
    last = channels_last(x)
    return last, last if x2 is None else channels_last(x2)


def in_order(lasts: tuple[bool, bool], x: torch.Tensor, x2: torch.Tensor | None):
    """`layouts`, that of the half with more channels first."""
    return lasts if x2 is None or x.shape[1] >= x2.shape[1] else lasts[::-1]


def row_stride(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.stride(0)

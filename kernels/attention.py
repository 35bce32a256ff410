"""Triton: attention by online softmax, forward (backward: attention_bwd.py).

forward   out = softmax(q kᵀ·scale) v, a block of queries against all keys, block by block:
          s = q kᵀ, negated for a negative scale, which is positive from then on;
          m' = max(m, rowmax s);  p = exp((s - m')·scale);  α = exp((m - m')·scale)
          total = α·total + Σp;  acc = α·acc + p v;  at the end out = acc / total
grid      one program per (block of queries, head)
saved     out and lse = ln Σ exp(q kᵀ·scale) (N, heads, S) float32
refused   head_dim > 512; a scale that is not finite; unequal dtypes, dtypes other than float32,
          bfloat16, float16; CPU tensors outside the interpreter
bound by  4·S·Sk·D flop on tensor cores (float32: in full precision on the other cores) and S·Sk
          exponentials; for short sequences by bytes: q, k, v and out, 2·(S + Sk)·D elements

At most 256 keys in 16 bits go another way: attention_short.py. Any strides but the head
dimension's, which is one for q, k, v (1, or 3 in packed qkv of order "hd3") and 1 for out: packed
qkv is read, and its gradient written, in place. A head is two pieces (attention_tiles.py):
compiled for sm_90 both stay on wgmma, without spills. Above 256 scores are formed 64 columns at a
time.
Source: Dao 2023, FlashAttention-2, alg. 1.
"""

import math

import torch
import triton
import triton.language as tl

from . import boundary
from .attention_bwd import attention_bwd, launch_bwd
from .attention_short import is_short_fwd, short_fwd
from .attention_tiles import (
    MAX_HEAD_DIM,
    add_product,
    head_at,
    head_of,
    load_head,
    no_sums,
    products,
    store_head,
    strides,
    tiles,
    widths,
)
from .triton_base import dot_operand, loop_count, programs
from .triton_base import refusals as base_refusals

LOG2E = tl.constexpr(math.log2(math.e))


MAX_SCALE = 1e38  # times log2 e, still a float32


@triton.jit
def _attention_fwd_kernel(
    q_ptr,  # (N, HEADS, S, D), like out
    k_ptr,  # (N, HEADS, SK, D), like v
    v_ptr,
    out_ptr,
    lse_ptr,  # (N, HEADS, S) contiguous
    stride_qn,  # strides in units of VECTOR
    stride_qh,
    stride_qs,
    stride_kn,
    stride_kh,
    stride_ks,
    stride_vn,
    stride_vh,
    stride_vs,
    stride_outn,
    stride_outh,
    stride_outs,
    scale,
    HEADS,
    S,
    SK,
    STEPS,  # blocks of keys
    VECTOR: tl.constexpr,
    D: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    STRIDE_D: tl.constexpr,  # of q, k and v
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FULL_K: tl.constexpr,  # SK is a multiple of BLOCK_K
    SIGN: tl.constexpr,  # of the scale, which is positive itself
):
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    block, n, h = head_of(tl.program_id(0), tl.cdiv(S, BLOCK_S), HEADS)
    row = block * BLOCK_S + tl.arange(0, BLOCK_S)
    q_ptr, stride_qs = head_at(q_ptr, n, h, stride_qn, stride_qh, stride_qs, VECTOR)
    k_ptr, stride_ks = head_at(k_ptr, n, h, stride_kn, stride_kh, stride_ks, VECTOR)
    v_ptr, stride_vs = head_at(v_ptr, n, h, stride_vn, stride_vh, stride_vs, VECTOR)
    out_ptr, stride_outs = head_at(out_ptr, n, h, stride_outn, stride_outh, stride_outs, VECTOR)
    q0, q1 = load_head(q_ptr, row, stride_qs, S, D, W0, W1, STRIDE_D)
    m = tl.full((BLOCK_S,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_S,), tl.float32)
    acc0, acc1 = no_sums(BLOCK_S, W0, W1)
    for i in range(STEPS):
        col = i * BLOCK_K + tl.arange(0, BLOCK_K)
        k0, k1 = load_head(k_ptr, col, stride_ks, SK, D, W0, W1, STRIDE_D)
        at_q, at_k = (q_ptr, row, stride_qs, S), (k_ptr, col, stride_ks, SK)
        s = products(q0, q1, k0, k1, *at_q, *at_k, D, W1, CHUNK, STRIDE_D, STRIDE_D)
        if SIGN != 1:  # the running maximum is that of the scaled products
            s = s * SIGN
        if not FULL_K:
            s = tl.where((col < SK)[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        # The difference first: scaling large s and m would round each by itself.
        alpha = tl.exp2((m - m_new) * (scale * LOG2E))
        p = tl.exp2((s - m_new[:, None]) * (scale * LOG2E))
        total = total * alpha + tl.sum(p, axis=1)
        acc0 = acc0 * alpha[:, None]
        if W1 > 0:
            acc1 = acc1 * alpha[:, None]
        v0, v1 = load_head(v_ptr, col, stride_vs, SK, D, W0, W1, STRIDE_D)
        acc0, acc1 = add_product(dot_operand(p, dtype), v0, v1, acc0, acc1, W1)
        m = m_new
    acc0 = acc0 / total[:, None]
    if W1 > 0:
        acc1 = acc1 / total[:, None]
    store_head(out_ptr, row, acc0, acc1, stride_outs, S, D, W0, W1, 1)
    lse_ptr += (n * HEADS + h) * S
    tl.store(lse_ptr + row, m * scale + tl.log(total), mask=row < S)


def attention_fwd(
    q: torch.Tensor,  # (N, heads, S, D) stride(-1) == 1
    k: torch.Tensor,  # (N, heads, Sk, D) stride(-1) == 1
    v: torch.Tensor,  # (N, heads, Sk, D) stride(-1) == 1
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # out (N, heads, S, D), lse (N, heads, S) float32
    out = boundary.empty_heads(q, q.shape[2], q.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    launch_fwd(q, k, v, out, lse, scale)
    return out, lse


def launch_fwd(q, k, v, out, lse, scale: float) -> None:
    """Writes out and lse; q, k, v have one stride along D, out stride 1."""
    # A scale that float32 cannot tell from zero is zero, and with sign 0 every product is 0.
    size, sign = (abs(scale), int(math.copysign(1, scale)))
    if size < 2.0**-126:
        size, sign = 1.0, 0
    if is_short_fwd(q, k):
        short_fwd(q, k, v, out, lse, size, sign)
    else:
        long_fwd(q, k, v, out, lse, size, sign)


def long_fwd(q, k, v, out, lse, size: float, sign: int) -> None:
    n, heads, length, _ = q.shape
    keys = k.shape[2]
    t = tiles(q, length, keys, "fwd")
    every, vector = strides(q, k, v, out)
    with torch.cuda.device_of(q):
        _attention_fwd_kernel[programs(triton.cdiv(length, t.fixed) * n * heads)](
            q,
            k,
            v,
            out,
            lse,
            *every,
            size,
            heads,
            length,
            keys,
            loop_count(triton.cdiv(keys, t.moving)),
            VECTOR=vector,
            BLOCK_S=t.fixed,
            BLOCK_K=t.moving,
            FULL_K=keys % t.moving == 0,
            SIGN=sign,
            **widths(q),
            **t.options,
        )


def attention_qkv_fwd(
    qkv: torch.Tensor,  # (N, S, 3·heads·D) stride(-1) == 1
    heads: int,
    order: str,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # out (N, S, heads·D), lse (N, heads, S) float32
    q, k, v = boundary.split_qkv(qkv, heads, order)
    out = boundary.empty_heads(q, q.shape[2], q.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    launch_fwd(q, k, v, out, lse, scale)
    return boundary.merged(out), lse


def attention_qkv_bwd(
    dout: torch.Tensor,  # (N, S, heads·D) stride(-1) == 1
    qkv: torch.Tensor,
    out: torch.Tensor,  # (N, S, heads·D)
    lse: torch.Tensor,
    heads: int,
    order: str,
    scale: float,
) -> torch.Tensor:  # dqkv, like qkv
    dqkv = torch.empty_like(qkv)
    dout, out = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (dout, out))
    q, k, v = boundary.split_qkv(qkv, heads, order)
    launch_bwd(dout, q, k, v, out, lse, *boundary.split_qkv(dqkv, heads, order), scale)
    return dqkv


def refusals(op: str, q, k, v, scale) -> list[str]:
    reasons = base_refusals(q, k, v)
    if q.shape[-1] > MAX_HEAD_DIM:
        reasons.append(f"head_dim {q.shape[-1]} > {MAX_HEAD_DIM}")
    if not abs(scale) <= MAX_SCALE:
        reasons.append(f"scale {scale} is not within ±{MAX_SCALE:g}")
    if v.shape[-1] != q.shape[-1]:
        reasons.append(f"head_dim of v {v.shape[-1]} is not that of q {q.shape[-1]}")
    if not q.dtype == k.dtype == v.dtype:
        reasons.append(f"q, k, v have unequal dtypes: {q.dtype}, {k.dtype}, {v.dtype}")
    return reasons


_library = boundary.define(
    boundary.TRITON,
    {
        "attention_fwd": attention_fwd,
        "attention_bwd": attention_bwd,
        "attention_qkv_fwd": attention_qkv_fwd,
        "attention_qkv_bwd": attention_qkv_bwd,
    },
)

"""Triton: attention of at most 256 keys in 16 bits: whole rows of scores in registers.

forward   s = q kᵀ over D in chunks; m = max s; p = exp((s - m)·scale) / Σ; out = p v, in chunks:
          nothing is rescaled, and the registers hold scores, not sums, whatever D
backward  all keys of a head in one program, which goes through the queries once:
          p = exp(q kᵀ·scale - lse);  dv += pᵀ dout;  dp = dout vᵀ;  δ = rowsum(p ∘ dp), which is
          rowsum(dout ∘ out);  ds = p ∘ (dp - δ);  dk += scale·dsᵀ q;  dq = scale·ds k, complete
grid      forward: one program per (block of queries, head); backward: per head
sums      float32, single writer, fixed order, no atomics: the same bits on every run
taken     by 16-bit dtypes (a float32 product, without tensor cores, would hold a row of p in every
          thread); backward: at most 256 queries too, D ≤ 128 and keys·D ≤ 2¹⁴ (256·64, 128·128;
          3·2¹² without wgmma), so that dk and dv fit the registers: 64 x 192 spilled 56 bytes
bound by  bytes: forward q, k, v, out; backward q, k, v, dout, dq, dk, dv, each once (2 per element;
          forward: k and v once per block of queries, from cache); 4 and 10·S·Sk·D flop
"""

import math

import torch
import triton
import triton.language as tl

from .attention_tiles import (
    SHORT,
    Tiles,
    add_product,
    block_of,
    has_wgmma,
    head_at,
    head_of,
    load_head,
    load_rows,
    no_sums,
    pieces,
    products,
    store_head,
    store_rows,
    strides,
    widths,
)
from .triton_base import dot_operand, loop_count, programs

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _attention_short_fwd_kernel(
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
    VECTOR: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,  # columns at a time
    TAIL: tl.constexpr,  # width of what whole chunks leave of D, or 0
    STRIDE_D: tl.constexpr,  # of q, k and v
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,  # ≥ SK
    SIGN: tl.constexpr,  # of the scale, which is positive itself
):
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    WHOLE: tl.constexpr = D // CHUNK * CHUNK
    block, n, h = head_of(tl.program_id(0), tl.cdiv(S, BLOCK_S), HEADS)
    row = block * BLOCK_S + tl.arange(0, BLOCK_S)
    col = tl.arange(0, BLOCK_K)
    q_ptr, stride_qs = head_at(q_ptr, n, h, stride_qn, stride_qh, stride_qs, VECTOR)
    k_ptr, stride_ks = head_at(k_ptr, n, h, stride_kn, stride_kh, stride_ks, VECTOR)
    v_ptr, stride_vs = head_at(v_ptr, n, h, stride_vn, stride_vh, stride_vs, VECTOR)
    out_ptr, stride_outs = head_at(out_ptr, n, h, stride_outn, stride_outh, stride_outs, VECTOR)
    s = tl.zeros((BLOCK_S, BLOCK_K), tl.float32)
    for d in range(0, WHOLE, CHUNK):
        q = load_rows(q_ptr, row, stride_qs, S, d, D, CHUNK, STRIDE_D)
        k = load_rows(k_ptr, col, stride_ks, SK, d, D, CHUNK, STRIDE_D)
        s = tl.dot(q, tl.trans(k), s, input_precision="ieee")
    if TAIL > 0:
        q = load_rows(q_ptr, row, stride_qs, S, WHOLE, D, TAIL, STRIDE_D)
        k = load_rows(k_ptr, col, stride_ks, SK, WHOLE, D, TAIL, STRIDE_D)
        s = tl.dot(q, tl.trans(k), s, input_precision="ieee")
    if SIGN != 1:  # the maximum is that of the scaled products
        s = s * SIGN
    s = tl.where((col < SK)[None, :], s, float("-inf"))
    m = tl.max(s, axis=1)
    p = tl.exp2((s - m[:, None]) * (scale * LOG2E))
    total = tl.sum(p, axis=1)
    lse_ptr += (n * HEADS + h) * S
    tl.store(lse_ptr + row, m * scale + tl.log(total), mask=row < S)
    # Not yet divided by the total: rounding 1 and below loses nothing to rounding p / total.
    p = dot_operand(p, dtype)
    inverse = 1 / total[:, None]
    for d in range(0, WHOLE, CHUNK):
        v = load_rows(v_ptr, col, stride_vs, SK, d, D, CHUNK, STRIDE_D)
        out = tl.dot(p, v, input_precision="ieee") * inverse
        store_rows(out_ptr, row, out, stride_outs, S, d, D, CHUNK, 1)
    if TAIL > 0:
        v = load_rows(v_ptr, col, stride_vs, SK, WHOLE, D, TAIL, STRIDE_D)
        out = tl.dot(p, v, input_precision="ieee") * inverse
        store_rows(out_ptr, row, out, stride_outs, S, WHOLE, D, TAIL, 1)


@triton.jit
def _rows_of(ds, k, FLIP: tl.constexpr):
    """dsᵀ k; by way of its transpose where ds has too few columns for wgmma."""
    if FLIP:
        return tl.trans(tl.dot(tl.trans(k), ds, input_precision="ieee"))
    else:
        return tl.dot(tl.trans(ds), k, input_precision="ieee")


@triton.jit
def _attention_short_bwd_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    stride_doutn,  # strides in units of VECTOR
    stride_douth,
    stride_douts,
    stride_qn,
    stride_qh,
    stride_qs,
    stride_kn,
    stride_kh,
    stride_ks,
    stride_vn,
    stride_vh,
    stride_vs,
    stride_dqn,
    stride_dqh,
    stride_dqs,
    stride_dkn,  # dk and dv have the same strides
    stride_dkh,
    stride_dks,
    scale,
    HEADS,
    S,
    SK,
    STEPS,  # blocks of queries
    VECTOR: tl.constexpr,
    D: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    STRIDE_D: tl.constexpr,  # of all but dout
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,  # ≥ SK
):
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    _, n, h = head_of(tl.program_id(0), 1, HEADS)
    col = tl.arange(0, BLOCK_K)
    dout_ptr, stride_douts = head_at(
        dout_ptr, n, h, stride_doutn, stride_douth, stride_douts, VECTOR
    )
    q_ptr, stride_qs = head_at(q_ptr, n, h, stride_qn, stride_qh, stride_qs, VECTOR)
    k_ptr, stride_ks = head_at(k_ptr, n, h, stride_kn, stride_kh, stride_ks, VECTOR)
    v_ptr, stride_vs = head_at(v_ptr, n, h, stride_vn, stride_vh, stride_vs, VECTOR)
    dq_ptr, stride_dqs = head_at(dq_ptr, n, h, stride_dqn, stride_dqh, stride_dqs, VECTOR)
    k0, k1 = load_head(k_ptr, col, stride_ks, SK, D, W0, W1, STRIDE_D)
    v0, v1 = load_head(v_ptr, col, stride_vs, SK, D, W0, W1, STRIDE_D)
    lse_ptr += (n * HEADS + h) * S
    dk0, dk1 = no_sums(BLOCK_K, W0, W1)
    dv0, dv1 = no_sums(BLOCK_K, W0, W1)
    for i in range(STEPS):
        row = i * BLOCK_S + tl.arange(0, BLOCK_S)
        q0, q1 = load_head(q_ptr, row, stride_qs, S, D, W0, W1, STRIDE_D)
        # Rows that do not exist: lse = inf makes their p zero.
        lse = tl.load(lse_ptr + row, mask=row < S, other=float("inf"))
        at_k, at_q = (k_ptr, col, stride_ks, SK), (q_ptr, row, stride_qs, S)
        s = products(k0, k1, q0, q1, *at_k, *at_q, D, W1, 0, STRIDE_D, STRIDE_D)
        p = tl.exp2((s * scale - lse[None, :]) * LOG2E)  # (BLOCK_K, BLOCK_S)
        # exp(-lse) of keys that do not exist can be infinite
        p = tl.where((col < SK)[:, None], p, 0.0)
        dout0, dout1 = load_head(dout_ptr, row, stride_douts, S, D, W0, W1, 1)
        dv0, dv1 = add_product(dot_operand(p, dtype), dout0, dout1, dv0, dv1, W1)
        at_v, at_dout = (v_ptr, col, stride_vs, SK), (dout_ptr, row, stride_douts, S)
        dp = products(v0, v1, dout0, dout1, *at_v, *at_dout, D, W1, 0, STRIDE_D, 1)
        ds = dot_operand(p * (dp - tl.sum(p * dp, axis=0)[None, :]), dtype)
        dk0, dk1 = add_product(ds, q0, q1, dk0, dk1, W1)
        dq = _rows_of(ds, k0, BLOCK_S < 64) * scale
        store_rows(dq_ptr, row, dq, stride_dqs, S, 0, D, W0, STRIDE_D)
        if W1 > 0:
            dq = _rows_of(ds, k1, BLOCK_S < 64) * scale
            store_rows(dq_ptr, row, dq, stride_dqs, S, W0, D, W1, STRIDE_D)
    dk0 = dk0 * scale
    dk1 = dk1 * scale
    at, stride = head_at(dk_ptr, n, h, stride_dkn, stride_dkh, stride_dks, VECTOR)
    store_head(at, col, dk0, dk1, stride, SK, D, W0, W1, STRIDE_D)
    at, stride = head_at(dv_ptr, n, h, stride_dkn, stride_dkh, stride_dks, VECTOR)
    store_head(at, col, dv0, dv1, stride, SK, D, W0, W1, STRIDE_D)


def is_short_fwd(q: torch.Tensor, k: torch.Tensor) -> bool:
    return q.dtype != torch.float32 and k.shape[2] <= SHORT


def is_short_bwd(q: torch.Tensor, k: torch.Tensor) -> bool:
    """dk and dv, whole, take half of all registers (wgmma), or three eighths."""
    wide, wgmma = sum(pieces(q.shape[-1])), has_wgmma(q.device)
    room = 2**14 if wgmma else 3 * 2**12
    if q.stride(-1) != 1:  # narrow accesses, each with an address: at 256·64 they spilled 552 bytes
        room //= 4
    fits = block_of(k.shape[2]) * wide <= room and wide <= 128
    return is_short_fwd(q, k) and q.shape[2] <= SHORT and fits


def chunks(head_dim: int) -> tuple[int, int]:
    """(CHUNK, TAIL): D as whole chunks and one narrower piece, at least 16 wide.

    Chunks of 64 and a tail spilled (D = 96 on sm_90, 80 on sm_80).
    """
    chunk = 16 if head_dim < 32 else 32
    return chunk, 16 * triton.cdiv(head_dim % chunk, 16)


def short_fwd(q, k, v, out, lse, size: float, sign: int) -> None:
    n, heads, length, head_dim = q.shape
    keys, wgmma = k.shape[2], has_wgmma(q.device)
    rows, block_k = min(64 if wgmma else 32, block_of(length)), block_of(keys)
    chunk, tail = chunks(head_dim)
    every, vector = strides(q, k, v, out)
    with torch.cuda.device_of(q):
        _attention_short_fwd_kernel[programs(triton.cdiv(length, rows) * n * heads)](
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
            VECTOR=vector,
            D=head_dim,
            CHUNK=chunk,
            TAIL=tail,
            STRIDE_D=q.stride(-1),
            BLOCK_S=rows,
            BLOCK_K=block_k,
            SIGN=sign,
            num_warps=8 if wgmma and block_k == SHORT else 4,
            num_stages=2,
            enable_fp_fusion=True,
        )


def tiles_bwd(q: torch.Tensor, keys: int) -> Tiles:
    block_k, wide = block_of(keys), sum(pieces(q.shape[-1]))
    large = block_k * wide > 2**12
    few = block_k * wide > 3 * 2**12 or not has_wgmma(q.device)
    t = Tiles(block_k, 16 if few else 32, 8 if large else 4, 1)
    return t._replace(moving=min(t.moving, block_of(q.shape[2])))


def short_bwd(dout, q, k, v, lse, dq, dk, dv, scale: float) -> None:
    n, heads, length, _ = q.shape
    keys = k.shape[2]
    every, vector = strides(dout, q, k, v, dq, dk)
    t = tiles_bwd(q, keys)
    with torch.cuda.device_of(q):
        _attention_short_bwd_kernel[programs(n * heads)](
            dout,
            q,
            k,
            v,
            lse,
            dq,
            dk,
            dv,
            *every,
            scale,
            heads,
            length,
            keys,
            loop_count(triton.cdiv(length, t.moving)),
            VECTOR=vector,
            BLOCK_S=t.moving,
            BLOCK_K=t.fixed,
            num_warps=t.num_warps,
            num_stages=t.num_stages,
            enable_fp_fusion=True,
            **widths(q),
        )

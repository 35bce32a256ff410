"""Triton: attention, backward.

backward  p = exp(q kᵀ·scale - lse), recomputed;  δ = rowsum(dout ∘ out);  dv = pᵀ dout
          ds = p ∘ (dout vᵀ - δ);  dq = scale·ds k;  dk = scale·dsᵀ q
grid      δ: one program per (block of queries, head); dk and dv: per (block of keys, head), over
          all queries; dq: per (block of queries, head), over all keys
sums      float32, single writer, fixed order, no atomics: the same bits on every run
bound by  14·S·Sk·D flop on tensor cores (seven products: p and dout vᵀ are formed twice; eight
          above D = 256, where dk and dv have a launch each)

At most 256 queries and keys in 16 bits go another way, with five products: attention_short.py.
Source: Dao 2023, FlashAttention-2, alg. 2, with dq in a launch of its own instead of atomics.
"""

import math

import torch
import triton
import triton.language as tl

from . import boundary
from .attention_short import is_short_bwd, short_bwd
from .attention_tiles import (
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

LOG2E = tl.constexpr(math.log2(math.e))
DELTA = 4096  # elements a program of the delta kernel


@triton.jit
def _attention_delta_kernel(
    dout_ptr,
    out_ptr,
    delta_ptr,  # (N, HEADS, S) contiguous
    stride_doutn,  # strides in units of VECTOR
    stride_douth,
    stride_douts,
    stride_outn,
    stride_outh,
    stride_outs,
    HEADS,
    S,
    VECTOR: tl.constexpr,
    D: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    block, n, h = head_of(tl.program_id(0), tl.cdiv(S, BLOCK_S), HEADS)
    row = block * BLOCK_S + tl.arange(0, BLOCK_S)
    dout_ptr, stride_douts = head_at(
        dout_ptr, n, h, stride_doutn, stride_douth, stride_douts, VECTOR
    )
    out_ptr, stride_outs = head_at(out_ptr, n, h, stride_outn, stride_outh, stride_outs, VECTOR)
    dout0, dout1 = load_head(dout_ptr, row, stride_douts, S, D, W0, W1, 1)
    out0, out1 = load_head(out_ptr, row, stride_outs, S, D, W0, W1, 1)
    delta = tl.sum(dout0.to(tl.float32) * out0.to(tl.float32), axis=1)
    if W1 > 0:
        delta += tl.sum(dout1.to(tl.float32) * out1.to(tl.float32), axis=1)
    tl.store(delta_ptr + (n * HEADS + h) * S + row, delta, mask=row < S)


@triton.jit
def _attention_dkdv_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
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
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DK: tl.constexpr,  # which of the two to form
    DV: tl.constexpr,
):
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    block, n, h = head_of(tl.program_id(0), tl.cdiv(SK, BLOCK_K), HEADS)
    col = block * BLOCK_K + tl.arange(0, BLOCK_K)
    dout_ptr, stride_douts = head_at(
        dout_ptr, n, h, stride_doutn, stride_douth, stride_douts, VECTOR
    )
    q_ptr, stride_qs = head_at(q_ptr, n, h, stride_qn, stride_qh, stride_qs, VECTOR)
    k_ptr, stride_ks = head_at(k_ptr, n, h, stride_kn, stride_kh, stride_ks, VECTOR)
    v_ptr, stride_vs = head_at(v_ptr, n, h, stride_vn, stride_vh, stride_vs, VECTOR)
    k0, k1 = load_head(k_ptr, col, stride_ks, SK, D, W0, W1, STRIDE_D)
    v0, v1 = load_head(v_ptr, col, stride_vs, SK, D, W0, W1, STRIDE_D)
    lse_ptr += (n * HEADS + h) * S
    delta_ptr += (n * HEADS + h) * S
    dk0, dk1 = no_sums(BLOCK_K, W0 if DK else 16, W1 if DK else 0)
    dv0, dv1 = no_sums(BLOCK_K, W0 if DV else 16, W1 if DV else 0)
    for i in range(STEPS):
        row = i * BLOCK_S + tl.arange(0, BLOCK_S)
        q0, q1 = load_head(q_ptr, row, stride_qs, S, D, W0, W1, STRIDE_D)
        # Rows that do not exist: lse = inf makes their p zero.
        lse = tl.load(lse_ptr + row, mask=row < S, other=float("inf"))
        at_k, at_q = (k_ptr, col, stride_ks, SK), (q_ptr, row, stride_qs, S)
        s = products(k0, k1, q0, q1, *at_k, *at_q, D, W1, CHUNK, STRIDE_D, STRIDE_D)
        p = tl.exp2((s * scale - lse[None, :]) * LOG2E)  # (BLOCK_K, BLOCK_S)
        dout0, dout1 = load_head(dout_ptr, row, stride_douts, S, D, W0, W1, 1)
        if DV:
            dv0, dv1 = add_product(dot_operand(p, dtype), dout0, dout1, dv0, dv1, W1)
        if DK:
            at_v, at_dout = (v_ptr, col, stride_vs, SK), (dout_ptr, row, stride_douts, S)
            dp = products(v0, v1, dout0, dout1, *at_v, *at_dout, D, W1, CHUNK, STRIDE_D, 1)
            delta = tl.load(delta_ptr + row, mask=row < S, other=0.0)
            ds = p * (dp - delta[None, :])
            dk0, dk1 = add_product(dot_operand(ds, dtype), q0, q1, dk0, dk1, W1)
    if DK:
        at, stride = head_at(dk_ptr, n, h, stride_dkn, stride_dkh, stride_dks, VECTOR)
        dk0 = dk0 * scale
        dk1 = dk1 * scale
        store_head(at, col, dk0, dk1, stride, SK, D, W0, W1, STRIDE_D)
    if DV:
        at, stride = head_at(dv_ptr, n, h, stride_dkn, stride_dkh, stride_dks, VECTOR)
        store_head(at, col, dv0, dv1, stride, SK, D, W0, W1, STRIDE_D)


@triton.jit
def _attention_dq_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
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
    scale,
    HEADS,
    S,
    SK,
    STEPS,  # blocks of keys
    VECTOR: tl.constexpr,
    D: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    STRIDE_D: tl.constexpr,  # of all but dout
    CHUNK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    FULL_K: tl.constexpr,
):
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    block, n, h = head_of(tl.program_id(0), tl.cdiv(S, BLOCK_S), HEADS)
    row = block * BLOCK_S + tl.arange(0, BLOCK_S)
    dout_ptr, stride_douts = head_at(
        dout_ptr, n, h, stride_doutn, stride_douth, stride_douts, VECTOR
    )
    q_ptr, stride_qs = head_at(q_ptr, n, h, stride_qn, stride_qh, stride_qs, VECTOR)
    k_ptr, stride_ks = head_at(k_ptr, n, h, stride_kn, stride_kh, stride_ks, VECTOR)
    v_ptr, stride_vs = head_at(v_ptr, n, h, stride_vn, stride_vh, stride_vs, VECTOR)
    q0, q1 = load_head(q_ptr, row, stride_qs, S, D, W0, W1, STRIDE_D)
    dout0, dout1 = load_head(dout_ptr, row, stride_douts, S, D, W0, W1, 1)
    at = (n * HEADS + h) * S + row
    lse = tl.load(lse_ptr + at, mask=row < S, other=float("inf"))
    delta = tl.load(delta_ptr + at, mask=row < S, other=0.0)
    dq0, dq1 = no_sums(BLOCK_S, W0, W1)
    for i in range(STEPS):
        col = i * BLOCK_K + tl.arange(0, BLOCK_K)
        k0, k1 = load_head(k_ptr, col, stride_ks, SK, D, W0, W1, STRIDE_D)
        at_q, at_k = (q_ptr, row, stride_qs, S), (k_ptr, col, stride_ks, SK)
        s = products(q0, q1, k0, k1, *at_q, *at_k, D, W1, CHUNK, STRIDE_D, STRIDE_D)
        p = tl.exp2((s * scale - lse[:, None]) * LOG2E)
        if not FULL_K:  # exp(-lse) of keys that do not exist can be infinite
            p = tl.where((col < SK)[None, :], p, 0.0)
        v0, v1 = load_head(v_ptr, col, stride_vs, SK, D, W0, W1, STRIDE_D)
        at_dout, at_v = (dout_ptr, row, stride_douts, S), (v_ptr, col, stride_vs, SK)
        dp = products(dout0, dout1, v0, v1, *at_dout, *at_v, D, W1, CHUNK, 1, STRIDE_D)
        ds = p * (dp - delta[:, None])
        dq0, dq1 = add_product(dot_operand(ds, dtype), k0, k1, dq0, dq1, W1)
    dq_ptr, stride_dqs = head_at(dq_ptr, n, h, stride_dqn, stride_dqh, stride_dqs, VECTOR)
    dq0 = dq0 * scale
    dq1 = dq1 * scale
    store_head(dq_ptr, row, dq0, dq1, stride_dqs, S, D, W0, W1, STRIDE_D)


def attention_bwd(
    dout: torch.Tensor,  # (N, heads, S, D) stride(-1) == 1
    q: torch.Tensor,  # (N, heads, S, D) stride(-1) == 1
    k: torch.Tensor,  # (N, heads, Sk, D) stride(-1) == 1
    v: torch.Tensor,  # (N, heads, Sk, D) stride(-1) == 1
    out: torch.Tensor,  # (N, heads, S, D)
    lse: torch.Tensor,  # (N, heads, S) float32 contiguous
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # dq, dk, dv like q, k, v
    grads = [boundary.empty_heads(t, t.shape[2], t.shape[3]) for t in (q, k, v)]
    launch_bwd(dout, q, k, v, out, lse, *grads, scale)
    return tuple(grads)


def launch_bwd(dout, q, k, v, out, lse, dq, dk, dv, scale: float) -> None:
    """Writes dq, dk, dv; q, k, v, dq, dk, dv have one stride along D, dout and out stride 1."""
    if is_short_bwd(q, k):
        short_bwd(dout, q, k, v, lse, dq, dk, dv, scale)
    else:
        long_bwd(dout, q, k, v, out, lse, dq, dk, dv, scale)


def long_bwd(dout, q, k, v, out, lse, dq, dk, dv, scale: float) -> None:
    n, heads, length, head_dim = q.shape
    keys = k.shape[2]
    delta = torch.empty_like(lse)
    every, vector = strides(dout, q, k, v, dq, dk, out)
    inputs = (dout, q, k, v, lse, delta)
    sizes = {"VECTOR": vector, **widths(q)}
    delta_rows = max(1, DELTA // (sizes["W0"] + sizes["W1"]))
    delta_rows = 1 << (delta_rows.bit_length() - 1)
    with torch.cuda.device_of(q):
        _attention_delta_kernel[programs(triton.cdiv(length, delta_rows) * n * heads)](
            dout,
            out,
            delta,
            *every[:3],
            *every[18:],
            heads,
            length,
            VECTOR=vector,
            D=head_dim,
            W0=sizes["W0"],
            W1=sizes["W1"],
            BLOCK_S=delta_rows,
            enable_fp_fusion=True,
        )
        t = tiles(q, keys, length, "dkdv")
        # Both sums of a head wider than 256 would fill the registers: then each has its launch.
        for dk_too, dv_too in (
            ((True, True),) if head_dim <= 256 else ((True, False), (False, True))
        ):
            _attention_dkdv_kernel[programs(triton.cdiv(keys, t.fixed) * n * heads)](
                *inputs,
                dk,
                dv,
                *every[:12],
                *every[15:18],
                scale,
                heads,
                length,
                keys,
                loop_count(triton.cdiv(length, t.moving)),
                BLOCK_S=t.moving,
                BLOCK_K=t.fixed,
                DK=dk_too,
                DV=dv_too,
                **sizes,
                **t.options,
            )
        t = tiles(q, length, keys, "dq")
        _attention_dq_kernel[programs(triton.cdiv(length, t.fixed) * n * heads)](
            *inputs,
            dq,
            *every[:15],
            scale,
            heads,
            length,
            keys,
            loop_count(triton.cdiv(keys, t.moving)),
            BLOCK_S=t.fixed,
            BLOCK_K=t.moving,
            FULL_K=keys % t.moving == 0,
            **sizes,
            **t.options,
        )

"""Triton: attention, backward.

backward  p = exp(q kᵀ·scale - lse), recomputed;  δ = rowsum(dout ∘ out);  dv = pᵀ dout
          ds = p ∘ (dout vᵀ - δ);  dq = scale·ds k;  dk = scale·dsᵀ q
grid      δ: one program per (block of queries, head); dk and dv: per (block of keys, head), over
          all queries; dq: per (block of queries, head), over all keys
sums      float32, single writer, fixed order, no atomics: the same bits on every run
bound by  14·S·Sk·D flop on tensor cores (seven products: p and dout vᵀ are formed twice)

Source: Dao 2023, FlashAttention-2, alg. 2, with dq in a launch of its own instead of atomics.
"""

import math

import torch
import triton
import triton.language as tl

from . import boundary
from .attention_tiles import (
    head_at,
    head_of,
    load_rows,
    products,
    store_rows,
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
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    block, n, h = head_of(tl.program_id(0), tl.cdiv(S, BLOCK_S), HEADS)
    row = block * BLOCK_S + tl.arange(0, BLOCK_S)
    dout_ptr, stride_douts = head_at(
        dout_ptr, n, h, stride_doutn, stride_douth, stride_douts, VECTOR
    )
    out_ptr, stride_outs = head_at(out_ptr, n, h, stride_outn, stride_outh, stride_outs, VECTOR)
    dout = load_rows(dout_ptr, row, stride_douts, S, D, BLOCK_D).to(tl.float32)
    out = load_rows(out_ptr, row, stride_outs, S, D, BLOCK_D).to(tl.float32)
    at = (n * HEADS + h) * S + row
    tl.store(delta_ptr + at, tl.sum(dout * out, axis=1), mask=row < S)


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
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
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
    k = load_rows(k_ptr, col, stride_ks, SK, D, BLOCK_D)
    v = load_rows(v_ptr, col, stride_vs, SK, D, BLOCK_D)
    lse_ptr += (n * HEADS + h) * S
    delta_ptr += (n * HEADS + h) * S
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for i in range(STEPS):
        row = i * BLOCK_S + tl.arange(0, BLOCK_S)
        q = load_rows(q_ptr, row, stride_qs, S, D, BLOCK_D)
        # Rows that do not exist: lse = inf makes their p zero.
        lse = tl.load(lse_ptr + row, mask=row < S, other=float("inf"))
        s = products(k, q, k_ptr, col, stride_ks, SK, q_ptr, row, stride_qs, S, D, BLOCK_D, CHUNK_D)
        p = tl.exp2((s * scale - lse[None, :]) * LOG2E)  # (BLOCK_K, BLOCK_S)
        dout = load_rows(dout_ptr, row, stride_douts, S, D, BLOCK_D)
        dv = tl.dot(dot_operand(p, dtype), dout, dv, input_precision="ieee")
        dp = products(
            v, dout, v_ptr, col, stride_vs, SK, dout_ptr, row, stride_douts, S, D, BLOCK_D, CHUNK_D
        )
        delta = tl.load(delta_ptr + row, mask=row < S, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(dot_operand(ds, dtype), q, dk, input_precision="ieee")
    dk_ptr, _ = head_at(dk_ptr, n, h, stride_dkn, stride_dkh, stride_dks, VECTOR)
    dv_ptr, stride_dks = head_at(dv_ptr, n, h, stride_dkn, stride_dkh, stride_dks, VECTOR)
    store_rows(dk_ptr, col, dk * scale, stride_dks, SK, D, BLOCK_D)
    store_rows(dv_ptr, col, dv, stride_dks, SK, D, BLOCK_D)


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
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
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
    q = load_rows(q_ptr, row, stride_qs, S, D, BLOCK_D)
    dout = load_rows(dout_ptr, row, stride_douts, S, D, BLOCK_D)
    at = (n * HEADS + h) * S + row
    lse = tl.load(lse_ptr + at, mask=row < S, other=float("inf"))
    delta = tl.load(delta_ptr + at, mask=row < S, other=0.0)
    dq = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    for i in range(STEPS):
        col = i * BLOCK_K + tl.arange(0, BLOCK_K)
        k = load_rows(k_ptr, col, stride_ks, SK, D, BLOCK_D)
        s = products(q, k, q_ptr, row, stride_qs, S, k_ptr, col, stride_ks, SK, D, BLOCK_D, CHUNK_D)
        p = tl.exp2((s * scale - lse[:, None]) * LOG2E)
        if not FULL_K:  # exp(-lse) of keys that do not exist can be infinite
            p = tl.where((col < SK)[None, :], p, 0.0)
        v = load_rows(v_ptr, col, stride_vs, SK, D, BLOCK_D)
        dp = products(
            dout, v, dout_ptr, row, stride_douts, S, v_ptr, col, stride_vs, SK, D, BLOCK_D, CHUNK_D
        )
        ds = p * (dp - delta[:, None])
        dq = tl.dot(dot_operand(ds, dtype), k, dq, input_precision="ieee")
    dq_ptr, stride_dqs = head_at(dq_ptr, n, h, stride_dqn, stride_dqh, stride_dqs, VECTOR)
    store_rows(dq_ptr, row, dq * scale, stride_dqs, S, D, BLOCK_D)


def attention_bwd(
    dout: torch.Tensor,  # (N, heads, S, D) stride(-1) == 1
    q: torch.Tensor,  # (N, heads, S, D) stride(-1) == 1
    k: torch.Tensor,  # (N, heads, Sk, D) stride(-1) == 1
    v: torch.Tensor,  # (N, heads, Sk, D) stride(-1) == 1
    out: torch.Tensor,  # (N, heads, S, D)
    lse: torch.Tensor,  # (N, heads, S) float32 contiguous
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # dq, dk, dv like q, k, v
    n, heads, length, head_dim = q.shape
    keys = k.shape[2]
    dq = boundary.empty_heads(q, length, head_dim)
    dk, dv = (boundary.empty_heads(t, keys, head_dim) for t in (k, v))
    delta = torch.empty_like(lse)
    every, vector = strides(dout, q, k, v, dq, dk, out)
    inputs = (dout, q, k, v, lse, delta)
    sizes = {"VECTOR": vector, **widths(q)}
    delta_rows = max(1, DELTA // sizes["BLOCK_D"])
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
            BLOCK_D=sizes["BLOCK_D"],
            BLOCK_S=delta_rows,
            enable_fp_fusion=True,
        )
        t = tiles(q, keys, length, "dkdv")
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
    return dq, dk, dv

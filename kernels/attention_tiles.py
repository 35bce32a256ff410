"""Triton: what the forward and the backward of attention share: tiles and their sizes."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .triton_base import dot_operand, rounded

MAX_HEAD_DIM = 256


@triton.jit
def _place(row, stride_s, length, D0: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets (rows, WIDTH) from the D0-th element of each row, and which exist; 64-bit."""
    d = D0 + tl.arange(0, WIDTH)
    mask = (row < length)[:, None]
    if D0 + WIDTH > D:
        mask = mask & (d < D)[None, :]
    return row.to(tl.int64)[:, None] * stride_s + d[None, :], mask


@triton.jit
def load_rows(ptr, row, stride_s, length, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a head, (rows, BLOCK_D), as operands of tl.dot; zero outside (length, D)."""
    at, mask = _place(row, stride_s, length, 0, D, BLOCK_D)
    return dot_operand(tl.load(ptr + at, mask=mask, other=0.0), ptr.dtype.element_ty)


@triton.jit
def store_rows(ptr, row, value, stride_s, length, D: tl.constexpr, BLOCK_D: tl.constexpr):
    at, mask = _place(row, stride_s, length, 0, D, BLOCK_D)
    tl.store(ptr + at, rounded(value, ptr.dtype.element_ty), mask=mask)


@triton.jit
def products(
    a,  # (rows of a, BLOCK_D), like b: the tiles, used where one tl.dot can take them
    b,
    a_ptr,
    a_row,
    stride_a,
    a_length,
    b_ptr,
    b_row,
    stride_b,
    b_length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
):
    """a bᵀ. Chunk by chunk in float32: no tensor cores, and whole rows would fill the registers."""
    if CHUNK_D == BLOCK_D:
        return tl.dot(a, tl.trans(b), input_precision="ieee")
    else:
        total = tl.zeros((a_row.shape[0], b_row.shape[0]), tl.float32)
        for d in tl.static_range(0, BLOCK_D, CHUNK_D):
            a_at, a_mask = _place(a_row, stride_a, a_length, d, D, CHUNK_D)
            b_at, b_mask = _place(b_row, stride_b, b_length, d, D, CHUNK_D)
            a_part = tl.load(a_ptr + a_at, mask=a_mask, other=0.0)
            b_part = tl.load(b_ptr + b_at, mask=b_mask, other=0.0)
            total = tl.dot(a_part, tl.trans(b_part), total, input_precision="ieee")
        return total


@triton.jit
def head_of(pid, blocks, HEADS):
    """Program number → (block, sample, head), the last two 64-bit; all blocks of a head first."""
    head = pid // blocks
    return pid % blocks, (head // HEADS).to(tl.int64), (head % HEADS).to(tl.int64)


@triton.jit
def head_at(ptr, n, h, stride_n, stride_h, stride_s, VECTOR: tl.constexpr):
    """Where head (n, h) begins, and the distance of its rows in elements, which may pass 2³¹."""
    return ptr + (n * stride_n + h * stride_h) * VECTOR, tl.cast(stride_s, tl.int64) * VECTOR


class Tiles(NamedTuple):
    fixed: int  # rows that a program owns
    moving: int  # rows it reads at a time
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | {"enable_fp_fusion": True}


def tiles(q: torch.Tensor, owned: int, read: int, stage: str) -> Tiles:
    """Sizes that fit 99 KB of shared memory, the least of compute capability 8 and up, and the
    registers (tests/test_triton_compile.py holds both); not yet tuned on a device."""
    wide = triton.next_power_of_2(q.shape[-1])
    if q.dtype == torch.float32:
        # No tensor cores: few registers. Two exceptions of which ptxas would spill 8 bytes (sm_80).
        t = {("dkdv", 64): Tiles(16, 16, 4, 1), ("dq", 128): Tiles(32, 16, 8, 1)}.get(
            (stage, wide), Tiles(16, 16, 8, 1)
        )
    elif stage != "fwd":
        t = Tiles(32, 32, 8, 2) if wide == 256 else Tiles(64, 32, 4, 2)
    else:
        t = {128: Tiles(128, 32, 8, 2), 256: Tiles(64, 16, 8, 2)}.get(wide, Tiles(128, 64, 4, 2))
    # tl.dot needs 16 rows; more than there are would be idle
    fixed = min(t.fixed, max(16, triton.next_power_of_2(owned)))
    moving = min(t.moving, max(16, triton.next_power_of_2(read)))
    return t._replace(fixed=fixed, moving=moving)


def widths(q: torch.Tensor) -> dict:
    block_d = max(16, triton.next_power_of_2(q.shape[-1]))
    chunk_d = 16 if q.dtype == torch.float32 else block_d
    return {"D": q.shape[-1], "BLOCK_D": block_d, "CHUNK_D": chunk_d}


def strides(*tensors: torch.Tensor) -> tuple[list[int], int]:
    """Strides of batch, head and row in units of VECTOR elements; and VECTOR.

    Triton knows of a stride only whether 16 divides it. A head of 40 is 5 · 8: told so, it still
    reads 16 bytes at a time.
    """
    every = [stride for t in tensors for stride in t.stride()[:3]]
    vector = 8 if all(stride % 8 == 0 for stride in every) else 1
    return [stride // vector for stride in every], vector

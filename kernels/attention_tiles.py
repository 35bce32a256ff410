"""Triton: what the kernels of attention share: heads by strides, pieces of a head, tile sizes.

A head of D elements is two pieces of power-of-two width, W0 + W1, each with a tl.dot of its own:
40 = 32 + 16 (8 of them padding), 80 = 64 + 16, 160 = 128 + 32, 512 = 256 + 256. W1 is 0 where D is
a power of two or the pieces would be as wide as the next one.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .triton_base import _capability, dot_operand, rounded

MAX_HEAD_DIM = 512
MAX_PIECE = 256
SHORT = 256  # keys whose scores are resident as a whole


@triton.jit
def _place(row, stride_s, length, D0, D: tl.constexpr, WIDTH: tl.constexpr, STRIDE_D: tl.constexpr):
    """Offsets (rows, WIDTH) from the D0-th element of each row, and which exist; 64-bit."""
    d = D0 + tl.arange(0, WIDTH)
    mask = (row < length)[:, None] & (d < D)[None, :]
    return row.to(tl.int64)[:, None] * stride_s + d[None, :] * STRIDE_D, mask


@triton.jit
def load_rows(
    ptr, row, stride_s, length, D0, D: tl.constexpr, WIDTH: tl.constexpr, STRIDE_D: tl.constexpr
):
    """Columns D0 … D0 + WIDTH of the rows, as operand of tl.dot; zero outside (length, D)."""
    at, mask = _place(row, stride_s, length, D0, D, WIDTH, STRIDE_D)
    return dot_operand(tl.load(ptr + at, mask=mask, other=0.0), ptr.dtype.element_ty)


@triton.jit
def store_rows(
    ptr,
    row,
    value,
    stride_s,
    length,
    D0,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE_D: tl.constexpr,
):
    at, mask = _place(row, stride_s, length, D0, D, WIDTH, STRIDE_D)
    tl.store(ptr + at, rounded(value, ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_head(
    ptr,
    row,
    stride_s,
    length,
    D: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    STRIDE_D: tl.constexpr,
):
    """Both pieces of the rows; the first one twice where there is no second."""
    first = load_rows(ptr, row, stride_s, length, 0, D, W0, STRIDE_D)
    if W1 > 0:
        return first, load_rows(ptr, row, stride_s, length, W0, D, W1, STRIDE_D)
    else:
        return first, first


@triton.jit
def store_head(
    ptr,
    row,
    first,
    second,
    stride_s,
    length,
    D: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    STRIDE_D: tl.constexpr,
):
    store_rows(ptr, row, first, stride_s, length, 0, D, W0, STRIDE_D)
    if W1 > 0:
        store_rows(ptr, row, second, stride_s, length, W0, D, W1, STRIDE_D)


@triton.jit
def no_sums(ROWS: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr):
    """Zero sums (ROWS, D) in two pieces."""
    if W1 > 0:
        return tl.zeros((ROWS, W0), tl.float32), tl.zeros((ROWS, W1), tl.float32)
    else:
        return tl.zeros((ROWS, W0), tl.float32), 0.0


@triton.jit
def add_product(x, b0, b1, sum0, sum1, W1: tl.constexpr):
    """(sum0, sum1) + x (b0, b1)."""
    sum0 = tl.dot(x, b0, sum0, input_precision="ieee")
    if W1 > 0:
        sum1 = tl.dot(x, b1, sum1, input_precision="ieee")
    return sum0, sum1


@triton.jit
def products(
    a0,  # the pieces of a and b, used where they are whole in shared memory (CHUNK == 0)
    a1,
    b0,
    b1,
    a_ptr,
    a_row,
    stride_a,
    a_length,
    b_ptr,
    b_row,
    stride_b,
    b_length,
    D: tl.constexpr,
    W1: tl.constexpr,
    CHUNK: tl.constexpr,
    STRIDE_A: tl.constexpr,  # along D
    STRIDE_B: tl.constexpr,
):
    """a bᵀ. CHUNK columns at a time where whole rows would fill the registers (float32, without
    tensor cores) or the shared memory (D > 256)."""
    if CHUNK == 0:
        total = tl.dot(a0, tl.trans(b0), input_precision="ieee")
        if W1 > 0:
            total = tl.dot(a1, tl.trans(b1), total, input_precision="ieee")
    else:
        total = tl.zeros((a_row.shape[0], b_row.shape[0]), tl.float32)
        for d in range(0, D, CHUNK):
            a = load_rows(a_ptr, a_row, stride_a, a_length, d, D, CHUNK, STRIDE_A)
            b = load_rows(b_ptr, b_row, stride_b, b_length, d, D, CHUNK, STRIDE_B)
            total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
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
    chunk: int = 0  # columns of a product at a time; 0: whole pieces
    registers: int = 0  # at most; 0: as ptxas likes, which may spill to fit one more block

    @property
    def options(self) -> dict:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.registers:
            options["maxnreg"] = self.registers
        return options | {"CHUNK": self.chunk, "enable_fp_fusion": True}


def pieces(head_dim: int) -> tuple[int, int]:
    """Widths (W0, W1) ≥ 16 (tl.dot's least) that hold head_dim with the least padding."""
    whole = max(16, triton.next_power_of_2(head_dim))
    first = min(whole // 2, MAX_PIECE)
    if head_dim <= 16:
        return whole, 0
    second = max(16, triton.next_power_of_2(head_dim - first))
    return (first, second) if first + second < whole or whole > MAX_PIECE else (whole, 0)


def has_wgmma(device: torch.device) -> bool:
    """Whether products read both operands from shared memory (wgmma of sm_90, tcgen05 of sm_100).

    mma.sync, of all other chips, holds them in registers: tiles must be smaller there.
    """
    return device.type != "cuda" or _capability(device)[0] in (9, 10)


def tiles(q: torch.Tensor, owned: int, read: int, stage: str) -> Tiles:
    """Sizes that fit 99 KB of shared memory, the least of compute capability 8 and up, and the
    registers (tests/test_triton_compile.py holds both); not yet tuned on a device.

    wgmma needs 64 rows that a program owns for every four warps.
    """
    wide, wgmma = sum(pieces(q.shape[-1])), has_wgmma(q.device)
    if q.dtype == torch.float32:
        # No tensor cores: both operands of a product lie in registers.
        small = wide > {"fwd": 192, "dkdv": 32, "dq": 256}[stage]
        block = 16 if small else 32
        # Left to itself, and at 255 from D = 160 on, ptxas spills 8 to 16 bytes of some of them.
        t = Tiles(block, block, 8, 1, 16, registers=255 if wide < 160 else 240)
    elif stage == "fwd":
        if wide > 256:
            t = Tiles(64 if wgmma else 32, 32, 8, 2, 64)
        elif wide > 128 and not wgmma:
            t = Tiles(64, 16, 8, 2)
        elif wide > 192:
            t = Tiles(64, 32, 8, 2)
        elif wide > 64:
            t = Tiles(128, 32, 8, 2)
        else:
            t = Tiles(128, 64, 4, 2)
    elif wide > 256 or (stage, wide, wgmma) == ("dkdv", 256, True):
        t = Tiles(64 if wgmma else 32, 32, 8, 1, 64)
    elif wide > 160 and wide < 256 and not wgmma:
        t = Tiles(32, 32, 8, 1, 64)
    elif wide > 128:
        t = Tiles(64, 16, 8, 1)
    else:
        t = Tiles(64, 32, 4, 2)
    # tl.dot needs 16 rows; more than there are would be idle
    return t._replace(fixed=min(t.fixed, block_of(owned)), moving=min(t.moving, block_of(read)))


def block_of(length: int) -> int:
    """A power of two for so many rows; tl.dot needs 16."""
    return max(16, triton.next_power_of_2(length))


def widths(q: torch.Tensor) -> dict:
    first, second = pieces(q.shape[-1])
    return {"D": q.shape[-1], "W0": first, "W1": second, "STRIDE_D": q.stride(-1)}


def strides(*tensors: torch.Tensor) -> tuple[list[int], int]:
    """Strides of batch, head and row in units of VECTOR elements; and VECTOR.

    Triton knows of a stride only whether 16 divides it. A head of 40 is 5 · 8: told so, it still
    reads 16 bytes at a time.
    """
    every = [stride for t in tensors for stride in t.stride()[:3]]
    vector = 8 if all(stride % 8 == 0 for stride in every) else 1
    return [stride // vector for stride in every], vector

"""What the Triton kernels of RMS norm share: their tiles, and how those are chosen."""

from typing import NamedTuple

import triton
import triton.language as tl

from .group_norm_silu_tiles import pointers

LIMIT = {"fwd": 32768, "bwd": 16384}  # bytes of x in a tile: 16 warps; bwd: as many of dy
TILE = 4096  # elements of a tile where it is free
WALK = 2048  # and of one that walks: 8 a thread
ROW = 128  # bytes of a contiguous row that a program should read
SECTOR = 32  # and at least: less wastes memory traffic


@triton.jit
def load_tile(
    ptr,
    n,  # 64-bit
    c0,
    s0,
    C,
    S,
    LAST: tl.constexpr,  # (N, S, C) in memory
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """(BLOCK_C, BLOCK_S) float32; 0 where there is nothing."""
    mask = (tl.arange(0, BLOCK_C) < C - c0)[:, None] & (tl.arange(0, BLOCK_S) < S - s0)[None, :]
    at = pointers(ptr, n, c0, s0, C, S, LAST, BLOCK_C, BLOCK_S)
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


class Plan(NamedTuple):
    block_c: int
    block_s: int
    chunks: int  # of block_c channels
    warps: int

    @property
    def options(self) -> dict:
        blocks = {"BLOCK_C": self.block_c, "BLOCK_S": self.block_s}
        return {**blocks, "num_warps": self.warps, "enable_fp_fusion": True}


def plan(stage: str, C: int, S: int, itemsize: int, lasts: tuple[bool, ...]) -> Plan:
    """lasts: the layouts of what a tile reads and writes. No GPU has measured the thresholds."""
    power = triton.next_power_of_2
    # 16 warps leave a thread 128 registers: too few for addresses of elements read one by one, or
    # for two layouts.
    plain = all((C if last else S) % 8 == 0 for last in lasts) and len(set(lasts)) == 1
    limit, most = LIMIT[stage] // itemsize, 16
    if not plain:
        limit, most = limit // 2, 8
    contiguous = not all(lasts)
    least = min(power(S), SECTOR // itemsize) if contiguous else 1
    block_c = power(C)
    whole = block_c * least <= limit
    if whole:
        wanted = ROW // itemsize if contiguous else 1
        block_s = min(power(S), max(min(TILE, limit) // block_c, min(wanted, limit // block_c)))
    else:
        block_s = min(power(S), ROW // itemsize) if contiguous else 1
        block_c = min(block_c, WALK // block_s)
    warps = max(1, min(most, block_c * block_s // (512 if whole else 256)))
    return Plan(block_c, block_s, triton.cdiv(C, block_c), warps)

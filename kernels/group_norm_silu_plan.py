"""How GroupNorm + SiLU in Triton is cut into programs: a pure function of shapes and of the device.

resident  a program keeps whole groups in registers: everything is read once, one launch
walk      a program walks over its groups twice, the second time from a cache: one launch
large     several programs a group, more launches, everything is read twice
The thresholds are the table below. They come from register files, cache sizes and arithmetic; no
GPU has measured them yet.
"""

import functools
from typing import NamedTuple

import torch
import triton

# elements of a tile
RESIDENT = {"fwd": 16384, "bwd": 8192}  # of x; 16 warps, 32 a thread; bwd: as many of dy
WALK = {"fwd": 16384, "bwd": 8192}
LARGE = 4096
CHUNK = 32768  # of a program of large launches
SMALL = 2048  # a resident program takes several groups until it has so many
# bytes
ROW = 128  # of a channels_last row that a program should read
WALK_ROW = 64  # at least, of a walking program
SECTOR = 32  # a program that reads less of a row wastes memory traffic
LATENCY = 4 << 20  # a tensor so small is bound by launches: one, even of few programs
# others
FEW = 0.2  # of the multiprocessors
WALKERS = 2  # walking programs that a multiprocessor runs at once
L2_SHARE = 0.5  # of L2 that is sure to hold what they read
MAX_CHUNKS = 256  # position chunks
MAX_MERGED = 16384  # chunks of a group: every program of the second launch reads their sums
MAX_GROUPS = 64  # of a program: sums per group compare every channel with every group
PADDING = 1.25  # a walking tile's channels or positions, filled up to a power of two
EXTENT = 2**31  # elements between the first and the last one of a tile: its offsets are 32-bit


class Device(NamedTuple):
    processors: int = 132
    l2: int = 50 << 20  # bytes


@functools.cache
def _properties(index: int) -> Device:
    found = torch.cuda.get_device_properties(index)
    return Device(found.multi_processor_count, found.L2_cache_size)


def device_of(x: torch.Tensor) -> Device:
    """Of the interpreter and of meta tensors: an H100."""
    return _properties(x.device.index or 0) if x.is_cuda else Device()


class Plan(NamedTuple):
    kind: str  # resident, walk or large
    block_g: int
    block_c: int
    block_s: int
    slabs: int  # of block_g groups
    c_chunks: int  # of block_c channels of a slab; 1 if it has several groups
    s_chunks: int  # of tiles·block_s positions
    tiles: int
    aligned: bool

    @property
    def options(self) -> dict:
        """16 elements a thread, 32 in the largest tile. 16 warps leave a thread 128 registers: too
        few for the addresses of elements that are read one by one."""
        warps = max(1, min(16 if self.aligned else 8, self.block_c * self.block_s // 512))
        return {"num_warps": warps, "enable_fp_fusion": True}

    @property
    def blocks(self) -> dict:
        return {"BLOCK_G": self.block_g, "BLOCK_C": self.block_c, "BLOCK_S": self.block_s}


def power(n: int) -> int:
    return triton.next_power_of_2(n)


class Shape(NamedTuple):
    stage: str  # fwd or bwd
    N: int
    group: int  # channels of a group
    S: int
    G: int
    itemsize: int
    lasts: tuple[bool, ...]  # layouts of what a tile reads and writes, the most important first
    C2: int = 0  # channels of the second half of a pair

    @property
    def C(self) -> int:
        return self.group * self.G

    @property
    def last(self) -> bool:
        return self.lasts[0]

    @property
    def aligned(self) -> bool:
        return self.C % 8 == 0 and self.C2 % 8 == 0 if self.last else self.S % 8 == 0

    def row(self, groups: int) -> int:
        """Bytes of a channels_last row."""
        return groups * self.group * self.itemsize

    def too_far(self, block_c: int, block_s: int) -> bool:
        extents = {
            True: (block_s - 1) * self.C + block_c,
            False: (block_c - 1) * self.S + block_s,
        }
        return any(extents[layout] > EXTENT for layout in self.lasts)

    def wide_slab(self) -> int:
        """Groups whose channels_last rows are long enough."""
        block_g = 1
        while self.last and block_g < self.G and self.row(block_g) < ROW:
            block_g *= 2
        return block_g


def plan(shape: Shape, device: Device) -> Plan:
    return _resident(shape) or _walk(shape, device) or _large(shape)


def _resident(t: Shape) -> Plan | None:
    limit = RESIDENT[t.stage] if t.aligned else RESIDENT[t.stage] // 2
    s, block_g = power(t.S), 1
    if power(t.group) * s > limit or t.too_far(power(limit // s), s):
        return None
    most = min(t.G, MAX_GROUPS)
    while block_g < most and power(2 * block_g * t.group) * s <= limit:
        narrow = t.last and t.row(block_g) < ROW
        if not narrow and block_g * t.group * s >= SMALL:
            break
        block_g *= 2
    if t.last and block_g < t.G and t.row(block_g) < SECTOR:
        return None
    block_c, slabs = power(block_g * t.group), triton.cdiv(t.G, block_g)
    return Plan("resident", block_g, block_c, s, slabs, 1, 1, 1, t.aligned)


def _can_walk(t: Shape, block_g: int, device: Device) -> bool:
    """Whether there are enough programs, and those that run at once read no more than L2 holds."""
    programs = t.N * triton.cdiv(t.G, block_g)
    small = t.N * t.C * t.S * t.itemsize <= LATENCY
    if programs < device.processors * (FEW if small else 1):
        return False
    running = min(programs, device.processors * WALKERS)
    slab = block_g * t.group * t.S * t.itemsize * (1 if t.stage == "fwd" else 2)
    return running * slab <= device.l2 * L2_SHARE


def _walk(t: Shape, device: Device) -> Plan | None:
    block_g = t.wide_slab()
    while not _can_walk(t, block_g, device):
        block_g //= 2
        if block_g == 0 or t.row(block_g) < WALK_ROW:
            return None
    slabs = triton.cdiv(t.G, block_g)
    limit = WALK[t.stage] if t.aligned else WALK[t.stage] // 2
    if block_g > 1:
        block_c = power(block_g * t.group)
        if block_c > limit:
            return None
        block_s = min(power(t.S), limit // block_c)
    else:
        block_s = min(power(t.S), limit)
        while block_s > SMALL and triton.cdiv(t.S, block_s) * block_s > PADDING * t.S:
            block_s //= 2
        block_c = min(power(t.group), limit // block_s)
        while block_c > 1 and triton.cdiv(t.group, block_c) * block_c > PADDING * t.group:
            block_c //= 2
    if t.too_far(block_c, block_s):
        return None
    c_chunks = triton.cdiv(block_g * t.group, block_c)
    tiles = triton.cdiv(t.S, block_s)
    return Plan("walk", block_g, block_c, block_s, slabs, c_chunks, 1, tiles, t.aligned)


def _large(t: Shape) -> Plan:
    s, block_g = power(t.S), t.wide_slab()
    if t.last:
        block_c = power(block_g * t.group)
        if block_g == 1:
            block_c = min(block_c, max(power(ROW // t.itemsize), LARGE // s))
        block_s = max(1, LARGE // block_c)
    else:
        block_s = min(s, 1024)
        block_c = min(power(t.group), max(1, LARGE // block_s))
    while t.too_far(block_c, block_s):  # only in tensors of more than 2³¹ elements
        if True in t.lasts and block_s > 1 and (block_s - 1) * t.C + block_c > EXTENT:
            block_s //= 2
        elif block_g > 1:
            block_g //= 2
            block_c = power(block_g * t.group)
        else:
            block_c //= 2
    c_chunks = triton.cdiv(block_g * t.group, block_c)
    most = min(MAX_CHUNKS, max(1, MAX_MERGED // c_chunks))
    tiles = max(1, CHUNK // (block_c * block_s), triton.cdiv(t.S, block_s * most))
    tiles = min(tiles, triton.cdiv(t.S, block_s))
    s_chunks = triton.cdiv(t.S, block_s * tiles)
    slabs = triton.cdiv(t.G, block_g)
    return Plan("large", block_g, block_c, block_s, slabs, c_chunks, s_chunks, tiles, t.aligned)

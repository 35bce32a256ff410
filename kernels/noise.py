"""Triton: standard normals by the noise contract (philox.py), the same bits as in every back end.

forward   out[i] = normal number offset + i of (seed, step, stream), rounded to nearest even
grid      one program per BLOCK quads of normals
saved     nothing; noise has no gradient
refused   dtypes other than float32, bfloat16, float16; CPU tensors outside the interpreter
bound by  one write of out (2 or 4 bytes an element)

Launched with enable_fp_fusion=False: a contracted a·b + c rounds once, the contract rounds twice.
seed and step are read from device memory, so that a captured launch can be replayed.
"""

import torch
import triton
import triton.language as tl

from . import boundary
from .triton_base import programs, rounded
from .triton_base import refusals as base_refusals

BLOCK = 256  # quads a program


@triton.jit
def _log(u):
    """ln u for normal u in (0, 1), Cephes logf, one rounding an operation."""
    bits = u.to(tl.int32, bitcast=True)
    e = (bits >> 23) - 126
    m = ((bits & 0x7FFFFF) | 0x3F000000).to(tl.float32, bitcast=True)
    low = m < 0.707106781186547524
    e = tl.where(low, e - 1, e).to(tl.float32)
    m = tl.where(low, m + m - 1.0, m - 1.0)
    z = m * m
    y = m * 7.0376836292e-2 - 1.1514610310e-1
    y = y * m + 1.1676998740e-1
    y = y * m - 1.2420140846e-1
    y = y * m + 1.4249322787e-1
    y = y * m - 1.6668057665e-1
    y = y * m + 2.0000714765e-1
    y = y * m - 2.4999993993e-1
    y = y * m + 3.3333331174e-1
    y = y * m * z
    y = y + e * -2.12194440e-4
    y = y - z * 0.5
    return m + y + e * 0.693359375


@triton.jit
def _with_sign(x, negative):
    """-x where `negative`, else x."""
    flip = tl.where(negative, 1, 0).to(tl.uint32) << 31
    return (x.to(tl.uint32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)


@triton.jit
def _box_muller(w_even, w_odd):
    """Two blocks of uint32 words → two blocks of normals."""
    u = ((w_even >> 9) * 2 + 1).to(tl.float32) * 5.9604644775390625e-8
    r = tl.sqrt_rn(_log(u) * -2.0)
    j = ((w_odd >> 29) + 1) & 14  # the nearest even octant, 0 … 8
    k = (w_odd - (j << 29)).to(tl.int32, bitcast=True)
    t = k.to(tl.float32) * 1.4629180792671596e-9
    zz = t * t
    s = ((zz * -1.9515295891e-4 + 8.3321608736e-3) * zz - 1.6666654611e-1) * zz * t + t
    c = (zz * 2.443315711809948e-5 - 1.388731625493765e-3) * zz + 4.166664568298827e-2
    c = c * zz * zz - zz * 0.5 + 1.0
    q = (j >> 1) & 3
    odd = (q & 1) == 1
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    # Signs by bit: Triton 3.6's interpreter takes -x for 0 - x, which loses the sign of a zero.
    cos = _with_sign(cos, (q == 1) | (q == 2))
    sin = _with_sign(sin, q >= 2)
    return r * cos, r * sin


@triton.jit
def normals(seed, step, stream, quad):
    """seed, step: int64 scalars; quad: (BLOCK,) int64 → (4·BLOCK,) normals in order."""
    lo = quad.to(tl.uint32)
    hi = (quad >> 32).to(tl.uint32)
    zero = lo * 0
    stream = tl.cast(tl.cast(stream, tl.int64), tl.uint32)  # an int argument may come as either
    w0, w1, w2, w3 = tl.philox(seed, lo, hi, zero + step.to(tl.uint32), zero + stream)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    pairs = tl.join(tl.join(z0, z2), tl.join(z1, z3))  # [b, i, j] is lane 2·i + j
    return tl.reshape(pairs, (4 * quad.shape[0],))


@triton.jit
def _noise_kernel(out_ptr, seed_ptr, step_ptr, stream, n, offset, BLOCK: tl.constexpr):
    first = tl.cast(offset, tl.int64) // 4
    block = tl.program_id(0).to(tl.int64) * BLOCK
    quad = first + block + tl.arange(0, BLOCK)
    z = normals(tl.load(seed_ptr), tl.load(step_ptr), stream, quad)
    # element i is normal offset + i, so the first quad may begin before the tensor does
    i = 4 * (first + block) - offset + tl.arange(0, 4 * BLOCK)
    tl.store(out_ptr + i, rounded(z, out_ptr.dtype.element_ty), mask=(i >= 0) & (i < n))


def noise_fwd(
    out: torch.Tensor,  # contiguous
    seed: torch.Tensor,  # (1,) int64
    step: torch.Tensor,  # (1,) int64
    stream: int,
    offset: int,
) -> None:
    n = out.numel()
    quads = (offset + n + 3) // 4 - offset // 4
    with torch.cuda.device_of(out):
        _noise_kernel[programs(triton.cdiv(quads, BLOCK))](
            out, seed, step, stream, n, offset, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False
        )


def refusals(op: str, out, seed, step, stream, offset) -> list[str]:
    return base_refusals(out)


_library = boundary.define(boundary.TRITON, {"noise_fwd": noise_fwd})

"""Triton: the forward process with its noise drawn in place, and the loss against it.

forward   (a, b, p, q) = coeffs[t[n]], ε = normal offset + i of (seed, step, stream 2), or noise
          x_t = a·x0 + b·ε;  loss[n] = weights[n]/M · Σ ℓ(r),  r = model_out − (p·x0 + q·ε), M = C·S
backward  dmodel_out = dloss[n]·weights[n]/M · ℓ'(r), ε drawn again
grid      one program per chunk of BLOCK quads of a sample, in the contiguous order of the noise
saved     nothing; chunk sums (N, chunks) between the loss's two launches, one writer each
refused   dtypes other than float32, bfloat16, float16 (x0: uint8 too); CPU tensors outside the
          interpreter
bound by  x0 read (1 byte an element as uint8), x_t written; the loss: x0 and model_out read, its
          backward also dmodel_out written

t, coeffs, seed and step are read from device memory. Launched with enable_fp_fusion=False
(noise.py).
"""

import torch
import triton
import triton.language as tl

from . import boundary
from .noise import normals
from .reverse_step import _at
from .triton_base import loop_count, programs, rounded
from .triton_base import refusals as base_refusals

BLOCK = 256  # quads a program
TRAINING_NOISE = tl.constexpr(2)  # the stream


@triton.jit
def _row(coeffs_ptr, t_ptr, n, T, COLUMN: tl.constexpr):
    """Two neighbouring coefficients of sample n; NaN for a t outside [0, T)."""
    t = tl.load(t_ptr + n)
    inside = (t >= 0) & (t < T)
    at = coeffs_ptr + 4 * t + COLUMN
    nan = float("nan")
    return tl.load(at, mask=inside, other=nan), tl.load(at + 1, mask=inside, other=nan)


@triton.jit
def _elements(n, chunk, offset, M, BLOCK: tl.constexpr):
    """The chunk's quads, its elements' numbers in the tensor, and which are the sample's."""
    first = tl.cast(offset, tl.int64) + n * M
    quad = first // 4 + chunk * BLOCK
    i = 4 * quad - first + tl.arange(0, 4 * BLOCK)
    return quad + tl.arange(0, BLOCK), n * M + i, (i >= 0) & (i < M)


@triton.jit
def _picture(x0_ptr, at, mask):
    x = tl.load(x0_ptr + at, mask=mask, other=0).to(tl.float32)
    if x0_ptr.dtype.element_ty == tl.uint8:
        x = tl.div_rn(x, 127.5) - 1.0
    return x


@triton.jit
def _epsilon(noise_ptr, seed_ptr, step_ptr, quad, at, mask):
    if noise_ptr is None:
        return normals(tl.load(seed_ptr), tl.load(step_ptr), TRAINING_NOISE, quad)
    else:
        return tl.load(noise_ptr + at, mask=mask, other=0.0)


@triton.jit
def _forward_noise_fwd_kernel(
    x_t_ptr,
    x0_ptr,
    coeffs_ptr,
    t_ptr,
    seed_ptr,  # None: noise is given, as is step_ptr
    step_ptr,
    noise_ptr,  # None: drawn from the key
    offset,
    T,
    C,
    S,
    chunks,
    X_T_LAST: tl.constexpr,  # channels_last
    X0_LAST: tl.constexpr,
    NOISE_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) // chunks
    quad, i, mask = _elements(n, tl.program_id(0).to(tl.int64) % chunks, offset, C * S, BLOCK)
    a, b = _row(coeffs_ptr, t_ptr, n, T, 0)
    x0 = _picture(x0_ptr, _at(i, C, S, X0_LAST), mask)
    eps = _epsilon(noise_ptr, seed_ptr, step_ptr, quad, _at(i, C, S, NOISE_LAST), mask)
    x_t = rounded(a * x0 + b * eps, x_t_ptr.dtype.element_ty)
    tl.store(x_t_ptr + _at(i, C, S, X_T_LAST), x_t, mask=mask)


@triton.jit
def _residual(
    model_out_ptr, x0_ptr, coeffs_ptr, t_ptr, seed_ptr, step_ptr, noise_ptr, n, quad, i, mask,
    T, C, S, OUT_LAST: tl.constexpr, X0_LAST: tl.constexpr, NOISE_LAST: tl.constexpr,
):  # fmt: skip
    p, q = _row(coeffs_ptr, t_ptr, n, T, 2)
    x0 = _picture(x0_ptr, _at(i, C, S, X0_LAST), mask)
    eps = _epsilon(noise_ptr, seed_ptr, step_ptr, quad, _at(i, C, S, NOISE_LAST), mask)
    out = tl.load(model_out_ptr + _at(i, C, S, OUT_LAST), mask=mask, other=0.0).to(tl.float32)
    return out - (p * x0 + q * eps)


@triton.jit
def _forward_noise_loss_kernel(
    sums_ptr,  # (N, chunks) float32
    model_out_ptr,
    x0_ptr,
    coeffs_ptr,
    t_ptr,
    seed_ptr,
    step_ptr,
    noise_ptr,
    offset,
    T,
    C,
    S,
    chunks,
    OUT_LAST: tl.constexpr,
    X0_LAST: tl.constexpr,
    NOISE_LAST: tl.constexpr,
    LOSS: tl.constexpr,  # 0 l1, 1 l2, 2 huber
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n = program // chunks
    quad, i, mask = _elements(n, program % chunks, offset, C * S, BLOCK)
    r = _residual(
        model_out_ptr, x0_ptr, coeffs_ptr, t_ptr, seed_ptr, step_ptr, noise_ptr, n, quad, i, mask,
        T, C, S, OUT_LAST, X0_LAST, NOISE_LAST,
    )  # fmt: skip
    size = tl.abs(r)
    if LOSS == 0:
        value = size
    elif LOSS == 1:
        value = r * r
    else:
        value = tl.where(size < 1.0, 0.5 * r * r, size - 0.5)
    tl.store(sums_ptr + program, tl.sum(tl.where(mask, value, 0.0)))


@triton.jit
def _forward_noise_loss_sum_kernel(loss_ptr, sums_ptr, weights_ptr, M, chunks, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, chunks, BLOCK):
        k = first + tl.arange(0, BLOCK)
        total += tl.load(sums_ptr + n * chunks + k, mask=k < chunks, other=0.0).to(tl.float64)
    mean = tl.sum(total) / M
    if weights_ptr is not None:
        mean *= tl.load(weights_ptr + n).to(tl.float64)
    tl.store(loss_ptr + n, mean.to(tl.float32))


@triton.jit
def _forward_noise_loss_bwd_kernel(
    dmodel_out_ptr,
    dloss_ptr,
    model_out_ptr,
    x0_ptr,
    coeffs_ptr,
    t_ptr,
    weights_ptr,  # None: 1
    seed_ptr,
    step_ptr,
    noise_ptr,
    offset,
    T,
    C,
    S,
    chunks,
    OUT_LAST: tl.constexpr,
    X0_LAST: tl.constexpr,
    NOISE_LAST: tl.constexpr,
    LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) // chunks
    quad, i, mask = _elements(n, tl.program_id(0).to(tl.int64) % chunks, offset, C * S, BLOCK)
    r = _residual(
        model_out_ptr, x0_ptr, coeffs_ptr, t_ptr, seed_ptr, step_ptr, noise_ptr, n, quad, i, mask,
        T, C, S, OUT_LAST, X0_LAST, NOISE_LAST,
    )  # fmt: skip
    if LOSS == 1:
        slope = r + r
    else:
        edge = 0.0 if LOSS == 0 else 1.0
        slope = tl.where(r > edge, 1.0, tl.where(r < -edge, -1.0, r))  # NaN passes
    scale = tl.load(dloss_ptr + n) / (C * S).to(tl.float32)
    if weights_ptr is not None:
        scale *= tl.load(weights_ptr + n)
    gradient = rounded(scale * slope, dmodel_out_ptr.dtype.element_ty)
    tl.store(dmodel_out_ptr + _at(i, C, S, OUT_LAST), gradient, mask=mask)


def _sizes(x: torch.Tensor) -> tuple[int, int, int]:
    """C, S and the chunks of a sample: its elements may begin inside a quad."""
    C, M = x.shape[1], x.numel() // x.shape[0]
    return C, M // C, triton.cdiv(M + 3, 4 * BLOCK)


def _last(t: torch.Tensor | None) -> bool:
    return t is not None and not t.is_contiguous()


def forward_noise_fwd(
    x_t: torch.Tensor,  # (N, C, *S), written; x0 and noise alike, each contiguous or channels_last
    x0: torch.Tensor,
    coeffs: torch.Tensor,  # (T, 4) float32 contiguous
    t: torch.Tensor,  # (N,) int64
    seed: torch.Tensor | None,  # one int64, like step
    step: torch.Tensor | None,
    noise: torch.Tensor | None,  # float32
    offset: int,
) -> None:
    C, S, chunks = _sizes(x0)
    with torch.cuda.device_of(x0):
        _forward_noise_fwd_kernel[programs(x0.shape[0] * chunks)](
            x_t, x0, coeffs, t, seed, step, noise, offset, coeffs.shape[0], C, S, chunks,
            X_T_LAST=_last(x_t), X0_LAST=_last(x0), NOISE_LAST=_last(noise),
            BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def forward_noise_loss_fwd(
    model_out: torch.Tensor,  # (N, C, *S)
    x0: torch.Tensor,
    coeffs: torch.Tensor,
    t: torch.Tensor,
    weights: torch.Tensor | None,  # (N,) float32
    seed: torch.Tensor | None,
    step: torch.Tensor | None,
    noise: torch.Tensor | None,
    offset: int,
    loss: int,
) -> torch.Tensor:  # (N,) float32
    C, S, chunks = _sizes(x0)
    n = x0.shape[0]
    sums = x0.new_empty((n, chunks), dtype=torch.float32)
    result = x0.new_empty((n,), dtype=torch.float32)
    with torch.cuda.device_of(x0):
        _forward_noise_loss_kernel[programs(n * chunks)](
            sums, model_out, x0, coeffs, t, seed, step, noise, offset, coeffs.shape[0], C, S,
            chunks, OUT_LAST=_last(model_out), X0_LAST=_last(x0), NOISE_LAST=_last(noise),
            LOSS=loss, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        _forward_noise_loss_sum_kernel[programs(n)](
            result, sums, weights, C * S, loop_count(chunks), BLOCK=BLOCK, num_warps=4
        )
    return result


def forward_noise_loss_bwd(
    dloss: torch.Tensor,  # (N,) float32
    model_out: torch.Tensor,
    x0: torch.Tensor,
    coeffs: torch.Tensor,
    t: torch.Tensor,
    weights: torch.Tensor | None,
    seed: torch.Tensor | None,
    step: torch.Tensor | None,
    noise: torch.Tensor | None,
    offset: int,
    loss: int,
) -> torch.Tensor:  # like model_out
    C, S, chunks = _sizes(x0)
    dmodel_out = torch.empty_like(model_out)
    with torch.cuda.device_of(x0):
        _forward_noise_loss_bwd_kernel[programs(x0.shape[0] * chunks)](
            dmodel_out, dloss, model_out, x0, coeffs, t, weights, seed, step, noise, offset,
            coeffs.shape[0], C, S, chunks, OUT_LAST=_last(model_out), X0_LAST=_last(x0),
            NOISE_LAST=_last(noise), LOSS=loss, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return dmodel_out


def refusals(op: str, lead, second, *args) -> list[str]:
    """lead, second: x0 and coeffs, or model_out and x0."""
    return base_refusals(*[t for t in (lead, second) if t.dtype != torch.uint8])


_library = boundary.define(
    boundary.TRITON,
    {
        "forward_noise_fwd": forward_noise_fwd,
        "forward_noise_loss_fwd": forward_noise_loss_fwd,
        "forward_noise_loss_bwd": forward_noise_loss_bwd,
    },
)

"""What every Triton kernel of the engine shares: where it can run, and rounding to bfloat16.

Under TRITON_INTERPRET=1 kernels run on CPU tensors in NumPy, where bfloat16 is a bit pattern:
arithmetic on it is silently wrong and float32 → bfloat16 truncates. So kernels compute in float32,
and `rounded` and `dot_operand` do by hand there what the GPU does by itself.
"""

import functools

import torch
import triton
import triton.language as tl

# The variable is read when triton is first imported: ask triton what it did, not the environment.
INTERPRETED = tl.constexpr(type(tl.sum).__name__ == "InterpretedFunction")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """float32 → dtype, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        return tl.where(value == value, even, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def dot_operand(value, dtype: tl.constexpr):
    """value rounded to dtype, in the type that tl.dot takes here."""
    if INTERPRETED:
        return rounded(value.to(tl.float32), dtype).to(tl.float32)
    else:
        return value.to(dtype)


def loop_count(n: int):
    """A trip count for `range` in a kernel.

    The interpreter of Triton 3.6 cannot make an index of a scalar argument with NumPy ≥ 2.4;
    a constant passes through it.
    """
    return tl.constexpr(n) if INTERPRETED.value else n


def programs(count: int) -> tuple[int]:
    """A grid. One dimension has 2³¹ - 1 programs, the other two only 65535."""
    if count >= 2**31:
        raise RuntimeError("the tensor needs more programs than one launch has (2^31 - 1)")
    return (count,)


@functools.cache
def _cached_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    """Apart from its cache: Dynamo traces into cached functions, and this one asks the driver."""
    return _cached_capability(device)


def refusals(*tensors: torch.Tensor | None) -> list[str]:
    """Why these tensors cannot go to a Triton kernel; the first one leads."""
    tensors = [t for t in tensors if t is not None]
    lead, reasons = tensors[0], []
    interpreted_now = type(rounded).__name__ == "InterpretedFunction"
    if interpreted_now != INTERPRETED.value:
        reasons.append("TRITON_INTERPRET was changed after the first import of triton")
    if lead.device.type == "cuda":
        if torch.version.hip is None and _capability(lead.device) < (8, 0):
            reasons.append("needs compute capability 8.0 or newer")
    elif not (INTERPRETED.value and lead.device.type == "cpu"):
        reasons.append(
            "needs a CUDA tensor (or TRITON_INTERPRET=1 before the first import of triton)"
        )
    reasons.extend(
        f"dtype {dtype} is not float32, bfloat16 or float16"
        for dtype in dict.fromkeys(t.dtype for t in tensors)
        if dtype not in DTYPES
    )
    return reasons

"""Standard normals by their numbers: validation and choice of back end."""

import torch
from torch import Tensor

from .. import dispatch
from ..device import usable_device
from .layout import is_whole, scalar

# Streams of the noise contract: draws for different purposes never share a number.
STEP_NOISE, INITIAL_NOISE, TRAINING_NOISE = 0, 1, 2


def noise(
    seed: int | Tensor,
    step: int | Tensor,
    stream: int,
    shape: tuple[int, ...],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    offset: int = 0,
    impl: str = "auto",
) -> Tensor:
    """Standard normals: element i is number offset + i of (seed, step, stream).

    The same bits on every back end (Philox4x32-10, Salmon et al. 2011; Box & Muller 1958),
    |z| < 5.77. seed: int64; step: 0 … 2³²−1; each an int or an int64 tensor of one element on
    `device`. stream: 0 step noise, 1 initial noise, 2 training noise, others free. Returns `shape`,
    contiguous, drawn in float32 and rounded to dtype (float32, bfloat16 or float16). Raises
    ValueError otherwise.
    """
    args = arguments(seed, step, stream, shape, device=device, dtype=dtype, offset=offset)
    out = args[0]
    backend = dispatch.pick("noise", "eager" if out.numel() == 0 else impl, *args)
    dispatch.function("noise", "fwd", backend)(*args)
    return out


def arguments(seed, step, stream, shape, *, device="cpu", dtype=torch.float32, offset=0):
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"noise: dtype is {dtype}, expected float32, bfloat16 or float16")
    for name, value in (("stream", stream), ("offset", offset)):
        if not is_whole(value) or not 0 <= value < (2**32 if name == "stream" else 2**63):
            most = "2^32 - 1" if name == "stream" else "2^63 - 1"
            raise ValueError(f"noise: {name} is {value!r}, expected an integer, 0 … {most}")
    if any(not is_whole(size) or size < 0 for size in shape):
        raise ValueError(f"noise: shape is {tuple(shape)}, expected whole numbers, 0 or more")
    if not torch.compiler.is_compiling():
        device = usable_device(device)  # a sentence, in place of torch's own assertion
    out = torch.empty(shape, dtype=dtype, device=device)
    seed = scalar("seed", seed, out.device, -(2**63), 2**63)
    return out, seed, scalar("step", step, out.device, 0, 2**32), stream, offset

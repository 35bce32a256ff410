"""How a model is computed: device, precision, memory layout, compiled or not; chosen or asked for.

Every choice of "auto" is printed in one line, and each can be overridden from the command line.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass

import torch

from .device import autocast, cannot_pack, choose_device, choose_precision
from .dispatch import pick

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# glibc's mallopt (malloc.h). 32 MB is the documented limit of the second; newer ones take more.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST, DOCUMENTED = 2**31 - 1, 32 * 2**20


@dataclass(frozen=True)
class Execution:
    """The choices; `prepared` and `autocast` carry them out."""

    device: torch.device
    precision: torch.dtype
    layout: str
    compiled: bool
    prepacked: bool  # weights in oneDNN's own layout, while sampling on the CPU
    keeps_memory: bool  # freed memory stays with the process

    def prepared(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model on its device, in its layout."""
        model.memory_format = LAYOUTS[self.layout]
        return model.to(self.device, memory_format=model.memory_format)

    def network(self, model: torch.nn.Module):
        """What is called in the model's place: itself, or compiled; its weights are the model's."""
        return torch.compile(model) if self.compiled else model

    def autocast(self):
        return autocast(self.device, self.precision)

    def tidy(self) -> None:
        """Hands freed memory that is kept back to the system, once: after what is no training step.

        Saving and drawing free blocks of other sizes than a step does. Kept, they lie scattered
        between those in use, and every time a little more is taken: 3 MB each time that a U-Net of
        a million parameters saved and drew.
        """
        if self.keeps_memory:
            ctypes.CDLL(None).malloc_trim(0)


def choose(
    device: str | None = None,
    precision: str = "auto",
    layout: str = "auto",
    compiled: bool = False,
    *,
    sampling: bool = False,
) -> Execution:
    """The fastest way that is known here, with what was asked for in the place of each "auto".

    device     cuda where there is one, else the CPU
    precision  bf16 where the device has arithmetic for it (device.py)
    layout     channels_last, which convolutions and norms read fastest
    compiled   not unless asked for: what a compiled U-Net of ours gains on two CPU cores stands
               in benchmarks/results/unet.json, and it takes a minute to compile

    Raises ValueError, one sentence, for a device that is not there.
    """
    where = choose_device(device)
    dtype = choose_precision(precision, where)
    return Execution(
        device=where,
        precision=dtype,
        layout="channels_last" if layout == "auto" else layout,
        compiled=compiled,
        prepacked=sampling and where.type == "cpu" and not compiled and not cannot_pack(dtype),
        keeps_memory=where.type == "cpu" and keep_freed_memory(),
    )


def keep_freed_memory() -> bool:
    """Lets the process keep the memory that it frees, for the next step; whether that worked.

    A training step on the CPU frees and takes hundreds of megabytes. glibc hands large blocks back
    to the system, which gives them again page by page: bench_kept_memory in
    benchmarks/results/unet.json counts the page faults of a step and their time. Elsewhere than on
    Linux with glibc, or where the user has set malloc up, nothing is done.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    if "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    maps = mallopt(M_MMAP_THRESHOLD, LARGEST) or mallopt(M_MMAP_THRESHOLD, DOCUMENTED)
    return bool(maps and mallopt(M_TRIM_THRESHOLD, LARGEST))


def describe(model: torch.nn.Module, execution: Execution) -> str:
    """One line: what was chosen, and the back ends that `auto` takes for the model's ops."""
    e = execution
    where = f"cpu ({torch.get_num_threads()} threads)"
    if e.device.type == "cuda":
        where = f"{e.device} ({torch.cuda.get_device_name(e.device)})"
    x = torch.zeros(2, 32, 8, 8, device=e.device, dtype=e.precision)
    x = x.to(memory_format=LAYOUTS[e.layout])
    heads = torch.zeros(2, 1, 64, 32, device=e.device, dtype=e.precision)
    norm = pick("group_norm_silu", "auto", x, *[None] * 6, 8, 1e-5, True)
    attention = pick("attention", "auto", heads, heads, heads, 0.2)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    parts = [where, str(e.precision).removeprefix("torch."), e.layout]
    parts.append("torch.compile" if e.compiled else "not compiled")
    parts += ["prepacked weights"] if e.prepacked else []
    return (
        f"{', '.join(parts)}; U-Net of {count:.2f} M parameters; "
        f"group_norm_silu: {norm}, attention: {attention}"
    )

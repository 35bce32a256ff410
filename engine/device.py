"""Where a model runs, and in which precision."""

from __future__ import annotations

import platform

import torch

NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKED = (torch.float32, torch.bfloat16)  # dtypes of weights in oneDNN's own layout


def choose_device(name: str | torch.device | None) -> torch.device:
    """The device to train or sample on; for None the best there is: cuda, else cpu.

    Raises ValueError, one sentence, for a device that is not there or is neither cpu nor cuda.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = _parse(name)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {device} is not supported: give cpu or cuda")
    return usable_device(device)


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name. Raises ValueError, one sentence, if this torch cannot use it."""
    device = _parse(name)
    if device.type == "cpu":
        return device
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if torch.version.cuda is None and torch.version.hip is None:
            reason = (
                f"this torch ({torch.__version__}) is built without CUDA: "
                "use cpu, or install a CUDA build of torch"
            )
        elif not count:
            reason = "torch finds no GPU: use cpu, or see with nvidia-smi whether the driver runs"
        elif (device.index or 0) >= count:
            reason = f"torch finds {count} GPU(s), the last is cuda:{count - 1}"
        else:
            return device
        raise ValueError(f"device {device}: {reason}")
    try:
        torch.empty(0, device=device)
    except Exception as error:  # each device type complains in its own way, AssertionError included
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"device {device} cannot be used: {reason[:200]}") from None
    return device


def _parse(name: str | torch.device) -> torch.device:
    try:
        return torch.device(name)
    except (RuntimeError, TypeError):
        raise ValueError(f"{name!r} is no device: give cpu, cuda or cuda:1") from None


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """bf16 for "auto" where the device has arithmetic for it; elsewhere fp32 is faster. Never fp16.

    An x86 CPU has it with AVX512_BF16 or AMX; oneDNN emulates it with AVX-512 alone.
    """
    if name != "auto":
        return NAMES[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        if platform.machine().lower() in ("x86_64", "amd64"):
            fast = fast and (
                torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
            )
    return torch.bfloat16 if fast else torch.float32


def cannot_pack(dtype: torch.dtype) -> str:
    """What the CPU's oneDNN lacks for weights in its own layout (prepacked.py); "" for nothing."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return "oneDNN, which this torch is built without or has turned off"
    if dtype not in PACKED:
        return f"float32 or bfloat16, not {dtype}"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "bfloat16 kernels of oneDNN, which this CPU lacks"
    return ""


def autocast(device: torch.device, precision: torch.dtype):
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)

"""What the ops share: layouts that the kernels read, scalars on the device, second derivatives."""

from numbers import Integral, Real

import torch
from torch import Tensor


def is_dense(t: Tensor) -> bool:
    if t.is_contiguous():
        return True
    if t.dim() == 4:
        return t.is_contiguous(memory_format=torch.channels_last)
    return t.dim() == 5 and t.is_contiguous(memory_format=torch.channels_last_3d)


def dense(t: Tensor) -> Tensor:
    return t if is_dense(t) else t.contiguous()


def rows(t: Tensor | None) -> Tensor | None:
    """An operand whose last dimension is contiguous; rows of a chunked embedding stay in place."""
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def at_least_4d(t: Tensor) -> Tensor:
    if t.dim() in (4, 5):
        return t
    return t.flatten(2).unsqueeze(-1) if t.dim() > 2 else t.reshape(t.shape[0], -1, 1, 1)


def scalar(name: str, value: int | Tensor, device: torch.device, low: int, high: int) -> Tensor:
    """One int64 on the device, where a captured launch can read it."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype != torch.int64 or value.device != device:
            raise ValueError(
                f"{name} is {tuple(value.shape)} {value.dtype} on {value.device}, "
                f"expected one int64 on {device}"
            )
        return value
    if not is_whole(value) or not low <= value < high:
        raise ValueError(f"{name} is {value!r}, expected an integer, {low} <= {name} < {high}")
    return torch.tensor(value, dtype=torch.int64, device=device)


def is_whole(value) -> bool:
    """A whole number of Python's, NumPy's or a graph's; True and False are none."""
    if type(value) is int:  # an abstract class takes 0.5 µs to answer
        return True
    return isinstance(value, (Integral, torch.SymInt)) and not isinstance(value, bool)


def is_positive(value) -> bool:
    if type(value) is not float and not isinstance(value, (Real, torch.SymFloat)):
        return False
    return value > 0


def distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each an object of its own: Dynamo refuses an autograd.Function that gets a tensor twice."""
    if not torch.compiler.is_compiling():
        return tensors
    found = []
    for t in tensors:
        for before in found:
            if t is not None and t is before:
                t = t.view_as(t)
                break
        found.append(t)
    return tuple(found)


def check_tensors(op: str, **operands) -> None:
    for name, t in operands.items():
        if not isinstance(t, Tensor):
            raise ValueError(f"{op}: {name} is {type(t).__name__}, expected a tensor")


def refuse_double_backward(op: str, backend: str, saved: tuple) -> None:
    """Under create_graph=True the kernels' results would be constants: a silently wrong derivative.

    once_differentiable does not help: it complains only when the cotangent requires a gradient.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in saved):
        raise second_derivative(op, backend)


def second_derivative(op: str, backend: str) -> RuntimeError:
    return RuntimeError(
        f"{op}: {backend} has no second derivative (create_graph=True): use impl='eager'"
    )

"""reverse_step's out=: tensors of the caller's that the results are written to."""

import torch
from torch import Tensor

from .. import dispatch
from .layout import at_least_4d, dense


def results_of(
    out: Tensor | tuple[Tensor, ...],
    x: Tensor,
    return_x0: bool,
    model_dtype: torch.dtype | None,
    reads: tuple[Tensor | None, ...],  # what the call reads, x first
) -> tuple[Tensor, ...]:
    """The tensors of `out`, x_next first. Raises for what cannot be written in their place.

    ValueError for the number, shape, dtype, device, layout or memory; RuntimeError where the call
    would need a gradient. Whose memory is whose torch.compile looks after by itself.
    """
    names = {"x_next": x.dtype}
    if return_x0:
        names["x0"] = x.dtype
    if model_dtype is not None:
        names["x_next in model_dtype"] = model_dtype
    results = out if isinstance(out, tuple) and len(names) > 1 else (out,)
    if len(results) != len(names) or not all(isinstance(t, Tensor) for t in results):
        each = f"a tuple of {len(names)} tensors, " if len(names) > 1 else "a tensor, "
        raise ValueError(f"reverse_step: out is {_told(out)}, expected {each}{', '.join(names)}")
    laid = dense(at_least_4d(x))
    for (name, dtype), t in zip(names.items(), results, strict=True):
        fits = t.shape == x.shape and t.dtype == dtype and t.device == x.device
        if not fits or not _lies_like(t, laid):
            raise ValueError(
                f"reverse_step: out's {name} is {tuple(t.shape)} {t.dtype} on {t.device}, strides "
                f"{t.stride()}, expected {tuple(x.shape)} {dtype} on {x.device}, as "
                "torch.empty_like(x) lies, or contiguous where x has gaps"
            )
    if dispatch.wants_gradient((*reads, *results)):
        raise RuntimeError(
            "reverse_step: out= has no gradient, and one of the tensors requires one: leave out= "
            "out, or call it under torch.no_grad()"
        )
    if not torch.compiler.is_compiling():
        _check_memory(names, results, reads)
    return results


def written(results: tuple[Tensor, ...]) -> None:
    """Tells autograd of what a kernel wrote, as torch's own operators do: a backward pass that
    saved the tensor as it was refuses to run."""
    if torch.compiler.is_compiling():
        return
    for t in results:
        if not t.is_inference():
            torch.autograd.graph.increment_version(t)


def _check_memory(names: dict, results: tuple, reads: tuple) -> None:
    x, *others = reads
    taken = [(f"out's {name}", t) for name, t in zip(names, results, strict=True)]
    for i, (name, t) in enumerate(taken):
        if t.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(
                f"reverse_step: {name} was made under torch.inference_mode(), which alone may "
                "write it: call it there, or give a clone"
            )
        begin, end = _extent(t)
        if begin == end:
            continue
        same = i == 0 and begin == x.data_ptr() and t.stride() == x.stride()
        for other in (*([] if same else [x]), *others, *(r for _, r in taken[:i])):
            if other is not None and _meets(begin, end, other):
                raise ValueError(
                    f"reverse_step: {name} lies in the memory of a tensor that the call reads or "
                    "writes: give it memory of its own (x_next may be x itself)"
                )


def _extent(t: Tensor) -> tuple[int, int]:
    """Addresses from the first element to past the last, gaps included."""
    begin, count = t.data_ptr(), t.numel()
    if not count or t.is_contiguous():
        return begin, begin + count * t.itemsize
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return begin, begin + (last + 1) * t.itemsize


def _meets(begin: int, end: int, other: Tensor) -> bool:
    first, last = _extent(other)
    return first < end and begin < last


def _lies_like(t: Tensor, laid: Tensor) -> bool:
    """Whether t can be viewed as `laid` lies, dimensions of size 1 aside."""
    if t.stride() == laid.stride():
        return True
    if t.shape != laid.shape:
        try:
            t = t.view(laid.shape)
        except RuntimeError:
            return False
    strides = zip(t.shape, t.stride(), laid.stride(), strict=True)
    return all(a == b or size == 1 for size, a, b in strides)


def _told(out) -> str:
    if isinstance(out, tuple):
        return f"a tuple of {', '.join(type(t).__name__ for t in out) or 'nothing'}"
    return type(out).__name__

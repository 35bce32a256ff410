"""Whether an accelerated model computes what the model itself does: outputs, gradients, time.

The model's own rounding is the measure. The same call runs three times, on copies: untouched, in
high precision (which counts as true), and accelerated. The accelerated model may be wrong by 2 ×
(what the untouched one is wrong by + one rounding), 3 × for gradients. Copies are judged, so the
model stays as it was.
"""

import contextlib
import copy
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .verdict import Row, differs, doubts, identical, judge, lines, tensors_of

DRAWS = (
    "the model draws random numbers (dropout?), which may fall elsewhere in another layout: "
    "call model.eval() first"
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Verification:
    """What `verify` found; `print(found)` shows the table."""

    model: str  # its class
    device: str
    precision: str  # of the model, or of autocast around it
    truth: str  # of the run that counts as true
    rows: list[Row]  # outputs, gradients of the inputs, of all parameters, of each parameter
    seconds: dict[str, tuple[float, float]]  # what → median of the untouched, of the accelerated
    first_call: float  # seconds of the accelerated model's first call, compilation included
    identical: bool  # every output and gradient has the untouched one's bits
    report: object = None  # of the handle that accelerating returned
    notes: list[str] = field(default_factory=list)  # why nothing can be said, if so

    @property
    def ok(self) -> bool:
        """Every row is within its budget, and there was something to judge by."""
        return bool(self.rows) and not self.notes and all(row.ok for row in self.rows)

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if not row.ok]

    @property
    def table(self) -> str:
        return "\n".join(lines(self))

    def __str__(self) -> str:
        return self.table


def verify(
    model: nn.Module,
    *inputs,
    accelerate: Callable | None = None,
    gradients: bool = True,
    repeats: int = 5,
    seed: int = 0,
    **kwargs,
) -> Verification:
    """Compares model(*inputs, **kwargs) with the same call of the accelerated model.

    accelerate  f(model): changes the model in place, or returns another one; engine.accelerate
                unless given. Its result's `report`, if it has one, is shown
    gradients   also those of a random projection of the outputs, to every parameter and to every
                floating-point input
    repeats     how often both are timed, in turns; the median counts
    seed        of the random numbers that each run begins with, and of the projection

    True is a run of the untouched model in float64, or for half precision and under autocast in
    float32. A result of size |y| may be wrong by f·(e + ε·|y|), with e the untouched model's error,
    ε one rounding of the model's dtype, f = 2 for outputs and 3 for gradients; |·| is the Euclidean
    norm, and for outputs and gradients of inputs the largest element too. A parameter's gradient g
    may be wrong by 3·(e + |g|·r + ε·|G|/√P), with |G| that of all P parameters and r its relative
    error: a gradient that is zero by construction is rounding alone, of the size of the others.

    The model, its .grad, buffers and mode, the inputs and the state of every random number
    generator stay as they were; two or three copies of the model exist meanwhile. Raises ValueError
    for what is no module, float64, no tensor among the outputs, and a model that does not run in
    high precision or not accelerated.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"verify: model is {type(model).__name__}, expected an nn.Module")
    if not isinstance(repeats, int) or repeats < 1:
        raise ValueError(f"verify: repeats is {repeats!r}, expected a whole number, 1 or more")
    if not isinstance(seed, int):
        raise ValueError(f"verify: seed is {seed!r}, expected a whole number")
    if accelerate is None:
        from . import accelerate
    if not callable(accelerate):
        raise ValueError(f"verify: accelerate is {accelerate!r}, expected a function of the model")
    device = _device(model, (inputs, kwargs))
    if device.type == "meta":
        raise ValueError("verify: the model is on meta, where tensors have no values to compare")
    low = _precision(model, (inputs, kwargs), device)
    high = torch.float64 if low == torch.float32 else torch.float32
    with torch.inference_mode(False), torch.enable_grad(), _random_numbers_kept(device):
        call = _Call(inputs, kwargs, gradients, seed, device)
        untouched = copy.deepcopy(model)
        plain = call.run(untouched)
        if not plain.outputs:
            raise ValueError("verify: the model returned no floating-point tensor to compare")
        truth = _true(call, model, high)
        accelerated = copy.deepcopy(model)
        handle = accelerate(accelerated)
        fast = handle if isinstance(handle, nn.Module) else accelerated
        begin = time.perf_counter()
        try:
            found = call.run(fast, accelerated)
        except Exception as error:  # whatever a compiler raises
            raise ValueError(
                f"verify: {type(model).__name__} runs as it is, but not accelerated: "
                f"{_reason(error)}"
            ) from error
        call.wait()
        first_call = time.perf_counter() - begin
        rows = judge(found, plain, truth, torch.finfo(low).eps)
        notes = doubts(rows)
        wrong = not notes and not all(row.ok for row in rows)
        if wrong and differs(call.run(untouched, seed=1), plain):
            notes = [DRAWS]
        seconds = call.times(untouched, fast, accelerated, repeats)
    return Verification(
        model=type(model).__name__,
        device=str(device),
        precision=_name(low) + (" (autocast)" if _autocast(device) else ""),
        truth=_name(high),
        rows=rows,
        seconds=seconds,
        first_call=first_call,
        identical=identical(found, plain),
        report=getattr(handle, "report", None),
        notes=notes,
    )


@dataclass
class _Result:
    outputs: dict[str, Tensor]
    inputs: dict[str, Tensor | None]  # gradients
    parameters: dict[str, Tensor | None]  # gradients


@dataclass
class _Call:
    """The call that is compared, with inputs and random numbers new for every run."""

    inputs: tuple
    kwargs: dict
    gradients: bool
    seed: int
    device: torch.device

    def arguments(self, dtype: torch.dtype | None = None) -> tuple[list, dict, dict[str, Tensor]]:
        """Copies of the arguments, in at least this dtype; and the leaves, by name."""
        leaves = {}

        def new(name: str, value):
            if isinstance(value, torch.Generator):
                return value.clone_state()
            if not isinstance(value, Tensor):
                return value
            value = value.detach().clone()
            if not value.is_floating_point():
                return value
            if dtype is not None and value.dtype in FLOATS:
                value = value.to(torch.promote_types(value.dtype, dtype))
            if not self.gradients:
                return value
            leaves[name] = value.requires_grad_()
            return leaves[name].clone()  # a model may write into its inputs, not into a leaf

        args = [_mapped(value, f"input {i}", new) for i, value in enumerate(self.inputs)]
        named = {k: _mapped(value, f"input {k}", new) for k, value in self.kwargs.items()}
        return args, named, leaves

    def run(
        self, model: Callable, owner: nn.Module | None = None, *, dtype=None, forward=None, seed=0
    ) -> _Result:
        """owner: whose parameters, if not the model's; forward: a context for that pass alone."""
        args, named, leaves = self.arguments(dtype)
        owner = model if owner is None else owner
        for begin in (torch.manual_seed, random.seed, np.random.seed):
            begin((self.seed + seed) % 2**32)
        with forward or contextlib.nullcontext():
            outputs = dict(tensors_of(model(*args, **named)))
        parameters = {}
        if self.gradients:
            parameters = {k: p for k, p in owner.named_parameters() if p.requires_grad}
            self.backward(outputs)
        result = _Result(
            {name: t.detach() for name, t in outputs.items()},
            {name: leaf.grad for name, leaf in leaves.items()},
            {name: p.grad for name, p in parameters.items()},
        )
        for p in owner.parameters():
            p.grad = None
        return result

    def backward(self, outputs: dict[str, Tensor]) -> None:
        kept = [t for t in outputs.values() if t.requires_grad]
        g = torch.Generator().manual_seed(self.seed)
        # Eight bits of each, so that they are the same numbers in every dtype.
        normals = [torch.randn(t.shape, generator=g).bfloat16() for t in kept]
        if kept:
            pairs = zip(normals, kept, strict=True)
            torch.autograd.backward(kept, [z.to(t.device, t.dtype) for z, t in pairs])

    def times(self, untouched, fast, accelerated, repeats: int) -> dict[str, tuple[float, float]]:
        """Median seconds of both, in turns."""
        args, named, _ = self.arguments()

        def forward(model):
            with torch.no_grad():
                model(*args, **named)

        def training(model):
            self.run(model, accelerated if model is fast else None)

        whats = {"forward": forward}
        if self.gradients:
            whats["forward and backward"] = training
        return {what: self._in_turns(f, untouched, fast, repeats) for what, f in whats.items()}

    def _in_turns(self, f: Callable, untouched, fast, repeats: int) -> tuple[float, float]:
        found = ([], [])
        for i in range(repeats + 1):
            for model, seconds in zip((untouched, fast), found, strict=True):
                self.wait()
                begin = time.perf_counter()
                f(model)
                self.wait()
                if i:  # the first call may compile
                    seconds.append(time.perf_counter() - begin)
        return statistics.median(found[0]), statistics.median(found[1])

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Raised(TorchFunctionMode):
    """Casts to at most float32 that are written into a model go to `dtype` instead."""

    CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.CASTS:
            return args[0].to(self.dtype)
        args = [self._raised(value) for value in args]
        return function(*args, **{k: self._raised(v) for k, v in (kwargs or {}).items()})

    def _raised(self, value):
        return self.dtype if isinstance(value, torch.dtype) and value in FLOATS else value


@contextlib.contextmanager
def _raised(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _Raised(dtype):
            yield
    finally:
        torch.set_default_dtype(before)


def _true(call: _Call, model: nn.Module, dtype: torch.dtype) -> _Result:
    """The untouched model in high precision; where it casts in between, those casts raised too."""
    raised = nn.Module.to(copy.deepcopy(model), dtype)  # diffusers' own `to` warns of it
    with torch.autocast(call.device.type, enabled=False):
        try:
            return call.run(raised, dtype=dtype)
        except Exception as first:  # whatever a mixture of dtypes raises
            try:
                return call.run(raised, dtype=dtype, forward=_raised(dtype))
            except Exception:
                reason = (str(first).splitlines() or [type(first).__name__])[0]
                raise ValueError(
                    f"verify: {type(model).__name__} does not run in {_name(dtype)}, which would "
                    f"count as true: {reason[:200]}"
                ) from first


def _reason(error: Exception) -> str:
    text = str(error)
    inner = re.search(r"got \w+\('([^\n]*)'\)", text)  # Dynamo's first line does not tell
    first = inner[1] if inner else (text.splitlines() or [type(error).__name__])[0]
    hint = " (in channels_last memory: try without, or reshape)" if "Cannot view" in first else ""
    return first[:200] + hint


def _mapped(value, name: str, new: Callable):
    """value with new(name, leaf) in place of every leaf of its lists, tuples and dicts."""
    if isinstance(value, dict):
        return {k: _mapped(v, f"{name}.{k}", new) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_mapped(v, f"{name}.{i}", new) for i, v in enumerate(value))
    return new(name, value)


def _tensors(value) -> list[Tensor]:
    found = []
    _mapped(value, "", lambda name, leaf: found.append(leaf) if isinstance(leaf, Tensor) else None)
    return found


def _device(model: nn.Module, given) -> torch.device:
    tensors = (*model.parameters(), *model.buffers(), *_tensors(given))
    return next((t.device for t in tensors), torch.device("cpu"))


def _autocast(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type)


def _precision(model: nn.Module, given, device: torch.device) -> torch.dtype:
    """The least precise that the model computes in."""
    if _autocast(device):
        return torch.get_autocast_dtype(device.type)
    tensors = [t for t in model.parameters() if t.is_floating_point()]
    tensors = tensors or [t for t in _tensors(given) if t.is_floating_point()]
    low = max((t.dtype for t in tensors), key=lambda d: torch.finfo(d).eps, default=torch.float32)
    if low not in FLOATS:
        raise ValueError(
            f"verify: the model is {_name(low)}, and there is no higher precision to compare with: "
            "verify it in float32, bfloat16 or float16"
        )
    return low


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)

"""Which back end serves a call, and why the others do not. The only file that imports back ends."""

import importlib.util
import json
import os
from functools import cache
from pathlib import Path

import torch
from torch.autograd import forward_ad

IMPLS = ("auto", "eager", "native", "triton")

# What `auto` tries, in order, per device. Triton on a CPU tensor is the interpreter: a test tool,
# never a choice of `auto`. On CUDA, `auto` passes over what has not proved right on that GPU.
ORDER = {
    "group_norm_silu": {"cpu": ("native", "eager"), "cuda": ("triton", "native", "eager")},
    "rms_norm_silu": {"cpu": ("native", "eager"), "cuda": ("triton", "eager")},
    "attention": {"cpu": ("native", "eager"), "cuda": ("triton", "eager")},
    "reverse_step": {"cpu": ("native", "eager"), "cuda": ("triton", "native", "eager")},
    "forward_noise": {"cpu": ("native", "eager"), "cuda": ("triton", "native", "eager")},
    "noise": {"cpu": ("native", "eager"), "cuda": ("triton", "native", "eager")},
}
SAMPLING = ("reverse_step", "forward_noise")  # their kernels have no gradient to the images

# GPU name → op → back end → how many cases of the op's tests passed there, and the sources' digest.
# Written by the tests on a machine with a GPU (tests/proof.py), then committed.
EVIDENCE_FILE = Path(__file__).with_name("evidence.json")


# GPU name → shapes of attention at which a committed benchmark shows PyTorch's SDPA ahead of our
# kernels. An entry: {"D": [64, 64], "S": [1024, 4096], "Sk": [1024, 4096], "source": "…json"},
# bounds included; a size that it leaves out may be any.
SDPA_FASTER_FILE = Path(__file__).with_name("sdpa_faster.json")
# The same on the CPU, measured on two cores with AVX-512 and AMX (benchmarks/bench_attention.py);
# gradients in 16 bits are exempt: PyTorch computes them slowly at every size.
FEW_QUERIES, WIDE_HEADS = 16, 256
SDPA_FASTER_ON_CPU = {
    "few": f"fewer than {FEW_QUERIES} queries leave lanes idle",
    "wide": f"a head_dim above {WIDE_HEADS} leaves the caches",
}


class BackendError(RuntimeError):
    """An explicit `impl` or ENGINE_BACKEND cannot serve this call."""


def requested(impl: str) -> str:
    """`impl`, or for "auto" what ENGINE_BACKEND says."""
    source = "impl"
    if impl == "auto":
        impl, source = os.environ.get("ENGINE_BACKEND") or "auto", "ENGINE_BACKEND"
    if impl not in IMPLS:
        raise ValueError(f"{source}={impl!r} is unknown: choose one of {', '.join(IMPLS)}")
    return impl


def _constant(function):
    """torch.compiler.assume_constant_result without its import of Dynamo, which takes 1.6 s."""
    function._dynamo_marked_constant = True
    return function


_absences = {}  # (op, back end) → sentence: asked for at every call


@_constant
def absence(op: str, backend: str) -> str:
    """Why this back end is not there at all for this op; "" when it is."""
    found = _absences.get((op, backend))
    if found is None:
        found = _absences[op, backend] = _absence(op, backend)
    return found


def _absence(op: str, backend: str) -> str:
    if backend == "native":
        return module("noise", backend).available() or ""
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return ""


_modules = {}  # (op, back end) → module: an import statement that finds its module costs 1.5 µs


def module(op: str, backend: str):
    """The back end's module for this op, imported on first use."""
    if not torch.compiler.is_compiling():
        found = _modules.get((op, backend))
        if found is None:
            found = _modules[op, backend] = _import(op, backend)
        return found
    return _import(op, backend)


def _import(op: str, backend: str):
    # Import statements, not importlib: torch.compile traces them.
    if backend == "native":
        from .kernels import native as found
    elif backend == "eager":
        from .kernels import eager as found
    elif op == "group_norm_silu":
        from .kernels import group_norm_silu as found
    elif op == "rms_norm_silu":
        from .kernels import rms_norm_silu as found
    elif op == "attention":
        from .kernels import attention as found
    elif op == "reverse_step":
        from .kernels import reverse_step as found
    elif op == "forward_noise":
        from .kernels import forward_noise as found
    else:
        from .kernels import noise as found
    return found


def refusals(op: str, backend: str, args: tuple) -> list[str]:
    """The sentences that say why `backend` does not serve this call; empty when it does."""
    missing = absence(op, backend)
    if missing:
        return [missing]
    if backend != "eager" and op in SAMPLING and wants_gradient(args):
        return ["has no gradient: call it under torch.no_grad(), or use eager"]
    if backend != "eager" and has_tangent(args):
        return ["has no forward-mode derivative: use eager"]
    return module(op, backend).refusals(op, *args)


def has_tangent(args: tuple) -> bool:
    """Whether forward-mode differentiation is on its way: a kernel would drop it in silence."""
    if forward_ad._current_level < 0:
        return False
    tensors = (a for a in args if isinstance(a, torch.Tensor))
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def wants_gradient(args: tuple) -> bool:
    if torch.is_grad_enabled():
        for a in args:  # not any(): a generator costs 1 µs
            if isinstance(a, torch.Tensor) and a.requires_grad:
                return True
    return False


@cache
def _evidence() -> dict:
    try:
        return json.loads(EVIDENCE_FILE.read_text())
    except FileNotFoundError:
        return {}


@_constant
def cases_on(device: torch.device, op: str, backend: str) -> int:
    """How many cases of the op's tests this back end passed on GPUs of this name; 0: unproved."""
    proved = _evidence().get(torch.cuda.get_device_name(device), {}).get(op, {})
    return proved.get(backend, {}).get("cases", 0)


@cache
def _sdpa_faster() -> dict:
    return json.loads(SDPA_FASTER_FILE.read_text())


def sdpa_faster(op: str, backend: str, args: tuple) -> str:
    """What shows PyTorch's SDPA ahead at this call's shape, or why it is; "" where it is not."""
    if op != "attention":
        return ""
    if backend == "native" and args[0].device.type == "cpu":
        return _sdpa_faster_on_cpu(args)
    if backend != "triton" or args[0].device.type != "cuda":
        return ""
    entries = _entries_on(args[0].device)
    if not entries:
        return ""
    _, _, s, d = args[0].shape
    sizes = {"D": d, "S": s, "Sk": args[1].shape[2]}
    for entry in entries:
        bounds = ((size, entry.get(name)) for name, size in sizes.items())
        if all(b is None or b[0] <= size <= b[1] for size, b in bounds):
            return entry["source"]
    return ""


def _sdpa_faster_on_cpu(args: tuple) -> str:
    q = args[0]
    few, wide = q.shape[2] < FEW_QUERIES, q.shape[3] > WIDE_HEADS
    if not (few or wide) or (q.itemsize == 2 and wants_gradient(args)):
        return ""
    return SDPA_FASTER_ON_CPU["few" if few else "wide"]


@_constant
def _entries_on(device: torch.device) -> list:
    return _sdpa_faster().get(torch.cuda.get_device_name(device), [])


def evidence(op: str, backend: str, device: torch.device) -> str:
    """What is known of a path beyond "it serves"; "" where there is nothing to add."""
    if backend == "triton" and device.type == "cpu":
        return "the interpreter: for tests, thousands of times slower than native"
    if backend == "eager" or device.type != "cuda":
        return ""
    passed = cases_on(device, op, backend)
    if passed:
        return f"passed {passed} cases on this kind of GPU"
    return "not yet proved right on this kind of GPU: `make test` on it does, then auto may take it"


def _lacks_native(op: str, device: str) -> bool:
    return op in ("attention", "rms_norm_silu") and device != "cpu"


def pick(op: str, impl: str, *args) -> str:
    """The name of the back end that serves this call.

    An explicit request is served or raises BackendError; "auto" takes the first of ORDER that does
    not refuse. ENGINE_BACKEND is a request too, except for ops which that back end does not have.
    """
    explicit = requested(impl)
    if explicit == "native" and impl == "auto" and _lacks_native(op, args[0].device.type):
        explicit = "auto"
    if explicit == "auto":
        device = args[0].device
        for backend in ORDER[op].get(device.type, ("eager",)):
            if backend == "eager":  # it refuses nothing
                break
            if device.type == "cuda" and not cases_on(device, op, backend):
                continue
            if sdpa_faster(op, backend, args):
                continue
            if not refusals(op, backend, args):
                return backend
        return "eager"
    reasons = refusals(op, explicit, args)
    if reasons:
        source = "ENGINE_BACKEND" if impl == "auto" else "impl"
        raise BackendError(
            f"{op}: {source}={explicit} was requested and cannot serve this call: "
            f"{'; '.join(reasons)}\n{table(op, *args)}"
        )
    return explicit


def table(op: str, *args) -> str:
    """One line per back end: serves or refuses, and why; an arrow at the choice."""
    device = args[0].device.type
    by_name = requested("auto")
    chosen, arrow = by_name, "  ← ENGINE_BACKEND"
    if by_name == "auto":
        chosen, arrow = pick(op, "auto", *args), "  ← auto"
    x = args[0]
    lines = [f"{op} on {tuple(x.shape)} {str(x.dtype).removeprefix('torch.')} {device}"]
    for backend in IMPLS[1:]:
        reasons = refusals(op, backend, args)
        verdict = "refuses: " + "; ".join(reasons) if reasons else "serves"
        known = "" if reasons else evidence(op, backend, x.device)
        if not reasons and (source := sdpa_faster(op, backend, args)):
            slower = f"at this shape PyTorch's SDPA (eager) is faster: {source}"
            known = f"{known}; {slower}" if known else slower
        note = f" ({known})" if known else ""
        lines.append(f"  {backend:7s}{verdict}{note}{arrow if backend == chosen else ''}")
    return "\n".join(lines)


def split_qkv(qkv: torch.Tensor, num_heads: int, order: str) -> tuple[torch.Tensor, ...]:
    """q, k, v (N, heads, S, D) as views of a packed tensor, as every back end splits it."""
    from .kernels import boundary

    return boundary.split_qkv(qkv, num_heads, order)


def function(op: str, stage: str, backend: str):
    """`<op>_<stage>` of the back end; under torch.compile a registered, opaque op."""
    name = f"{op}_{stage}"
    if backend == "triton":
        found = module(op, backend)  # importing it registers the op
        if torch.compiler.is_compiling():
            return getattr(torch.ops.engine_triton, name)
        return getattr(found, name)
    return getattr(module(op, backend), name)

"""Calls on more than 2³¹ elements, of which only the ends run: python large_offsets.py triton

Memory that is not touched costs nothing: tensors of 4 GB and more are reserved, their last elements
filled, and of every launch only the first and the last programs (interpreted Triton), blocks
(emulated CUDA) or the last item (CPU) run. An offset that was computed in 32 bits then ends the
process or leaves the last elements wrong. So this runs in a process of its own, and prints a JSON
line per case. What was not run left zeros, which is what it would make of an input of zeros.
"""

import json
import math
import mmap
import os
import resource
import sys
import time
from functools import partial

os.environ["TRITON_INTERPRET"] = "1"

import torch
from engine.kernels import philox, reference
from large_offsets_ends import cuda_ends, native_ends, triton_ends

NORESERVE = 0x4000  # MAP_NORESERVE, which the module names from Python 3.13 on
LARGE = 1 << 20  # bytes; smaller memory is cleared by hand
TAIL = 32  # positions of the last sample that are compared
F16, F32 = torch.float16, torch.float32


def reserve(*shape: int, dtype=F16) -> torch.Tensor:
    """Zeros that take no memory until they are touched."""
    size = max(1, math.prod(shape)) * dtype.itemsize
    if size < LARGE:
        return torch.zeros(shape, dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = mmap.mmap(-1, size, flags=flags)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).view(shape)


def image(n: int, c: int, s: int, last: bool) -> torch.Tensor:
    """(N, C, S, 1) in either layout."""
    return reserve(n, s, 1, c).permute(0, 3, 1, 2) if last else reserve(n, c, s, 1)


class Reserved(torch.overrides.TorchFunctionMode):
    """torch.empty and its kin by `reserve`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.empty_like:
            order = sorted(range(args[0].dim()), key=lambda d: (-args[0].stride(d), d))
            made = reserve(*(args[0].shape[d] for d in order), dtype=args[0].dtype)
            return made.permute([order.index(d) for d in range(args[0].dim())])
        if function is torch.Tensor.new_empty:
            shape = args[1] if isinstance(args[1], (tuple, list, torch.Size)) else args[1:]
            return reserve(*shape, dtype=kwargs.get("dtype", args[0].dtype))
        return function(*args, **kwargs)


def tail(t: torch.Tensor) -> torch.Tensor:
    """The last positions of all channels of the last sample, (1, C, TAIL, 1)."""
    return t[-1:, :, -TAIL:]


def fill(t: torch.Tensor, seed: int) -> torch.Tensor:
    t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(seed)))
    return t


def close(what: str, got, truth, eps: float) -> None:
    got, truth = got.double(), truth.double()
    worst = (got - truth).abs().max().item()
    assert truth.abs().max() > 0, f"{what}: nothing to compare"
    assert worst <= eps * max(1.0, truth.abs().max().item()), f"{what}: off by {worst:.3g}"


# ---- The cases ----------------------------------------------------------------------------------


def norm(ops, n, c, s, groups, last=False, dy_last=None, whole=True, second=0) -> None:
    """whole: what runs holds the last group whole; else the group is longer than that, and zero but
    for the end of its last channel. second: channels of a second half of x, where that is."""
    group, dy_last = c // groups, last if dy_last is None else dy_last
    x, dy = image(n, c - second, s, last), image(n, c, s, dy_last)
    halves = (x, image(n, second, s, last) if second else None)
    x = halves[bool(second)]
    operands = [None, None, *(reserve(n, c) for _ in range(3))]  # add, scale, shift alone
    channels, positions = (group, s) if whole else (1, TAIL)
    ends = [t[-1:, -channels:, -positions:] for t in (x, dy)]
    ends += [t[-1, -channels:] for t in operands[2:]]
    for i, t in enumerate(ends):
        # Of dy the very end: a transposition of it that runs only there is a whole one.
        fill(t if i != 1 else t[:, :, -TAIL:], i)
    if not whole:
        operands[2].zero_()  # add: zeros stay zeros
    u, dv, add, scale, shift = (
        t.double() if t.dim() == 4 else t.double().view(1, -1, 1, 1) for t in ends
    )
    u = u + add

    def end(t: torch.Tensor) -> torch.Tensor:
        return t[-1:, -channels:, -TAIL:]

    y, mean, rstd = ops["fwd"](*halves, *operands, groups, 1e-5, True)
    if whole:
        close("mean", mean[-1, -1], u.mean(), 1e-4)
        close("rstd", rstd[-1, -1], (u.var(correction=0) + 1e-5).rsqrt(), 1e-4)
    v = (u - mean[-1, -1].double()) * rstd[-1, -1].double() * (1 + scale) + shift
    close("y", end(y), end(v * torch.sigmoid(v)), 4e-3)

    # The gradients of the last group, from statistics that are given.
    mean, rstd = reserve(n, groups, dtype=F32), reserve(n, groups, dtype=F32)
    mean[-1, -1] = u.mean() if whole else 0
    rstd[-1, -1] = r = (u.var(correction=0) + 1e-5).rsqrt() if whole else torch.tensor(1.0)
    x_hat = (u - mean[-1, -1].double()) * r
    gain, count = 1 + scale, group * s
    v = x_hat * gain + shift
    sigmoid = torch.sigmoid(v)
    dv = dv * sigmoid * (1 + v * (1 - sigmoid))
    A, B, X = (t.sum(2, keepdim=True) for t in (dv, dv * x_hat, x_hat))
    S1, S2 = (gain * A).sum(), (gain * B).sum()
    dx, dx2, *grads = ops["bwd"](dy, *halves, *operands, mean, rstd, groups, True)
    dx = dx2 if second else dx
    close("dx", end(dx), end(r * (gain * dv - (S1 + x_hat * S2) / count)), 4e-3)
    truths = (r * (gain * A - (s * S1 + X * S2) / count), B, A)
    for name, got, truth in zip(("dadd", "dscale", "dshift"), grads[2:], truths, strict=True):
        close(name, got[-1, -channels:], truth.view(-1), 1e-3)


def rms(ops, n, c, s, last=False, dy_last=None) -> None:
    """But for the end of the last sample, x and dy are zero."""
    x, dy = image(n, c, s, last), image(n, c, s, last if dy_last is None else dy_last)
    scale, shift = reserve(n, c), reserve(n, c)
    for i, t in enumerate((tail(x), tail(dy), scale[-1:], shift[-1:])):
        fill(t, i)
    leaves = [tail(x), *(t[-1:] for t in (scale, shift))]
    leaves = [t.double().requires_grad_() for t in leaves]
    truth = reference.rms_norm_silu(leaves[0], None, scale=leaves[1], shift=leaves[2])
    grads = torch.autograd.grad(truth, leaves, tail(dy).double())
    y, rstd = ops["rms_fwd"](x, None, scale, shift, 1e-12, True)
    close("y", tail(y), truth.detach(), 4e-3)
    norms = leaves[0].detach().norm(dim=1).flatten()
    close("rstd", rstd[-1, -TAIL:] * norms, torch.full_like(norms, c**0.5), 1e-5)
    dx, _, dscale, dshift = ops["rms_bwd"](dy, x, None, scale, shift, rstd, True)
    close("dx", tail(dx), grads[0], 4e-3)
    close("dscale", dscale[-1, -2:], grads[1][-1, -2:], 1e-3)
    close("dshift", dshift[-1, -2:], grads[2][-1, -2:], 1e-3)


def noise(ops) -> None:
    n, offset = 2**31 + 5, 2**34 + 3
    out = reserve(n)
    ops["noise"](out, torch.tensor([7]), torch.tensor([3]), 1, offset)
    truth = philox.normal_reference(7, 3, 1, TAIL, offset + n - TAIL)
    assert torch.equal(out[-TAIL:], truth.half())


def step(ops, n, c, s, last=False, drawn=True) -> None:
    x, out = image(n, c, s, last), image(n, c, s, False)
    z = None if drawn else image(n, c, s, False)
    for i, t in enumerate((x, out, z)):
        if t is not None:
            fill(tail(t), i)
    coeffs = torch.tensor([[0.0] * 5, [1.5, -0.7, 0.4, 0.6, 0.3]])
    at, seed = torch.tensor([1]), torch.tensor([9]) if drawn else None
    got = ops["step"](x, out, coeffs, at, seed, z, 1.0, 5)
    # Of the last plane: only it is sure to have run.
    first = n * c * s - TAIL
    used = (
        philox.normal_reference(9, 1, 0, TAIL, first + 5).view(1, 1, TAIL, 1)
        if drawn
        else tail(z)[:, -1:]
    )
    truth = reference.reverse_step(
        tail(x)[:, -1:].double(), tail(out)[:, -1:].double(), coeffs.double(), 1, used.double()
    )
    close("x_next", tail(got)[:, -1:], truth, 2e-3)


def attend(ops, n, heads, s, d, tokens: bool) -> None:
    """tokens: memory (S, N, heads, D), whose rows lie far apart."""

    def make(seed):
        t = reserve(s, n, heads, d).permute(1, 2, 0, 3) if tokens else reserve(n, heads, s, d)
        fill(t[-1, -1], seed)
        return t

    q, k, v, dout = (make(i) for i in range(4))
    out, lse = ops["attention"](q, k, v, d**-0.5)
    leaves = [t[-1, -1].double().requires_grad_() for t in (q, k, v)]
    truth = reference.attention(*(t[None, None] for t in leaves))
    grads = torch.autograd.grad(truth, leaves, dout[-1, -1].double()[None, None])
    close("out", out[-1, -1, -16:], truth[0, 0, -16:].detach(), 4e-3)
    lse[-1, -1] = torch.logsumexp(leaves[0] @ leaves[1].T * d**-0.5, -1)  # all rows, not the last
    out[-1, -1] = truth[0, 0].detach()
    got = ops["attention_bwd"](dout, q, k, v, out, lse, d**-0.5)
    for name, a, b in zip(("dq", "dk", "dv"), got, grads, strict=True):
        close(name, a[-1, -1, -16:], b[-16:], 8e-3)


# name: blocks or programs that run at each end of a grid, the call. N·C·S passes 2³¹: many
# samples, or one that passes it alone.
BATCH = {"n": 1025, "c": 4096, "s": 512, "groups": 2048}
PAIRS = {"n": 2050, "c": 4096, "s": 512, "groups": 2048, "second": 2048}
LONG = {"n": 1, "c": 8, "s": 2**28 + 8}
WIDE = {"n": 1, "c": 2**22 + 2**14, "s": 512, "groups": 2**21 + 2**13}
CASES = {
    "batch": (2, partial(norm, **BATCH)),
    "batch, channels_last": (2, partial(norm, **BATCH, last=True)),
    "batch, channels_last dy": (2, partial(norm, **BATCH, dy_last=True)),
    "batch, contiguous dy": (2, partial(norm, **BATCH, last=True, dy_last=False)),
    "batch of pairs": (2, partial(norm, **PAIRS)),
    "batch of pairs, channels_last": (2, partial(norm, **PAIRS, last=True, dy_last=False)),
    "batch of large groups": (8, partial(norm, n=257, c=2**14, s=512, groups=256)),
    "one sample": (2, partial(norm, n=1, c=2048, s=2**20 + 8, groups=2048, whole=False)),
    "long sample": (2, partial(norm, **LONG, groups=4, last=True, whole=False)),
    # The channels of one tile lie more than 2³¹ apart.
    "long rows": (2, partial(norm, n=1, c=4, s=2**29 + 2**28, groups=1, whole=False)),
    # The positions of one tile do.
    "wide sample": (2, partial(norm, **WIDE, last=True)),
    "wide sample, channels_last dy": (2, partial(norm, **WIDE, dy_last=True)),
    # N·C > 2³⁰ sums: the third plane of them begins past 2³¹.
    "planes of sums": (2, partial(norm, n=32, c=2**25 + 64, s=1, groups=2**24 + 32)),
    "RMS norm": (2, partial(rms, n=2**16 + 1, c=64, s=512)),
    "RMS norm, channels_last": (2, partial(rms, n=2**16 + 1, c=64, s=512, last=True)),
    "RMS norm, channels_last dy": (2, partial(rms, n=2**16 + 1, c=64, s=512, dy_last=True)),
    "RMS norm, walk": (1, partial(rms, n=2**15 + 1, c=2**13 + 8, s=8)),
    "noise": (2, partial(noise)),
    "step": (2, partial(step, n=65537, c=8, s=4096)),
    "step, mixed layouts": (2, partial(step, n=65537, c=8, s=4096, last=True, drawn=False)),
    "step, long sample": (2, partial(step, **LONG, last=True)),
    "attention": (2, partial(attend, n=32769, heads=8, s=128, d=64, tokens=False)),
    "attention, far rows": (2, partial(attend, n=2**20 + 1, heads=8, s=2, d=256, tokens=True)),
}
# Left out: a block or an item that goes through a whole plane of 2²⁹ positions, workspaces that the
# CPU clears, and statistics that a program in the middle of Triton's grid saves.
LEFT_OUT = {
    "native": (
        "RMS norm, walk",
        "batch of pairs",
        "batch of pairs, channels_last",
        "long rows",
        "long sample",
        "wide sample",
        "wide sample, channels_last dy",
        "planes of sums",
    ),
    "triton": ("one sample",),
    "cuda-emulated": ("long rows",),
}


def run(backend: str, library: str | None, names: list[str]) -> None:
    made = {"triton": triton_ends, "cuda-emulated": cuda_ends, "native": native_ends}[backend]
    ops = made(*([library] if library else []))
    torch.set_num_threads(1)
    for name in names:
        (ends, case), report, start = CASES[name], {"case": name}, time.perf_counter()
        missing = {attend: "attention", rms: "rms_fwd"}.get(case.func, "fwd") not in ops
        if name in LEFT_OUT[backend] or missing:
            continue
        ops["ends"](ends)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            with Reserved():
                case(ops)
        except (MemoryError, OSError) as error:
            report["skip"] = f"no address space for it: {error}"
        except Exception as error:
            report["wrong"] = f"{type(error).__name__}: {error}"
        report["seconds"] = round(time.perf_counter() - start, 2)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        report["megabytes"] = grown // 1024
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2] or None, sys.argv[3:] or list(CASES))

"""Attention on a GPU, forward and backward, against every back end of PyTorch's SDPA.

`attention` reads q, k, v as (N, heads, S, D), contiguous. `attention_qkv` reads what a U-Net's
projection writes, (N, S, 3·heads·D), and writes (N, S, heads·D); the baselines take views of the
same memory and merge the heads, layout copies included. Useful bytes: q, k, v and out once;
backward twice that. Flop: 4·N·heads·S·Sk·D, backward 2.5 times.
"""

from functools import partial

import torch
import torch.nn.functional as F
from engine.kernels import reference
from gpu_measure import Case, NotThere
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine import ops

SHAPES = {  # name: (N, heads, S, Sk, D)
    "ADM64-16": (64, 9, 256, 256, 64),
    "ADM64-32": (64, 6, 1024, 1024, 64),
    "CIFAR": (128, 1, 256, 256, 256),
    "SD-32": (2, 8, 1024, 1024, 80),
    "SD-64": (2, 8, 4096, 4096, 40),
    "ADM64-8": (64, 12, 64, 64, 64),
    "ref128": (4, 16, 4096, 4096, 128),
    "ref64": (4, 16, 4096, 4096, 64),
    "ADM256-32": (8, 8, 1024, 1024, 64),
    "SD-cross": (2, 8, 4096, 77, 40),
    "LSUN256": (8, 1, 256, 256, 512),
    "SD-16": (2, 8, 256, 256, 160),
    "ADM256-16": (8, 16, 256, 256, 64),
    "VAE-mid": (1, 1, 4096, 4096, 512),
}
TINY = {"tiny": (2, 2, 16, 16, 8), "tiny-cross": (1, 2, 8, 5, 8)}
HEADLINE = {
    ("attention", "ADM64-32", "fwd"),
    ("attention", "ADM64-16", "fwd"),
    ("attention", "ADM64-16", "bwd"),
    ("attention_qkv", "ADM64-16", "fwd"),
    ("attention_qkv", "tiny", "fwd"),
}
BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
MATH_BYTES = 2e9  # scores beyond this: nobody would take the math back end


def sdpa(backend, q, k, v):
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def split(qkv, heads):
    """(N, S, 3·heads·D) → three views (N, heads, S, D)."""
    return qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def packed(attention, heads, qkv):
    return attention(*split(qkv, heads)).transpose(1, 2).flatten(2)


def ours(impl, q, k, v):
    return ops.attention(q, k, v, impl=impl)


def ours_packed(impl, heads, qkv):
    if not hasattr(ops, "attention_qkv"):
        raise NotThere("ops.attention_qkv does not exist in this version")
    return ops.attention_qkv(qkv, heads, order="3hd", impl=impl)


def inputs(device, op, shape, grad, seed):
    n, heads, s, sk, d = shape
    g = torch.Generator(device.device).manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=g, device=device.device).bfloat16()

    if op == "attention_qkv":
        operands, dout = [normal(n, s, 3 * heads * d)], (n, s, heads * d)
    else:
        operands = [normal(n, heads, length, d) for length in (s, sk, sk)]
        dout = (n, heads, s, d)
    for t in operands:
        t.requires_grad_(grad)
    return operands, normal(*dout) if grad else None


def forward(function, one):
    operands, _ = one
    return lambda: function(*operands)


def backward(function, one):
    operands, dout = one
    out = function(*operands)
    return lambda: torch.autograd.grad(out, operands, dout, retain_graph=True)


def truth(function, direction, one):
    """In float64, one sample after the other: S² scores of all samples would not fit."""
    operands, dout = one
    results = []
    for i in range(operands[0].shape[0]):
        part = [t[i : i + 1].detach().double().requires_grad_(direction == "bwd") for t in operands]
        out = function(*part)
        if direction == "bwd":
            results.append(torch.autograd.grad(out, part, dout[i : i + 1].double()))
        else:
            results.append((out,))
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def case(device, op, name, shape, direction) -> Case:
    n, heads, s, sk, d = shape
    grad, prepare = direction == "bwd", {"fwd": forward, "bwd": backward}[direction]
    size = 2 * n * heads * d * (2 * s + 2 * sk)
    functions = {impl: partial(ours, impl) for impl in ("triton", "native")}
    functions["sdpa"] = partial(sdpa, None)
    functions |= {
        backend: partial(sdpa, value)
        for backend, value in BACKENDS.items()
        if backend != "sdpa-math" or n * heads * s * sk * 2 <= MATH_BYTES
    }
    exact = reference.attention
    if op == "attention_qkv":
        functions = {
            key: partial(packed, function, heads)
            if key.startswith("sdpa")
            else partial(ours_packed, key, heads)
            for key, function in functions.items()
        }
        exact = partial(packed, exact, heads)

    def remarks(one):
        qkv = split(*one[0], heads) if op == "attention_qkv" else one[0]
        return {"sdpa_default": device.sdpa_default(*qkv)}

    return Case(
        f"{op}-{direction} {name}",
        f"{op} {direction}",
        {
            "op": op,
            "direction": direction,
            "shape": list(shape),
            "layout": "packed 3hd" if op == "attention_qkv" else "contiguous",
            "dtype": "bf16",
        },
        size * (2 if grad else 1),
        size * (2 if grad else 1),
        partial(inputs, device, op, shape, grad),
        {key: partial(prepare, function) for key, function in functions.items()},
        partial(prepare, functions["sdpa"]),
        partial(truth, exact, direction),
        grad=grad,
        flop=int(4 * n * heads * s * sk * d * (2.5 if grad else 1)),
        headline=(op, name, direction) in HEADLINE,
        remarks=remarks,
    )


def cases(device, mode: str = "default") -> list[Case]:
    shapes = TINY if device.stand_in else SHAPES
    return [
        case(device, op, name, shape, direction)
        for direction in ("fwd", "bwd")
        for name, shape in shapes.items()
        for op in ("attention", "attention_qkv")
        if op == "attention" or shape[2] == shape[3]
    ]

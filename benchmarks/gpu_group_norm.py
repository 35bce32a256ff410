"""GN+SiLU on a GPU, forward and backward: the shapes of the U-Nets that people train and sample.

Bytes that must move: forward 2 (x, y) per element, backward 3 (x, dy, dx), times the element size.
Baselines run on x in its own layout: eager and torch.compile.
"""

from functools import partial

import torch
import torch.nn.functional as F
from engine.kernels import reference
from gpu_measure import Case, NotThere

from engine import dispatch, ops

GROUPS = 32

# name: (N, C, H, W), and what the network also does here: "scale shift", or two parts that it joins
SHAPES = {
    "CIFAR-a": ((128, 128, 32, 32), None),
    "ADM64-a": ((64, 192, 64, 64), "scale shift"),
    "ADM256-a": ((8, 256, 256, 256), "scale shift"),
    "SD16-a": ((16, 320, 64, 64), None),
    "CIFAR-d": ((128, 256, 8, 8), None),
    "CIFAR-b": ((128, 256, 16, 16), None),
    "SD-a": ((2, 320, 64, 64), None),
    "ADM256-c": ((8, 512, 64, 64), "scale shift"),
    "LSUN-a": ((8, 128, 256, 256), None),
    "ADM64-b": ((64, 384, 32, 32), "scale shift"),
    "VAE-a": ((1, 128, 512, 512), None),
    "CIFAR-e": ((128, 512, 4, 4), None),
    "SD16-c": ((16, 640, 32, 32), None),
    "ADM64-d": ((64, 768, 8, 8), "scale shift"),
    "CIFAR-c": ((128, 384, 32, 32), (256, 128)),
    "ADM256-d": ((8, 1024, 16, 16), "scale shift"),
    "SD-c": ((2, 640, 32, 32), None),
    "SD16-d": ((16, 1280, 16, 16), None),
    "ADM64-c": ((64, 576, 64, 64), (384, 192)),
    "SD-d": ((2, 1280, 16, 16), None),
    "SD-b": ((2, 960, 64, 64), (640, 320)),
    "SD16-b": ((16, 960, 64, 64), (640, 320)),
    "ADM256-b": ((8, 512, 256, 256), (256, 256)),
    "SD-e": ((2, 2560, 8, 8), None),
}
TINY = {"tiny": ((2, 64, 4, 4), "scale shift"), "tiny-cat": ((2, 64, 3, 3), (32, 32))}
HEADLINE = {  # (shape, layout, direction)
    ("CIFAR-a", "nhwc", "fwd"),
    ("CIFAR-a", "nchw", "fwd"),
    ("CIFAR-a", "nhwc", "bwd"),
    ("ADM64-a", "nhwc", "fwd"),
    ("ADM256-a", "nhwc", "fwd"),
    ("tiny", "nhwc", "fwd"),
}
BLOCKED = ("LSUN-a", "ADM256-a", "ADM256-b", "VAE-a")  # where the cooperative kernel may gain
AUTOTUNE = "max-autotune-no-cudagraphs"
LAYOUTS = {"nhwc": torch.channels_last, "nchw": torch.contiguous_format}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def eager(x, weight, bias, scale=None, shift=None):
    if isinstance(x, tuple):
        x = torch.cat(x, dim=1)
    h = F.group_norm(x, GROUPS, weight, bias)
    if scale is not None:
        h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return F.silu(h)


def exact(x, weight, bias, scale=None, shift=None):
    if isinstance(x, tuple):
        x = torch.cat(x, dim=1)
    return reference.group_norm_silu(x, weight, bias, GROUPS, scale=scale, shift=shift)


def ours(impl, x, weight, bias, scale=None, shift=None):
    return ops.group_norm_silu(x, weight, bias, GROUPS, scale=scale, shift=shift, impl=impl)


def blocked(op, *args):
    """The cooperative kernels, csrc/cuda/group_norm_silu_*blocked.cu: `auto` does not take them."""
    if not dispatch.module("group_norm_silu", "native").has_cuda():
        raise NotThere("the extension was built without CUDA")
    try:
        return getattr(torch.ops.engine, f"group_norm_silu_{op}_blocked").default(*args, True)
    except RuntimeError as error:
        if "a cooperative grid serves" in str(error):
            raise dispatch.BackendError("groups of this layout do not fit into the L2") from None
        raise


def blocked_operands(x, weight, bias, scale=None, shift=None):
    pair = x if isinstance(x, tuple) else (x, None)
    return *pair, weight, bias, None, scale, shift


def blocked_fwd(one):
    operands = blocked_operands(*one[0])
    return lambda: blocked("fwd", *operands, GROUPS, 1e-5, True)[0]


def blocked_bwd(one):
    """As `backward`: → the gradients of x (or its halves), weight, bias[, scale, shift]."""
    operands = [t if t is None else t.detach() for t in blocked_operands(*one[0])]
    stats = blocked("fwd", *operands, GROUPS, 1e-5, True)[1:]

    def call():
        dx, dx2, dweight, dbias, _, *rest = blocked("bwd", one[1], *operands, *stats, GROUPS, True)
        absent = operands[1] is None, False, False, operands[5] is None, operands[6] is None
        more = zip((dx2, dweight, dbias, *rest), absent, strict=True)
        return [dx, *(t for t, skip in more if not skip)]

    return call


def inputs(device, shape, also, dtype, layout, grad, seed):
    """→ (x or a pair, weight, bias[, scale, shift]), dy. Fresh random values, γ ≠ 1, β ≠ 0."""
    g = torch.Generator(device.device).manual_seed(seed)

    def normal(*size, at=0.0, by=1.0):
        return (torch.randn(size, generator=g, device=device.device) * by + at).to(dtype)

    def image(channels):
        t = normal(shape[0], channels, *shape[2:], at=0.5, by=2.0)
        return t.contiguous(memory_format=LAYOUTS[layout])

    n, c = shape[:2]
    x = tuple(image(part) for part in also) if isinstance(also, tuple) else image(c)
    operands = [x, normal(c, at=1.0, by=0.5), normal(c, by=0.7)]
    if also == "scale shift":
        operands += [normal(n, c, by=0.6), normal(n, c, by=0.6)]
    dy = image(c) if grad else None
    if grad:
        for t in leaves(operands):
            t.requires_grad_()
    return operands, dy


def leaves(operands) -> list:
    x, *rest = operands
    return [*(x if isinstance(x, tuple) else (x,)), *rest]


def forward(function, one):
    operands, _ = one
    return lambda: function(*operands)


def backward(function, one):
    """The forward runs here, once; the call is the backward alone, which keeps what was saved."""
    operands, dy = one
    y, wanted = function(*operands), leaves(operands)
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def both(function, one):
    operands, dy = one
    wanted = leaves(operands)
    return lambda: torch.autograd.grad(function(*operands), wanted, dy)


PREPARE = {"fwd": forward, "bwd": backward, "fwdbwd": both}


def truth(exact, direction, one):
    operands, dy = one

    def double(t):
        if isinstance(t, tuple):
            return tuple(map(double, t))
        return t.detach().double().requires_grad_(direction != "fwd")

    operands = [double(t) for t in operands]
    y = exact(*operands)
    return y if direction == "fwd" else torch.autograd.grad(y, leaves(operands), dy.double())


def compiled(device, mode, prepare, function, one):
    return prepare(device.compile(function, mode), one)


def case(device, name, shape, also, variant, layout, dtype, direction, mode) -> Case:
    also = also if variant else None
    grad, prepare = direction != "fwd", PREPARE[direction]
    headline = (name, layout, direction) in HEADLINE and not variant and dtype == "bf16"
    contenders = {impl: partial(prepare, partial(ours, impl)) for impl in ("triton", "native")}
    contenders["eager"] = partial(prepare, eager)
    contenders["compile"] = partial(compiled, device, None, prepare, eager)
    if mode == "full":
        contenders["compile-max"] = partial(compiled, device, AUTOTUNE, prepare, eager)
    if name in BLOCKED and direction != "fwdbwd":  # last: should it hang, the rest is known
        contenders["blocked"] = blocked_fwd if direction == "fwd" else blocked_bwd
    n, c, h, w = shape
    size = n * c * h * w * DTYPES[dtype].itemsize
    label = "-".join(filter(None, (name, variant, layout, dtype)))
    return Case(
        f"group_norm_silu-{direction} {label}",
        f"group_norm_silu {direction}",
        {
            "op": "group_norm_silu",
            "direction": direction,
            "variant": variant or "plain",
            "shape": list(shape),
            "groups": GROUPS,
            "layout": layout,
            "dtype": dtype,
        },
        {"fwd": 2, "bwd": 3, "fwdbwd": 5}[direction] * size,
        {"fwd": 2, "bwd": 3, "fwdbwd": 4}[direction] * size,
        partial(inputs, device, shape, also, DTYPES[dtype], layout, grad),
        contenders,
        partial(prepare, eager),
        partial(truth, exact, direction),
        grad=grad,
        headline=headline,
    )


def cases(device, mode: str = "default") -> list[Case]:
    """In the order of importance: plain forward, plain backward, then variants and float32."""
    shapes = TINY if device.stand_in else SHAPES

    def run(names, variants, dtype, directions):
        return [
            case(device, name, *shapes[name], variant(name), layout, dtype, direction, mode)
            for direction in directions
            for name in names
            for variant in variants
            for layout in LAYOUTS
        ]

    def also(name):
        return {str: "scale-shift", tuple: "pair"}[type(shapes[name][1])]

    special = [name for name in shapes if shapes[name][1]]
    first = list(shapes)[:2]
    return [
        *run(shapes, [lambda name: None], "bf16", ["fwd", "bwd"]),
        *run(special, [also], "bf16", ["fwd", "bwd"]),
        *run(first, [lambda name: None], "bf16", ["fwdbwd"]),
        *run(first, [lambda name: None], "fp32", ["fwd", "bwd"]),
    ]

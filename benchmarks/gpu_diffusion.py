"""The reverse step, the forward process with its loss, and the noise alone, on a GPU.

Bytes that must move, per element: reverse step x and model_out read, x_next written (12 in float32,
10 with a bfloat16 network); x_t 1 + 2 (uint8 → bfloat16); the loss with its gradient 1 + 2·2 (x0,
model_out, gradient); noise 4. The noise itself costs none: it is drawn inside. The baselines are
what a user writes, with torch.randn; their results are other draws, so only ours are compared.
"""

from functools import partial

import torch
import torch.nn.functional as F
from gpu_measure import Case

import engine
from engine import ops, samplers, schedules

PICTURES = {"CIFAR": (128, 3, 32, 32), "256²": (128, 3, 256, 256), "64²": (64, 3, 64, 64)}
TINY = {"tiny": (2, 3, 4, 4)}
KEY, STEP = 7, 500
NUMBERS = {"16M": 2**24, "1M": 2**20}
IMPLS = ("triton", "native")


def process():
    return engine.Diffusion(
        schedules.betas("linear", 1000), prediction="eps", variance="small", loss="l2"
    )


def generator(device, seed):
    return torch.Generator(device.device).manual_seed(seed)


def scalars(device, *values):
    return [torch.tensor(v, device=device.device) for v in values]


# --- reverse step


def reverse_inputs(device, shape, dtype, seed):
    g = generator(device, seed)
    x, out = (torch.randn(shape, generator=g, device=device.device) for _ in range(2))
    rows = samplers.coefficients(process())[1].float().to(device.device)
    return x, out.to(dtype), rows, *scalars(device, STEP, KEY)


def reverse_eager(x, out, rows, step, key):
    """A sampler's step as it is usually written, its coefficients already on the device."""
    a, b, c, d, s = rows.index_select(0, step.reshape(1))[0, :5].unbind()
    x0 = (a * x + b * out.float()).clamp(-1, 1)
    return c * x0 + d * x + s * torch.randn_like(x)


def reverse_ours(impl, x, out, rows, step, key):
    return ops.reverse_step(x, out, rows, step, key=key, impl=impl)


def reverse_truth(one):
    x, out, rows, step, key = one
    a, b, c, d, s = rows[STEP, :5].double().unbind()
    z = ops.noise(KEY, STEP, ops.STEP_NOISE, x.shape, device=x.device, impl="eager").double()
    return c * (a * x.double() + b * out.double()).clamp(-1, 1) + d * x.double() + s * z


# --- forward process


def forward_inputs(device, shape, seed):
    g = generator(device, seed)
    x0 = torch.randint(256, shape, generator=g, device=device.device, dtype=torch.uint8)
    out = torch.randn(shape, generator=g, device=device.device).bfloat16()
    t = torch.randint(1000, shape[:1], generator=g, device=device.device)
    rows = process().forward_rows().float().to(device.device)
    noise = torch.randn(shape, generator=g, device=device.device)  # kept: eager's loss reads it
    dloss = torch.rand(shape[0], generator=g, device=device.device) + 0.5
    return x0, out, rows, t, *scalars(device, KEY, STEP), noise, dloss


def noised_eager(x0, out, rows, t, key, step, noise, dloss):
    a, b = (rows[:, k].index_select(0, t).reshape(-1, 1, 1, 1) for k in (0, 1))
    x0 = x0.float() / 127.5 - 1
    return (a * x0 + b * torch.randn_like(x0)).bfloat16()


def noised_ours(impl, x0, out, rows, t, key, step, noise, dloss):
    return ops.forward_noise(x0, rows, t, key=key, step=step, dtype=torch.bfloat16, impl=impl)


def training_noise(x0):
    z = ops.noise(KEY, STEP, ops.TRAINING_NOISE, x0.shape, device=x0.device, impl="eager")
    return z.double()


def noised_truth(one):
    x0, _, rows, t, *_ = one
    a, b = (rows[t, k].double().reshape(-1, 1, 1, 1) for k in (0, 1))
    return a * (x0.double() / 127.5 - 1) + b * training_noise(x0)


def loss_eager(x0, out, rows, t, key, step, noise, dloss):
    """The loss against the noise that was kept when x_t was made: four bytes more to read."""
    return F.mse_loss(out.float(), noise, reduction="none").flatten(1).mean(1)


def loss_ours(impl, x0, out, rows, t, key, step, noise, dloss):
    return ops.forward_noise_loss(out, x0, rows, t, key=key, step=step, impl=impl)


def with_gradient(function, one):
    x0, out, *rest, dloss = one
    leaf = out.detach().requires_grad_()

    def call():
        losses = function(x0, leaf, *rest, dloss)
        return losses, *torch.autograd.grad(losses, leaf, dloss)

    return call


def loss_truth(one):
    x0, out, *_, dloss = one
    leaf = out.detach().double().requires_grad_()
    losses = ((leaf - training_noise(x0)) ** 2).flatten(1).mean(1)
    return losses, *torch.autograd.grad(losses, leaf, dloss.double())


# --- noise


def noise_ours(impl, like, key, step):
    return ops.noise(key, step, 0, tuple(like.shape), device=like.device, impl=impl)


def plainly(function, one):
    return lambda: function(*one)


def contenders(device, ours, eager, prepare, every: bool) -> dict:
    found = {impl: partial(prepare, partial(ours, impl)) for impl in IMPLS}
    found["eager"] = partial(prepare, eager)
    modes = {"compile": None, "compile-max": "max-autotune-no-cudagraphs"}
    for name, mode in modes.items():
        if every or name == "compile":
            found[name] = lambda one, mode=mode: prepare(device.compile(eager, mode), one)
    return found


def cases(device, mode: str = "default") -> list[Case]:
    every = mode == "full"
    shapes = TINY if device.stand_in else PICTURES
    random = ("eager", "compile", "compile-max")
    found = []
    for name, shape in shapes.items():
        n = shape[0] * shape[1] * shape[2] * shape[3]
        for label, dtype in {"fp32": torch.float32, "fp32 of bf16": torch.bfloat16}.items():
            headline = name in ("CIFAR", "256²", "tiny") and label == "fp32"
            found.append(
                Case(
                    f"reverse_step {name} {label}",
                    "reverse_step",
                    facts("reverse_step", "fwd", shape, label),
                    n * (8 + dtype.itemsize),
                    n * (8 + dtype.itemsize),
                    partial(reverse_inputs, device, shape, dtype),
                    contenders(device, reverse_ours, reverse_eager, plainly, every),
                    partial(plainly, partial(reverse_ours, "eager")),
                    reverse_truth,
                    random=random,
                    headline=headline,
                )
            )
        found += [
            Case(
                f"forward_noise {name} uint8→bf16",
                "forward_noise",
                facts("forward_noise", "fwd", shape, "uint8→bf16"),
                n * 3,
                n * 3,
                partial(forward_inputs, device, shape),
                contenders(device, noised_ours, noised_eager, plainly, every),
                partial(plainly, partial(noised_ours, "eager")),
                noised_truth,
                random=random,
                headline=name == "256²",
            ),
            Case(
                f"forward_noise_loss {name} bf16",
                "forward_noise_loss",
                facts("forward_noise_loss", "fwdbwd", shape, "bf16"),
                n * 5,
                n * 5,
                partial(forward_inputs, device, shape),
                contenders(device, loss_ours, loss_eager, with_gradient, every),
                partial(with_gradient, partial(loss_ours, "eager")),
                loss_truth,
                grad=True,
                random=random,
                headline=name == "256²",
            ),
        ]
    numbers = {"1K": 1024} if device.stand_in else NUMBERS
    for name, count in numbers.items():
        found.append(
            Case(
                f"noise {name}",
                "noise",
                facts("noise", "fwd", (count,), "fp32"),
                4 * count,
                4 * count,
                lambda seed, n=count: (
                    torch.empty(n, device=device.device),
                    *scalars(device, KEY, STEP),
                ),
                {
                    **{i: partial(plainly, partial(noise_ours, i)) for i in IMPLS},
                    "eager": partial(plainly, lambda like, key, step: torch.randn_like(like)),
                },
                partial(plainly, partial(noise_ours, "eager")),
                lambda one: noise_ours("eager", *one).double(),
                random=("eager",),
            )
        )
    return found


def facts(op, direction, shape, dtype) -> dict:
    return {"op": op, "direction": direction, "shape": list(shape), "dtype": dtype}

"""engine.accelerate on diffusers' UNet2DModel on the CPU: a forward pass and a training step.

6.8 million parameters, 64/128/128 channels, attention at two levels, batch 32 of 1×32×32, bfloat16
weights, or float32 weights under autocast. Against the untouched model; with inner="inductor"
against torch.compile's own, of which each compiles for more than a minute. Random weights, none at
zero; parity is asserted before anything is timed.
"""

import copy
import statistics
import time

import pytest
import torch

import engine

diffusers = pytest.importorskip("diffusers")

BATCH, ROUNDS = 32, 7
HEAD_DIMS = [64, 8]  # 8 is diffusers' default
GOALS = {"forward": 1.8, "training": 1.3, "inductor": 1.25}


def unet(head_dim: int) -> torch.nn.Module:
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(64, 128, 128),
        layers_per_block=2,
        attention_head_dim=head_dim,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    return model


def close(a, b) -> bool:
    """Two results of a bfloat16 network: the same but for its rounding."""
    difference = (a.float() - b.float()).norm()
    return (difference <= 0.03 * b.float().norm()).item()


class Contender:
    def __init__(self, model, autocast: bool, training: bool):
        self.model, self.autocast, self.training = model.train(training), autocast, training
        g = torch.Generator().manual_seed(1)
        dtype = next(model.parameters()).dtype
        self.x = torch.randn(BATCH, 1, 32, 32, generator=g).to(dtype)
        self.target = torch.randn(BATCH, 1, 32, 32, generator=g).to(dtype)
        self.t = torch.randint(0, 1000, (BATCH,), generator=g)

    def __call__(self) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            if not self.training:
                with torch.inference_mode():
                    return self.model(self.x, self.t).sample
            self.model.zero_grad()
            loss = (self.model(self.x, self.t).sample - self.target).square().mean()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in self.model.parameters()])


def in_turns(ours, other) -> tuple[list[float], list[float]]:
    """Seconds of each, taken A B A B; the first call of each compiled it, and is not among them."""
    times = [], []
    for _ in range(ROUNDS):
        for taken, contender in zip(times, (ours, other), strict=True):
            start = time.perf_counter()
            contender()
            taken.append(time.perf_counter() - start)
    return times


def compare(
    benchmark, ours, other, baseline: str, goal: float, autocast: bool, training: bool
) -> None:
    """Times two models in turns; what was found goes into the JSON."""
    mine, theirs = (Contender(m, autocast, training) for m in (ours, other))
    start = time.perf_counter()
    result = mine()
    compile_s = time.perf_counter() - start
    assert close(result, theirs())
    a, b = in_turns(mine, theirs)
    median = {"ours": statistics.median(a), baseline: statistics.median(b)}
    benchmark.extra_info.update(
        seconds={
            name: [round(q, 4) for q in (min(taken), statistics.median(taken), max(taken))]
            for name, taken in (("ours", a), (baseline, b))
        },
        median_us={name: round(seconds * 1e6) for name, seconds in median.items()},
        speedup={baseline: round(median[baseline] / median["ours"], 3)},
        goal=goal,
        first_call_s=round(compile_s, 2),
        batch=BATCH,
    )
    benchmark.pedantic(mine, rounds=1)


def pair(head_dim: int, autocast: bool):
    model = unet(head_dim)
    model = model if autocast else model.bfloat16()
    torch.compiler.reset()
    return model, copy.deepcopy(model)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def bench_unet_forward(benchmark, autocast, head_dim):
    model, untouched = pair(head_dim, autocast)
    handle = engine.accelerate(model)
    compare(benchmark, model, untouched, "eager", GOALS["forward"], autocast, training=False)
    benchmark.extra_info["replaced"] = handle.report.counts()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def bench_unet_training(benchmark, autocast, head_dim):
    model, untouched = pair(head_dim, autocast)
    engine.accelerate(model)
    compare(benchmark, model, untouched, "eager", GOALS["training"], autocast, training=True)


@pytest.mark.parametrize("head_dim", HEAD_DIMS[:1])
def bench_unet_inductor(benchmark, head_dim):
    model, untouched = pair(head_dim, False)
    engine.accelerate(model, inner="inductor")
    untouched.compile()
    compare(benchmark, model, untouched, "compile", GOALS["inductor"], False, training=False)

"""engine.accelerate on other people's models on the CPU: a forward pass and a training step.

diffusers' UNet2DModel: 6.8 million parameters, 64/128/128 channels, attention at two levels, batch
32 of 1×32×32, bfloat16 weights, or float32 weights under autocast; with inner="inductor" against
torch.compile's own, of which each compiles for more than a minute. A model in guided-diffusion's
idiom (tests/foreign_models.py): 128/256 channels, batch 16 of 2×32×32, bfloat16 weights, norms in
float32. denoising-diffusion-pytorch's class-conditional Unet, the one of its U-Nets that needs no
torchvision: 64 channels × (1, 2, 2), batch 16 of 3×32×32, float32 weights under autocast, as its
time embedding is float32. Against the untouched model. Random weights, none at zero; parity is
asserted before anything is timed.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import engine

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import denoising_library
import foreign_models

ROUNDS = 7
SHORT = 5  # of longer steps
HEAD_DIMS = [64, 8]  # 8 is diffusers' default
GOALS = {"forward": 1.8, "training": 1.3, "inductor": 1.25}


@dataclass
class Family:
    make: Callable[..., nn.Module]
    shape: tuple  # of the pictures
    classes: int = 0  # of a class-conditional model


def unet(head_dim: int = 64) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(64, 128, 128),
        layers_per_block=2,
        attention_head_dim=head_dim,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


def guided() -> nn.Module:
    return foreign_models.GuidedDiffusion(adaptive=True, c=128, groups=32)


def denoising() -> nn.Module:
    library = denoising_library.from_file("classifier_free_guidance")
    return library.Unet(64, num_classes=10, dim_mults=(1, 2, 2), cond_drop_prob=0.0)


DIFFUSERS = Family(unet, (32, 1, 32, 32))
OTHERS = {
    "guided-bf16": Family(guided, (16, 2, 32, 32)),
    "denoising-autocast": Family(denoising, (16, 3, 32, 32), classes=10),
}


def close(a, b) -> bool:
    """Two results of a bfloat16 network: the same but for its rounding."""
    difference = (a.float() - b.float()).norm()
    return (difference <= 0.03 * b.float().norm()).item()


class Contender:
    def __init__(self, family: Family, model, autocast: bool, training: bool):
        self.model, self.autocast, self.training = model.train(training), autocast, training
        g = torch.Generator().manual_seed(1)
        dtype = torch.float32 if autocast else torch.bfloat16
        x = torch.randn(family.shape, generator=g).to(dtype)
        self.target = torch.randn(family.shape, generator=g).to(dtype)
        self.inputs = [x, torch.randint(0, 1000, family.shape[:1], generator=g)]
        if family.classes:
            self.inputs.append(torch.arange(family.shape[0]) % family.classes)

    def output(self) -> torch.Tensor:
        found = self.model(*self.inputs)
        return getattr(found, "sample", found)

    def __call__(self) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            if not self.training:
                with torch.inference_mode():
                    return self.output()
            self.model.zero_grad()
            loss = (self.output() - self.target).square().mean()
        loss.backward()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.cat([grad.flatten() for grad in grads])


def in_turns(ours, other, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each, taken A B A B; the first call of each compiled it, and is not among them."""
    times = [], []
    for _ in range(rounds):
        for taken, contender in zip(times, (ours, other), strict=True):
            start = time.perf_counter()
            contender()
            taken.append(time.perf_counter() - start)
    return times


def compare(benchmark, mine: Contender, theirs: Contender, baseline: str, rounds=ROUNDS, **info):
    """Times two in turns; what was found goes into the JSON."""
    start = time.perf_counter()
    result = mine()
    compile_s = time.perf_counter() - start
    assert close(result, theirs())
    a, b = in_turns(mine, theirs, rounds)
    median = {"ours": statistics.median(a), baseline: statistics.median(b)}
    benchmark.extra_info.update(
        seconds={
            name: [round(q, 4) for q in (min(taken), statistics.median(taken), max(taken))]
            for name, taken in (("ours", a), (baseline, b))
        },
        median_us={name: round(seconds * 1e6) for name, seconds in median.items()},
        speedup={baseline: round(median[baseline] / median["ours"], 3)},
        first_call_s=round(compile_s, 2),
        batch=len(mine.target),
        **info,
    )
    benchmark.pedantic(mine, rounds=1)


def pair(family: Family, autocast: bool, training: bool, **options) -> tuple[Contender, Contender]:
    torch.manual_seed(0)
    model = family.make(**options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    if not autocast:
        foreign_models.cast(model, torch.bfloat16)
    torch.compiler.reset()
    return tuple(Contender(family, m, autocast, training) for m in (model, copy.deepcopy(model)))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def bench_unet_forward(benchmark, autocast, head_dim):
    mine, theirs = pair(DIFFUSERS, autocast, False, head_dim=head_dim)
    handle = engine.accelerate(mine.model)
    compare(benchmark, mine, theirs, "eager", goal=GOALS["forward"])
    benchmark.extra_info["replaced"] = handle.report.counts()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
def bench_unet_training(benchmark, autocast, head_dim):
    mine, theirs = pair(DIFFUSERS, autocast, True, head_dim=head_dim)
    engine.accelerate(mine.model)
    compare(benchmark, mine, theirs, "eager", goal=GOALS["training"])


@pytest.mark.parametrize("head_dim", HEAD_DIMS[:1])
def bench_unet_inductor(benchmark, head_dim):
    mine, theirs = pair(DIFFUSERS, False, False, head_dim=head_dim)
    engine.accelerate(mine.model, inner="inductor")
    theirs.model.compile()
    compare(benchmark, mine, theirs, "compile", goal=GOALS["inductor"])


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("name", OTHERS)
def bench_foreign(benchmark, name, training):
    mine, theirs = pair(OTHERS[name], name.endswith("autocast"), training)
    handle = engine.accelerate(mine.model)
    compare(benchmark, mine, theirs, "eager", rounds=SHORT if training else ROUNDS)
    benchmark.extra_info["replaced"] = handle.report.counts()

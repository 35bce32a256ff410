"""Pairs of a diffusers scheduler and ours, and the runs in which they are compared."""

from contextlib import contextmanager

import diffusers
import torch

import engine

KINDS = ("DDPM", "DDIM", "DPMSolverMultistep")
SHAPE = (2, 3, 5, 7)
DYNAMIC = dict(thresholding=True, sample_max_value=1.5, dynamic_thresholding_ratio=0.9)


def pair(kind: str, n: int | None = 10, device=None, **config):
    """The original and ours, both through from_config."""
    original = getattr(diffusers, f"{kind}Scheduler")(**config)
    mine = getattr(engine, f"Engine{kind}Scheduler").from_config(original.config)
    if n is not None:
        original.set_timesteps(n, device=device)
        mine.set_timesteps(n, device=device)
    return original, mine


def tensors(shape=SHAPE, doubled=False, dtype=torch.float32, out_dtype=None, seed=0):
    """x, model_output, noise"""
    g = torch.Generator().manual_seed(seed)
    x, out, v, z = (torch.randn(shape, generator=g) for _ in range(4))
    out = torch.cat([out, v.tanh()], 1) if doubled else out
    return x.to(dtype), out.to(out_dtype or dtype), z


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextmanager
def originals(monkeypatch, allowed: bool):
    """Counts the calls of the originals' own steps by ours; or forbids them."""
    calls = []
    with monkeypatch.context() as patch:
        for kind in KINDS:
            parent = getattr(diffusers, f"{kind}Scheduler")

            def step(self, *args, own=parent.step, **kwargs):
                assert allowed, "ours took the original's step"
                calls.append(type(self).__name__)
                return own(self, *args, **kwargs)

            patch.setattr(parent, "step", step)
        yield calls


def seeded_run(scheduler, steps=None, n=10, shape=SHAPE, **options):
    """States of a whole run, its random numbers from one generator, and one number more of it."""
    generator = seeded()
    x, weights = torch.randn(shape, generator=seeded(1)), torch.randn(shape, generator=seeded(2))
    scheduler.set_timesteps(n)
    found = []
    for t in scheduler.timesteps if steps is None else [scheduler.timesteps[i] for i in steps]:
        out = (x * weights).tanh()
        x = scheduler.step(out, t, x, generator=generator, **options).prev_sample
        found.append(x)
    return found, torch.rand(1, generator=generator)


def assert_same_runs(a, b):
    assert torch.equal(a[1], b[1]), "the generators stand elsewhere"
    for x, y in zip(a[0], b[0], strict=True):
        assert torch.allclose(x, y, atol=5e-5, rtol=5e-5)

"""A training takes no more memory from step to step."""

import os
from pathlib import Path

import pytest
import torch
from training import config

from engine.train import train
from engine.trainer import Trainer

BOUND = 6e6  # bytes; what a step frees and takes again is not back to the byte


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grown(work, monkeypatch, name, warm, steps, leak=None) -> int:
    """Bytes by which steps warm … steps of a run with all that could grow make the process grow."""
    real, seen = Trainer.train_step, {}

    def train_step(self, x, y):
        row = real(self, x, y)
        if leak is not None:
            leak.append(torch.ones(2**16))
        if self.step in (warm, steps):
            seen[self.step] = resident()
        return row

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        options = {"t_sampler": "loss-aware", "timesteps": 4, "tensorboard": True}
        options |= {"sample_every": 50, "save_every": 50, "precision": "fp32"}
        train(config(work, out=work / name, steps=steps, **options))
    return seen[steps] - seen[warm]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says what is resident")
def test_memory_is_flat_and_a_tensor_a_step_would_show(work, monkeypatch):
    """After a drawing and a save, which load what they need."""
    assert grown(work, monkeypatch, "run", 101, 400) < BOUND
    assert grown(work, monkeypatch, "leaking", 20, 120, []) > 3 * BOUND

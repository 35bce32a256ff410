"""Neither a training nor a kernel takes more memory from step to step."""

import ctypes
import os
from pathlib import Path

import pytest
import torch
from training import config

from engine import dispatch
from engine.train import train
from engine.trainer import Trainer

OP = "attention_qkv"
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


class _Heap(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(f"before_{i}", ctypes.c_size_t) for i in range(7)]
    _fields_ += [("in_use", ctypes.c_size_t), ("free", ctypes.c_size_t), ("top", ctypes.c_size_t)]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 counts")
@pytest.mark.skipif(bool(dispatch.absence(OP, "native")), reason="the extension is not built")
def test_a_call_with_a_name_in_it_leaves_nothing_behind():
    """Packed attention's order is one; 48 bytes that stay, between larger pieces that go, keep
    those from being used again."""
    heap, calls = ctypes.CDLL(None).mallinfo2, 2000
    heap.restype = _Heap
    forward, backward = (dispatch.function(OP, stage, "native") for stage in ("fwd", "bwd"))
    qkv = torch.randn(1, 4, 3 * 16)

    def grown(calls: int) -> int:
        before = heap().in_use
        for _ in range(calls):
            out, lse = forward(qkv, 1, "3hd", 0.25)
            backward(out, qkv, out, lse, 1, "3hd", 0.25)
        return heap().in_use - before

    grown(100)
    assert grown(calls) < 16 * calls

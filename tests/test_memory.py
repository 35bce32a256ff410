"""Neither a training nor a kernel takes more memory from step to step."""

import ctypes
import gc
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


class _Heap(ctypes.Structure):
    """glibc's struct mallinfo2; mapped: pieces from 128 KiB on, those of large tensors."""

    _fields_ = [(f"before_{i}", ctypes.c_size_t) for i in range(4)]
    _fields_ += [("mapped", ctypes.c_size_t)]
    _fields_ += [(f"between_{i}", ctypes.c_size_t) for i in range(2)]
    _fields_ += [("in_use", ctypes.c_size_t), ("free", ctypes.c_size_t), ("top", ctypes.c_size_t)]


counted = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 counts"
)


def in_use() -> int:
    """Bytes that were asked of malloc and not given back."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Heap
    found = mallinfo()
    return found.in_use + found.mapped


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grown(work, monkeypatch, name, warm, steps, leak=None) -> int:
    """Bytes by which steps warm … steps of a run with all that could grow make the process grow.

    The larger of two. What is not malloc's is seen by what is resident alone. That falls, though,
    when a run hands back what malloc kept of freed memory, and when the system takes cold pages: in
    a process of many tests 26 MB that leaked made it 0.1 MB larger. malloc's count sees them.
    """
    real, seen = Trainer.train_step, {}

    def train_step(self, x, y):
        row = real(self, x, y)
        if leak is not None:
            leak.append(torch.ones(2**16))
        if self.step in (warm, steps):
            seen[self.step] = in_use(), resident()
        return row

    gc.collect()  # what earlier tests left would be missing at the second reading
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", train_step)
        options = {"t_sampler": "loss-aware", "timesteps": 4, "tensorboard": True}
        options |= {"sample_every": 50, "save_every": 50, "precision": "fp32"}
        train(config(work, out=work / name, steps=steps, **options))
    return max(after - before for before, after in zip(seen[warm], seen[steps], strict=True))


@counted
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says what is resident")
def test_memory_is_flat_and_a_tensor_a_step_would_show(work, monkeypatch):
    """After a drawing and a save, which load what they need."""
    assert grown(work, monkeypatch, "run", 101, 400) < BOUND
    assert grown(work, monkeypatch, "leaking", 20, 120, []) > 3 * BOUND


@counted
@pytest.mark.skipif(bool(dispatch.absence(OP, "native")), reason="the extension is not built")
def test_a_call_with_a_name_in_it_leaves_nothing_behind():
    """Packed attention's order is one; 48 bytes that stay, between larger pieces that go, keep
    those from being used again."""
    calls = 2000
    forward, backward = (dispatch.function(OP, stage, "native") for stage in ("fwd", "bwd"))
    qkv = torch.randn(1, 4, 3 * 16)

    def grown(calls: int) -> int:
        before = in_use()
        for _ in range(calls):
            out, lse = forward(qkv, 1, "3hd", 0.25)
            backward(out, qkv, out, lse, 1, "3hd", 0.25)
        return in_use() - before

    grown(100)
    assert grown(calls) < 16 * calls

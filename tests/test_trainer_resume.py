"""A run that was stopped, killed or lengthened and resumed is the run that went on: in weights,
optimiser, EMA, gradient scale, t sampler, and in its logs."""

import math
import os
import re
import shutil
import signal
import threading

import pytest
import torch
from training import assert_same_run, config, events_of, resumed, rows_of, weights

from engine import checkpoint, data, guard
from engine.train import train
from engine.trainer import Stopped, Trainer

LEARNED = {"variance": "learned_range", "loss": "hybrid"}
LOSS_AWARE = {"t_sampler": "loss-aware", "timesteps": 4, "batch": 8}


@pytest.fixture
def eventful(monkeypatch):
    """Of each run, step 4 has a NaN in its gradient and step 13 a spike; a scale grows fast."""
    real = Trainer.loss

    def loss(self, x0, y, index):
        step = index // self.config.accumulate
        value = real(self, x0, y, index)
        if step == 3:
            value = (
                value + (0 * self.parameters["conv_out.weight"].sum()).sqrt()
            )  # 0, its slope NaN
        return value * (20 if step == 12 else 1)

    monkeypatch.setattr(Trainer, "loss", loss)
    monkeypatch.setattr(guard, "FEWEST", 8)
    monkeypatch.setattr(guard, "GROWTH", 3)


PATHS = {
    "fp32": {},
    "fp32 in pieces": {"accumulate": 2},
    "bf16": {"precision": "bf16"},
    "bf16 in pieces": {"precision": "bf16", "accumulate": 2},
    "fp16": {"precision": "fp16"},
    "fp16 in pieces": {"precision": "fp16", "accumulate": 2},
    "classes": {"classes": True, "label_dropout": 0.5, "accumulate": 2, "precision": "fp32"},
    "decoded batch by batch": {"precision": "fp32"},
}


@pytest.mark.parametrize("path", PATHS)
def test_resume_continues_exactly(work, eventful, monkeypatch, path):
    """10 steps and 10 more are 20 steps: pictures, mirror images, t, noise, dropout, labels left
    out, the gradient's scale, and what the guard finds unusual."""
    if path == "decoded batch by batch":
        monkeypatch.setattr(data, "into_memory", lambda images, limit: images)
    options = {"precision": "fp32", "steps": 20, **PATHS[path]}
    whole = train(config(work, out=work / "whole", **options))
    halves = work / "halves"
    train(config(work, out=halves, **{**options, "steps": 10}))
    half = weights(halves)
    train(resumed(halves, steps=20))
    assert_same_run(halves, whole)
    assert any(k.startswith("optimizer.exp_avg.") for k in weights(halves))
    assert [row["step"] for row in rows_of(halves)] == list(range(1, 21))
    found = [(e["step"], e["event"]) for e in events_of(halves)]
    if "fp16" not in path:
        assert found == [(4, "skipped"), (13, "spike")]
    else:  # doubled every third step, until a gradient overflows
        assert found[0] == (4, "skipped") and (13, "skipped") in found
        assert events_of(halves)[0]["scale"] == 2**17 and half["guard.scale"] != 2**16


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("half", [5, 10])  # in the warm-up of the t sampler, and after it
def test_resume_with_a_loss_aware_sampler_continues_exactly(work, capsys, half, accumulate):
    options = {**LEARNED, **LOSS_AWARE, "loss": "vlb", "accumulate": accumulate, "steps": 16}
    run = train(config(work, out=work / "whole", **options))
    told = capsys.readouterr().err
    assert "t is drawn uniformly until each of the 4 has 10 losses: some 12 steps" in told
    over = re.search(r"step (\d+): from here on t is drawn in proportion to its loss", told)
    assert 5 < int(over[1]) < 10  # as the halves assume
    assert re.search(r"uniform t: [0-3]/4 have 10 losses", told)
    whole, halves = weights(run), work / "halves"
    train(config(work, out=halves, **{**options, "steps": half}))
    train(resumed(halves, steps=16))
    assert_same_run(halves, run)
    assert whole["t_sampler.counts"].sum() == 16 * 8
    uniform = weights(
        train(config(work, out=work / "uniform", **options | {"t_sampler": "uniform"}))
    )
    assert not torch.equal(uniform["model.conv_out.weight"], whole["model.conv_out.weight"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(work, monkeypatch, number):
    assert threading.current_thread() is threading.main_thread()
    before = signal.getsignal(number)
    real = Trainer.train_step

    def train_step(self, x, y):
        if self.step == 3:
            os.kill(os.getpid(), number)
        return real(self, x, y)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    run = work / "my run"
    with pytest.raises(Stopped, match=r"saved at step 4 of 6.*--resume '.*my run'$") as stopped:
        train(config(work, out=run))
    assert stopped.value.code == 128 + number and signal.getsignal(number) == before
    assert checkpoint.read(run)[1]["step"] == 4
    monkeypatch.setattr(Trainer, "train_step", real)
    train(resumed(run))
    straight = train(config(work, out=work / "straight"))
    mine = weights(run)
    assert all(torch.equal(mine[k], v) for k, v in weights(straight).items())


def test_a_killed_run_resumes_from_its_checkpoint(work, monkeypatch):
    """Rows after the checkpoint do not come twice; even a run without a step done can resume."""
    real = Trainer.train_step

    def train_step(self, x, y):
        if self.step == 5:
            raise RuntimeError("the machine went down")
        return real(self, x, y)

    for save_every, saved in ((4, 4), (100, 0)):
        run = work / f"run{saved}"
        monkeypatch.setattr(Trainer, "train_step", train_step)
        with pytest.raises(RuntimeError, match="went down"):
            train(config(work, out=run, save_every=save_every))
        assert checkpoint.read(run)[1]["step"] == saved
        monkeypatch.setattr(Trainer, "train_step", real)
        train(resumed(run))
        assert [row["step"] for row in rows_of(run)] == [1, 2, 3, 4, 5, 6]


def test_checkpoints_that_stay(work):
    """Each is what a run that stopped there would have left. A copy in a new folder goes on."""
    train(config(work, keep_every=2))
    kept = sorted((work / "run" / "checkpoints").iterdir())
    assert [path.name for path in kept] == [f"step_00000{k}.safetensors" for k in (2, 4, 6)]
    train(config(work, out=work / "short", steps=2))
    tensors, info = checkpoint.read(kept[0])
    assert info["step"] == 2
    for name, value in weights(work / "short").items():
        assert torch.equal(tensors[name], value), name
    assert checkpoint.load(kept[1])[2]["step"] == 4
    train(resumed(work / "run", steps=7, keep_every=0))
    assert len(list((work / "run" / "checkpoints").iterdir())) == 3
    with pytest.raises(ValueError, match="copy it to a new folder"):
        train(resumed(kept[1], steps=7))
    assert len(list((work / "run" / "checkpoints").iterdir())) == 3
    (work / "branch").mkdir()
    shutil.copy(kept[1], work / "branch" / checkpoint.FILE)
    train(resumed(work / "branch", steps=7, keep_every=0))
    branch = weights(work / "branch")
    for name, value in weights(work / "run").items():
        assert torch.equal(branch[name], value), name
    shutil.rmtree(work / "run" / "checkpoints")
    (work / "run" / "checkpoints").touch()
    with pytest.raises(ValueError, match=r"--keep-every: cannot write.*it is a file"):
        train(resumed(work / "run", steps=9, keep_every=1))


def test_no_checkpoint_that_stays_is_left_out(work, monkeypatch):
    """Killed between the two of a step, the run comes there again; one that cannot be written does
    not keep the other from being so."""
    real = checkpoint.save

    def save(path, tensors, info, keep_last=None):
        if info["step"] == 4 and monkeypatch.second:
            raise KeyboardInterrupt
        monkeypatch.second = info["step"] == 4
        real(path, tensors, info, keep_last)

    monkeypatch.second = False
    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        train(config(work, keep_every=2))
    monkeypatch.setattr(checkpoint, "save", real)
    train(resumed(work / "run"))
    stay = work / "run" / "checkpoints"
    assert [checkpoint.step_of(path) for path in sorted(stay.iterdir())] == [2, 4, 6]
    shutil.rmtree(stay)
    stay.symlink_to(work / "nowhere")
    with pytest.raises(OSError):
        train(resumed(work / "run", steps=8))
    assert checkpoint.read(work / "run")[1]["step"] == 8


def test_what_ends_before_the_run_begins_leaves_no_files_of_one(work):
    for name in ("run", "empty"):
        (work / name).mkdir()
    with pytest.raises(ValueError, match="empty"):
        train(config(work, dataset=str(work / "empty"), keep_every=2))
    assert not list((work / "run").iterdir())


def test_events_after_the_checkpoint_do_not_come_twice(work, eventful, monkeypatch):
    """Nor those of a run that was killed before its first checkpoint with a step done."""
    whole = train(config(work, out=work / "whole", steps=16, precision="fp32"))
    real = Trainer.train_step

    def train_step(self, x, y):
        if self.step == 14:
            raise RuntimeError("the machine went down")
        return real(self, x, y)

    for save_every in (10, 100):
        run = work / f"run{save_every}"
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="went down"):
            patch.setattr(Trainer, "train_step", train_step)
            train(config(work, out=run, steps=16, save_every=save_every, precision="fp32"))
        assert [e["step"] for e in events_of(run)] == [4, 13]
        train(resumed(run, save_every=100))
        assert_same_run(run, whole)


@pytest.mark.parametrize("after", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("before", ["fp32", "fp16"])
def test_the_precision_may_change_on_resume(work, before, after):
    """It works; a scale that the checkpoint lacks begins anew, one of no use is dropped."""
    run = train(config(work, precision=before, steps=3))
    train(resumed(run, precision=after, steps=6))
    tensors, info = checkpoint.read(run)
    assert info["step"] == 6 and ("guard.scale" in tensors) == (after == "fp16")
    assert all(bool(t.isfinite().all()) for t in tensors.values())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_checkpoint_of_before_the_guard_had_a_state_resumes(work, precision):
    run = train(config(work, precision=precision, steps=3))
    tensors, info = checkpoint.read(run)
    old = {k: v for k, v in tensors.items() if not k.startswith("guard.")}
    assert len(old) < len(tensors)
    checkpoint.save(run / checkpoint.FILE, old, {k: v for k, v in info.items() if k != "format"})
    train(resumed(run, steps=5))
    assert checkpoint.read(run)[1]["step"] == 5


def test_a_checkpoint_with_nan_is_no_start(work):
    """One of an engine that saved it: refused before anything is written."""
    run = train(config(work, steps=3, t_sampler="loss-aware"))
    tensors, info = checkpoint.read(run)
    del info["format"]
    before = {path.name for path in run.iterdir()}
    for name in ("model.conv_in.bias", "ema.conv_out.weight", "t_sampler.losses"):
        spoiled = {k: v.clone() for k, v in tensors.items()}
        spoiled[name].view(-1)[1] = math.inf
        checkpoint.save(run / checkpoint.FILE, spoiled, info)
        with pytest.raises(ValueError, match=f"has {name} that is not finite: go on from an earl"):
            train(resumed(run, steps=5))
    assert {path.name for path in run.iterdir()} == before

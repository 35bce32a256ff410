"""What the tests of training share: a tiny run's configuration, and what it left."""

import dataclasses
import json

import torch

from engine import checkpoint
from engine import train as command
from engine.train import TrainConfig

# Of any run here: short, on the CPU, and without pictures in between.
SHORT = {
    "preset": "cifar10",  # tiny here
    "timesteps": 20,
    "lr": 1e-3,
    "warmup": 2,
    "decay": 0.0,
    "log_every": 1,
    "save_every": 100,
    "sample_every": 0,
    "samples": 0,
    "sample_steps": 2,
    "device": "cpu",
    "tensorboard": False,
    "flip": True,
}


def config(work, **changes) -> TrainConfig:
    """Six steps of four pictures; `work` is the fixture of that name."""
    values = {
        "dataset": str(work / "pictures"),
        "out": work / "run",
        "steps": 6,
        "batch": 4,
        "ema": 0.999,
    }
    return TrainConfig(**{**SHORT, **values, **changes})


def resumed(run, **changes) -> TrainConfig:
    return dataclasses.replace(command.saved_config(run), **changes)


def rows_of(run, name="metrics.jsonl") -> list[dict]:
    """The rows of the run's log, without the one figure that no two runs share."""
    path = run / name
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def events_of(run) -> list[dict]:
    return rows_of(run, "events.jsonl")


def weights(run) -> dict:
    return checkpoint.read(run)[0]


def assert_same_run(one, other) -> None:
    """Every tensor of the checkpoint, and every row of both logs."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert [k for k in mine if not torch.equal(mine[k], theirs[k])] == []
    for key in ("step", "skipped"):
        assert checkpoint.read(one)[1][key] == checkpoint.read(other)[1][key]
    assert rows_of(one) == rows_of(other) and events_of(one) == events_of(other)

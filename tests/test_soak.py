"""A training under signals, as benchmarks/soak.py has it, in little."""

import signal
import sys
from pathlib import Path

import pytest
import torch

from engine import checkpoint, train

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import soak_memory
import soak_training
from soak_training import Kill


def test_killed_three_times_it_ends_as_if_undisturbed(tmp_path, monkeypatch):
    """`python -m engine.train`, ended by each signal once, the last time by two."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    pictures = soak_training.make_pictures(tmp_path / "pictures")
    runs, log = [tmp_path / name for name in ("undisturbed", "disturbed")], tmp_path / "log.txt"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train.main(soak_training.options(pictures, runs[0], 40, 5)) == 0
    finally:
        torch.set_num_threads(threads)
    kills = [
        Kill((signal.SIGKILL,), 7, 0.0),
        Kill((signal.SIGTERM,), 2, 0.02),
        Kill((signal.SIGINT, signal.SIGTERM), 3, 0.0, 0.05),
    ]
    args = soak_training.options(pictures, runs[1], 40, 5)
    found = soak_training.disturbed(args, runs[1], log, iter(kills))
    assert found["faults"] == []
    assert found["kills"] == {"SIGKILL": 1, "SIGTERM": 1, "SIGINT": 1}
    assert (found["resumes"], found["started_anew"], found["two_in_a_row"]) == (3, 0, 1)
    assert soak_training.differences(*runs) == []
    assert [row["step"] for row in soak_training.rows(runs[1])] == list(range(1, 41))
    what_differs_is_named(*runs)


def what_differs_is_named(one: Path, other: Path) -> None:
    tensors, info = checkpoint.read(other)
    del info["format"]
    changed = {k: v.clone() for k, v in tensors.items()}
    changed["ema.conv_in.weight"].view(-1)[3] *= 1 + 2**-22
    del changed["guard.losses"]
    checkpoint.save(other / checkpoint.FILE, changed, info | {"skipped": 1})
    lines = (other / "metrics.jsonl").read_text().splitlines(True)
    (other / "metrics.jsonl").write_text("".join(lines[:-1]))
    expected = ["guard.losses is in one alone", "ema.conv_in.weight"]
    expected += ["skipped of the checkpoint", "metrics.jsonl"]
    assert soak_training.differences(one, other) == expected


def test_a_process_that_fails_by_itself_is_a_fault(tmp_path):
    args = ["--dataset", str(tmp_path / "none"), "--out", str(tmp_path / "run")]
    found = soak_training.disturbed(args, tmp_path / "run", tmp_path / "log.txt", iter([]))
    assert len(found["faults"]) == 1 and "code 2" in found["faults"][0]


def test_what_flat_means():
    assert soak_memory.judge([100.0, 101.0, 103.0])["off_median"] == pytest.approx(0.0198)
    assert resident_here()["VmRSS"] > resident_here()["RssAnon"] > 1


def resident_here() -> dict:
    import os

    return soak_memory.resident(os.getpid())

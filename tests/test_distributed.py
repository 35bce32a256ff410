"""Processes that do one job: their messages, their devices, and how they end together."""

import json

import pytest
import torch
from two_processes import torchrun

from engine import distributed
from engine import torchrun as job
from engine.distributed import Processes

MESSAGES = """
import json, sys, torch
from engine import distributed
with distributed.joined("cpu") as p:
    r = p.rank
    told = {
        "share": [list(p.share(n)) for n in (0, 1, 5)],
        "sum": p.sum(torch.tensor([[1.0, r]], dtype=torch.float64)).tolist(),
        "uneven": p.gather(torch.full((r, 2), 1.5 + r)).tolist(),
        "none": list(p.gather(torch.zeros(0, 3)).shape),
        "scalars": p.gather(torch.tensor([True, r == 1])).tolist(),
        "bf16": p.gather(torch.arange(4, dtype=torch.bfloat16).view(2, 2).t()[r:]).tolist(),
        "int64": p.gather(torch.tensor([r - 2**62])).tolist(),
        "objects": p.gather_objects({"rank": r, "text": "ü" * r}),
        "broadcast": p.broadcast({"a": [1, None]} if r == 0 else None),
        "nothing": p.broadcast(),
    }
    done = []
    p.on_first(lambda: done.append(1))
    told["done"] = done
    p.barrier()
    with p.quiet():
        print("of process", r, file=sys.stderr)
    same = p.gather_objects(told | {"share": 0, "done": 0})
    assert same[0] == same[1], same
    try:
        p.check_same({"size": 3, "seed": r})
    except ValueError as error:
        told["differ"] = str(error)
    open(f"told{r}", "w").write(json.dumps(told))
"""


def test_messages_of_two_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(MESSAGES)
    done = torchrun(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "destroy_process_group" not in done.stderr
    assert "of process 0" in done.stderr and "of process 1" not in done.stderr
    first, second = (json.loads((tmp_path / f"told{r}").read_text()) for r in (0, 1))
    assert (first["share"], second["share"]) == ([[], [], [0, 1]], [[], [0], [2, 3, 4]])
    assert first["sum"] == [[2.0, 1.0]] and first["uneven"] == [[2.5, 2.5]]
    assert first["none"] == [0, 3] and first["int64"] == [-(2**62), 1 - 2**62]
    assert first["scalars"] == [True, False, True, True]
    assert first["bf16"] == [[0.0, 2.0], [1.0, 3.0], [1.0, 3.0]]
    assert first["objects"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "ü"}]
    assert first["broadcast"] == {"a": [1, None]} and first["nothing"] is None
    assert (first["done"], second["done"]) == ([1], [])
    assert "differ in their seed: process 0 has 0, process 1 1" in first["differ"]
    assert "differ in their seed: process 1 has 1, process 0 0" in second["differ"]


FAILURES = """
import sys, torch
from engine import cli, distributed
def command(args):
    with distributed.joined("cpu") as p:
        if args[0] == "second" and p.rank == 1:
            raise ValueError("bad input")
        if args[0] == "writer":
            p.on_first(lambda: (_ for _ in ()).throw(OSError(28, "No space left", "file")))
        p.barrier()
        raise AssertionError("not reached")
sys.exit(cli.main(command, sys.argv[1:]))
"""


@pytest.mark.parametrize("who", ["second", "writer"])
def test_a_failure_ends_all_and_is_told_once(tmp_path, who):
    script = tmp_path / "script.py"
    script.write_text(FAILURES)
    done = torchrun(script, who, cwd=tmp_path)
    assert done.returncode != 0
    sentence = "error: file: No space left" if who == "writer" else "error: bad input"
    assert done.stderr.count(sentence) == 1, done.stderr
    assert done.stderr.count("error: ") == 1 and "not reached" not in done.stderr, done.stderr


@pytest.fixture
def environment(monkeypatch):
    for name in job.NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_needs_no_message(environment):
    with distributed.joined("cpu") as processes:
        assert processes == Processes() and processes.first
        x = torch.ones(2)
        assert processes.sum(x) is x and processes.gather(x) is x
        assert processes.gather_objects("a") == ["a"] and processes.broadcast("a") == "a"
        assert list(processes.share(3)) == [0, 1, 2]
        processes.barrier()
        processes.check_same({"a": 1})
        with pytest.raises(OSError, match="full"):
            processes.on_first(lambda: (_ for _ in ()).throw(OSError("full")))
    assert job.speaks()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"RANK": "0"}, "has RANK, but no WORLD_SIZE: start with torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "has RANK and WORLD_SIZE, but no LOCAL_RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "but no MASTER_ADDR"),
    ],
)
def test_an_incomplete_environment_is_one_sentence(environment, given, sentence):
    for name, value in given.items():
        environment.setenv(name, value)
    with pytest.raises(ValueError, match=sentence), distributed.joined("cpu"):
        pass


@pytest.mark.parametrize("numbers", [("2", "2", "0"), ("0", "0", "0"), ("x", "2", "0")])
def test_a_senseless_environment_is_one_sentence(environment, numbers):
    for name, value in zip(job.NAMES, (*numbers, "127.0.0.1", "1"), strict=True):
        environment.setenv(name, value)
    with pytest.raises(ValueError, match=f"has RANK={numbers[0]}, WORLD_SIZE.*as torchrun sets"):
        job.launched()


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    assert distributed.own_device(None, 1) == torch.device("cuda:1")
    assert distributed.own_device("cuda", 0) == torch.device("cuda:0")
    assert distributed.own_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(ValueError, match="one GPU for all processes: give --device cuda"):
        distributed.own_device("cuda:1", 0)
    with pytest.raises(ValueError, match=r"2 GPU.*give --nproc-per-node at most that many"):
        distributed.own_device("cuda", 2)

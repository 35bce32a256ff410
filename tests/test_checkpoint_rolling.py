"""The last few checkpoints of a run: one is whole at every moment, and that one is found."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_checkpoint import content

import engine
from engine import checkpoint, metrics, train, train_classifier
from engine.checkpoint import FILE, CheckpointError

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


def save(folder, step: int, keep_last: int | None = 2) -> None:
    tensors, info = content(step / 16)
    checkpoint.save(folder / FILE, tensors, info | {"step": step}, keep_last)


def damage(file, at: int = -9) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 4
    file.unlink()  # not in place: it may be a link
    file.write_bytes(raw)


def steps(folder) -> list[int]:
    return [checkpoint.step_of(file) for file in checkpoint.files(folder)]


def kept(step: int) -> str:
    return f"checkpoint.step_{step:06d}.safetensors"


def test_the_newest_few_stay(tmp_path):
    for step in range(5):
        save(tmp_path, step, 3)
        assert steps(tmp_path) == list(range(step, max(-1, step - 3), -1))
    assert {file.name for file in tmp_path.iterdir()} == {FILE, kept(3), kept(2)}
    save(tmp_path, 4, 3)  # a signal after a save: the same step again
    assert steps(tmp_path) == [4, 3, 2]
    save(tmp_path, 9, None)
    assert steps(tmp_path) == [9, 3, 2]
    save(tmp_path, 10, 1)
    assert steps(tmp_path) == [10] and [file.name for file in tmp_path.iterdir()] == [FILE]
    (tmp_path / "checkpoint.step_7.safetensors").touch()
    (tmp_path / "checkpoint.step_000007.safetensors.old").touch()
    assert steps(tmp_path) == [10]
    save(tmp_path, 11, 1)
    assert len(list(tmp_path.iterdir())) == 3  # these are the user's own


@pytest.mark.parametrize("at", [3, 40, -9, None], ids=["length", "header", "numbers", "lost"])
def test_a_folder_falls_back_to_the_newest_whole_one_and_says_so(tmp_path, capsys, at):
    for step in (1, 2, 3):
        save(tmp_path, step, 3)
    assert engine.load(tmp_path)[2]["step"] == 3 and capsys.readouterr().err == ""
    file = tmp_path / FILE
    file.unlink() if at is None else damage(file, at)
    model, _, info = engine.load(tmp_path)
    assert info["step"] == 2 and info["file"] == tmp_path / kept(2)
    assert all(bool((p == 2 / 16).all()) for p in model.parameters())
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.endswith(f": {kept(2)} is used in its place\n")
    assert said.startswith(str(file if at else tmp_path)) and "train again" not in said
    if at is not None:  # who names the file means that file
        with pytest.raises(CheckpointError):
            engine.load(file)
    damage(tmp_path / kept(2))
    assert checkpoint.newest(tmp_path)[2]["step"] == 1
    assert engine.load(tmp_path / kept(1))[2]["step"] == 1
    damage(tmp_path / kept(1))
    capsys.readouterr()
    with pytest.raises(CheckpointError, match="damaged" if at == -9 else "."):
        checkpoint.read(tmp_path)
    assert capsys.readouterr().err == ""


def test_a_newer_engines_checkpoint_is_not_passed_over(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr("engine.checkpoint_file.FORMAT", 3)
    save(tmp_path, 2)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 3"):
        checkpoint.read(tmp_path)


def test_a_damaged_one_is_not_kept_in_the_place_of_a_good_one(tmp_path):
    for step in (1, 5):
        save(tmp_path, step)
    damage(tmp_path / FILE, 40)  # its step is not known
    save(tmp_path, 6)
    assert steps(tmp_path) == [6, 1]
    damage(tmp_path / FILE)  # its step is known, and later than that to which the run went back
    save(tmp_path, 3)
    assert steps(tmp_path) == [3, 1]


# --- a run --------------------------------------------------------------------------------------


def options(**changes) -> train.TrainConfig:
    return train.TrainConfig(
        **{
            "dataset": "pictures",
            "out": Path("run"),
            "preset": "cifar10",
            "timesteps": 10,
            "steps": 6,
            "batch": 4,
            "log_every": 1,
            "save_every": 2,
            "sample_every": 0,
            "samples": 0,
            "device": "cpu",
            "tensorboard": False,
            **changes,
        }
    )


def weights(run) -> dict:
    return checkpoint.read(run)[0]


@pytest.mark.parametrize("at", [40, -9, None], ids=["header", "numbers", "lost"])
def test_a_run_goes_on_from_the_one_before(work, capsys, at):
    straight, run = train.train(options(out=Path("straight"), steps=8)), train.train(options())
    assert steps(run) == [6, 4]
    (run / FILE).unlink() if at is None else damage(run / FILE, at)
    capsys.readouterr()
    assert train.main(["--resume", "run", "--steps", "8"]) == 0
    said = capsys.readouterr().err
    assert said.count("is used in its place") == 1 and kept(4) in said
    assert [row["step"] for row in metrics.read_metrics(run)] == list(range(1, 9))
    mine = weights(run)
    assert all(torch.equal(mine[k], v) for k, v in weights(straight).items())
    assert steps(run) == [8, 6]


def test_a_run_that_goes_on_from_the_one_before_keeps_a_whole_one(work, monkeypatch):
    """Killed before its first save, it has gone on from what is now the newest."""
    run = train.train(options())
    damage(run / FILE)
    monkeypatch.setattr("engine.trainer.Log", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train(dataclasses.replace(train.saved_config(run), steps=8))
    assert checkpoint.read(run / FILE)[1]["step"] == 4 and steps(run) == [4]


def test_options_and_words_of_a_run(work, capsys):
    run = train.train(options(keep_last=3))
    assert steps(run) == [6, 4, 2]
    with pytest.raises(ValueError, match="--keep-last must be at least 1, not 0"):
        train.train(options(keep_last=0))
    assert train.main(["--resume", "run", "--steps", "8", "--keep-last", "1"]) == 0
    assert steps(run) == [8]
    save_again = checkpoint.read(run)
    checkpoint.save(run / kept(4), *save_again)
    (run / FILE).unlink()
    with pytest.raises(FileExistsError, match="run already holds a run: go on with --resume"):
        train.train(options())
    again = dataclasses.replace(train.saved_config(run / kept(4)), steps=9)
    with pytest.raises(ValueError, match=r"a run goes on in its folder, from its checkpoint\.saf"):
        train.train(again)


def test_a_classifier_goes_on_from_the_one_before(work):
    flags = ["--dataset", "pictures", "--out", "run", "--timesteps", "10", "--steps", "4"]
    flags += ["--batch", "4", "--save-every", "2", "--image-size", "8", "--channels", "1"]
    assert train_classifier.main([*flags, "--device", "cpu"]) == 0
    assert steps(Path("run")) == [4, 2]
    damage(Path("run", FILE))
    assert checkpoint.load_classifier("run")
    assert train_classifier.main(["--resume", "run"]) == 0
    assert steps(Path("run")) == [4, 2]
    assert checkpoint.read(Path("run", FILE))[1]["step"] == 4


# --- every moment -------------------------------------------------------------------------------

# A process that saves ends by SIGKILL before its n-th call of the operating system, for every n.
MOMENTS = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from engine import checkpoint

root, keep_last, damaged, links = Path(sys.argv[1]), int(sys.argv[2]), *map(int, sys.argv[3:])
CALLS = ("open", "mkdir", "link", "rename", "replace", "fsync", "unlink", "rmdir")

def refuse(*args, **kwargs):
    raise OSError(95, "Operation not supported")

def save(folder, step):
    info = {"model": {}, "diffusion": {}, "train": {}, "step": step, "skipped": 0}
    tensors = {"x": torch.full((999,), float(step))}
    checkpoint.save(folder / checkpoint.FILE, tensors, info, keep_last)

def counted(call, left):
    def counting(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return counting

if not links:
    os.link = refuse
moment = 0
while True:
    moment += 1
    folder = root / str(moment)
    folder.mkdir()
    for step in range(1, 4):
        save(folder, step)
    if damaged:
        raw = bytearray((folder / checkpoint.FILE).read_bytes())
        raw[-1] ^= 1
        (folder / checkpoint.FILE).write_bytes(raw)
    child = os.fork()
    if child == 0:
        left = [moment]
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name), left))
        save(folder, 9)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    tensors, info = checkpoint.read(folder)
    assert info["step"] in ((2, 9) if damaged else (3, 9)), info
    assert bool((tensors["x"] == info["step"]).all())
    assert links or damaged or keep_last > 1 or (folder / checkpoint.FILE).exists()
    assert not links or (folder / checkpoint.FILE).exists()
    save(folder, 10)
    left = {path.name for path in folder.iterdir()}
    assert len(left) <= keep_last and checkpoint.FILE in left, left
    assert checkpoint.read(folder)[1]["step"] == 10
    if not os.WIFSIGNALED(status):
        assert os.WEXITSTATUS(status) == 0
        break
print(moment)
"""


@pytest.mark.parametrize("keep_last, damaged, links", [(1, 0, 1), (2, 1, 1), (3, 0, 0), (2, 1, 0)])
def test_killed_before_any_call_of_the_system_one_is_whole(tmp_path, keep_last, damaged, links):
    done = subprocess.run(
        [sys.executable, "-c", MOMENTS, str(tmp_path), *map(str, (keep_last, damaged, links))],
        capture_output=True,
        text=True,
        env=ENV,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 6  # fsync twice, and what makes, links, renames and removes


def test_killed_at_random_moments_while_it_saves(tmp_path):
    """What benchmarks/soak.py does a hundred times."""
    results = tmp_path / "soak.json"
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "soak.py", "--kills", "14"),
            *("--out", tmp_path / "run", "--results", results),
        ],
        capture_output=True,
        text=True,
        env=ENV,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())["kills"]
    assert found["kills"] == found["loadable"] == 14 and found["faults"] == []
    assert found["inside_a_save"] >= 3  # three in four on a disk, fewer in memory

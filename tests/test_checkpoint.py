"""One file, atomic, no pickle; whatever is wrong with it is said in one sentence."""

import json
import os
import signal
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file, save_file

import engine
from engine import checkpoint
from engine.checkpoint_file import FORMAT, KEY

SMALL = {
    "image_size": 8,
    "in_channels": 1,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "num_groups": 4,
}


def content(value: float = 0.0):
    model = engine.UNet(**SMALL)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)
    weights = model.state_dict()
    tensors = {f"{part}.{k}": v.clone() for part in ("model", "ema") for k, v in weights.items()}
    tensors["diffusion.betas"] = engine.schedules.betas("cosine", 10)
    info = {
        "model": model.config,
        "diffusion": {"prediction": "v", "variance": "large", "loss": "huber"},
        "train": {},
        "classes": [],
        "step": 3,
        "skipped": 0,
    }
    return tensors, info


@pytest.fixture
def file(tmp_path):
    path = tmp_path / checkpoint.FILE
    checkpoint.save(path, *content(0.5))
    return path


def test_load_gives_back_what_was_saved(file):
    for path in (file, file.parent, str(file)):
        model, diffusion, config = engine.load(path)
        assert not model.training and config["step"] == 3
        assert all(bool((p == 0.5).all()) for p in model.parameters())
        assert (diffusion.T, diffusion.prediction, diffusion.variance) == (10, "v", "large")
        assert torch.equal(diffusion.betas, engine.schedules.betas("cosine", 10))
    images = engine.sample(model, diffusion, (2, 1, 8, 8))
    assert images.shape == (2, 1, 8, 8)


def test_metadata_is_json_and_mode_follows_umask(file):
    with open(file, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    assert json.loads(header["__metadata__"][KEY])["format"] == FORMAT
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("crash", ["digest", "os.fsync", "os.replace"])
def test_crash_while_writing_leaves_the_previous_one(file, monkeypatch, crash):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("engine.checkpoint_file.digest" if crash == "digest" else crash, fail)
        checkpoint.save(file, *content(0.75))
    assert [f.name for f in file.parent.iterdir()] == [checkpoint.FILE]
    assert all(bool((p == 0.5).all()) for p in engine.load(file)[0].parameters())
    # An earlier version's leftover; the next save takes its place.
    file.with_name(file.name + ".tmp").write_bytes(b"half")
    checkpoint.save(file, *content(0.75))
    assert [f.name for f in file.parent.iterdir()] == [checkpoint.FILE]
    assert all(bool((p == 0.75).all()) for p in engine.load(file)[0].parameters())


KILLED = """
import os, sys, threading, torch
from engine import checkpoint
final = os.path.join(sys.argv[1], checkpoint.FILE)
def watch():  # ends the process as soon as a byte of the new file is on the disk
    while True:
        for folder, _, names in os.walk(sys.argv[1]):
            for name in names:
                path = os.path.join(folder, name)
                if path != final and os.path.exists(path) and os.path.getsize(path):
                    os.kill(os.getpid(), 9)
big = {"x": torch.zeros(2**25)}
threading.Thread(target=watch, daemon=True).start()
checkpoint.save(final, big, {})
"""


def test_what_a_killed_save_leaves_is_removed_by_the_next(file):
    root = os.path.dirname(os.path.dirname(engine.__file__))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(file.parent)], env=env)
    assert done.returncode == -signal.SIGKILL
    left = {f.name for f in file.parent.iterdir()}
    assert left == {checkpoint.FILE, checkpoint.FILE + ".tmp"}  # nothing of a made-up name
    assert any(file.with_name(file.name + ".tmp").iterdir())
    assert all(bool((p == 0.5).all()) for p in engine.load(file)[0].parameters())
    checkpoint.save(file, *content(0.75))
    assert [f.name for f in file.parent.iterdir()] == [checkpoint.FILE]
    assert all(bool((p == 0.75).all()) for p in engine.load(file)[0].parameters())


def test_saves_of_one_file_at_once_wait_for_each_other(file):
    values = [i / 8 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda value: checkpoint.save(file, *content(value)), values))
    assert [f.name for f in file.parent.iterdir()] == [checkpoint.FILE]
    kept = {float(p.flatten()[0]) for p in engine.load(file)[0].parameters()}
    assert len(kept) == 1 and kept <= set(values)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_file(file, keep):
    raw = file.read_bytes()
    file.write_bytes(raw[: int(keep * len(raw)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match="is not a readable checkpoint") as error:
        engine.load(file)
    assert str(file) in str(error.value)


def rewrite(file, **changes):
    tensors = load_file(file)
    info = content()[1] | {"format": 1} | changes
    save_file(tensors, file, {KEY: json.dumps(info)})


def test_files_of_others(file, tmp_path):
    rewrite(file, format=99)
    with pytest.raises(
        ValueError, match="has checkpoint format 99, this engine reads formats up to 2"
    ):
        engine.load(file)
    rewrite(file, model=SMALL | {"model_channels": 16})
    with pytest.raises(
        ValueError, match=r"does not describe a model of this engine.*size mismatch"
    ):
        engine.load(file)
    rewrite(file, model={"image_size": 8, "colour": "red"})
    with pytest.raises(ValueError, match="does not describe a model"):
        engine.load(file)
    rewrite(file, diffusion={"prediction": "soul"})
    with pytest.raises(ValueError, match="prediction"):
        engine.load(file)
    save_file({"weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="not a checkpoint of this engine"):
        engine.load(file)
    torch.save({"weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="is not a readable checkpoint"):
        engine.load(file)
    with pytest.raises(ValueError, match="the folder has no checkpoint"):
        (tmp_path / "empty").mkdir()
        engine.load(tmp_path / "empty")
    with pytest.raises(ValueError, match="there is no such file or folder"):
        engine.load(tmp_path / "nowhere")

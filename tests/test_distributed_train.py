"""Training by two processes: the same as by one, in whole or sharded, restarted, stopped."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_unet import alive
from train_several import TINY
from training import SHORT
from two_processes import ROOT, torchrun

from engine import checkpoint, data, ops, unet
from engine import torchrun as job
from engine import train as command

RUNS = ROOT / "tests" / "train_several.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures; `options` are relative to it."""
    folder = tmp_path_factory.mktemp("distributed")
    random = np.random.default_rng(0)
    for i in range(40):
        file = folder / "pictures" / "ab"[i % 2] / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(file)
    return folder


def options(place, name, **changes) -> dict:
    values = {
        "dataset": str(place / "pictures"),
        "out": str(place / name),
        "image_size": 8,
        "channels": 1,
        "classes": True,
        "label_dropout": 0.3,
        "steps": 50,
        "batch": 8,
        "accumulate": 2,
        "ema": 0.99,
        "precision": "fp32",
    }
    return {**SHORT, **values, **changes}


def described(place, *runs) -> Path:
    file = place / f"{'-'.join(Path(run['out']).name for run in runs)}.runs"
    file.write_text(json.dumps(runs))
    return file


def by_one(place, *runs) -> None:
    """Each process of these tests takes one thread, as torchrun's do."""
    done = subprocess.run(
        [sys.executable, RUNS, described(place, *runs)],
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


def environment() -> dict:
    given = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return given | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def by_two(place, *runs):
    done = torchrun(RUNS, described(place, *runs), cwd=place)
    assert "destroy_process_group" not in done.stderr
    return done


AWARE = {"t_sampler": "loss-aware", "loss": "vlb", "timesteps": 4, "steps": 16}


@pytest.fixture(scope="module")
def one(place):
    """What one process makes; `other layout` rounds differently and is else the same."""
    by_one(
        place,
        options(place, "one"),
        options(place, "other layout", layout="contiguous"),
        options(place, "one aware", **AWARE),
        options(place, "one half", steps=25),
        options(place, "one short", steps=16),
    )
    return place


@pytest.fixture(scope="module")
def two(one):
    for name in ("then two", "then sharded"):  # what one process began
        shutil.copytree(one / "one half", one / name)
    resumed = {"steps": 50}
    done = by_two(
        one,
        options(one, "two", sample_every=8, samples=4),
        options(one, "two aware", **AWARE),
        options(one, "sharded", steps=16, fsdp=True, sample_every=8, samples=4),
        options(one, "two half", steps=25),
        options(one, "then two", resume=str(one / "then two"), **resumed),
        options(one, "then sharded", resume=str(one / "then sharded"), fsdp=True, steps=36),
        options(one, "nan", steps=6, nan=[1, 3]),
        options(one, "fp16", steps=6, precision="fp16"),
        options(one, "fp16 sharded", steps=6, precision="fp16", fsdp=True),
        {**options(one, "two half"), "copy": "two whole", **resumed},
    )
    assert done.returncode == 0, done.stderr
    for name in ("two half", "sharded"):
        shutil.copytree(one / name, one / f"{name}, then one")
    return one, done.stderr


def curve(run: Path) -> torch.Tensor:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return torch.tensor([[row["loss"], row["grad_norm"]] for row in rows], dtype=torch.float64)


def assert_same_curve(place, name: str, steps: int = 50) -> None:
    """As near to the run of one process as that run is to itself with another order of sums."""
    truth, other = curve(place / "one"), curve(place / "other layout")
    rounding = (other - truth).abs().amax(0)
    assert rounding.min() > 0
    mine = curve(place / name)
    assert len(mine) == steps
    assert ((mine - truth[:steps]).abs().amax(0) <= 4 * rounding).all(), name


@pytest.mark.parametrize("name", ["two", "sharded"])
def test_the_first_gradients_are_those_of_one_process(two, name, monkeypatch):
    """Truth: in float64, the same pictures, t, noise and dropped labels, drawn here anew."""
    place, _ = two
    monkeypatch.setitem(unet.PRESETS, "cifar10", TINY)
    given = {k: v for k, v in options(place, "one").items() if k not in ("out", "dataset")}
    config = command.complete(command.TrainConfig(**given))
    images = data.open_dataset(str(place / "pictures"), size=8, labels=True)
    model = alive(command.new_model(config, 8, 1, 2)).double()
    model.drops_labels = False
    diffusion = command.new_diffusion(config)
    x, y = data.batch(images, 0, 8, seed=0, flip=True)
    for piece in range(2):
        t = torch.randint(20, (4,), generator=data.generator(0, 2, piece))
        torch.manual_seed(data.generator(0, 3, piece).initial_seed())
        some = slice(4 * piece, 4 * piece + 4)
        labels = torch.where(torch.rand(4) < 0.3, model.null_label, y[some])
        noise = torch.zeros_like(x[some])
        rows = torch.tensor([[0.0, 1.0, 0.0, 0.0]])  # x_t = 0·x_0 + 1·ε
        noise = ops.forward_noise(noise, rows, torch.zeros(4, dtype=torch.int64), key=0, step=piece)
        loss = diffusion.loss(model, x[some].double(), t=t, noise=noise.double(), y=labels)
        (loss / 2).backward()
    truth = {k: p.grad for k, p in model.named_parameters()}
    plain, mine = (load_file(place / f"{n}.gradients") for n in ("one", name))
    assert mine.keys() == truth.keys()
    for k, g in truth.items():
        error = (plain[k] - g).abs().max()
        budget = 3 * (error + torch.finfo(torch.float32).eps * g.abs().max())
        assert (mine[k] - g).abs().max() <= budget, k
    assert all(g.any() for g in truth.values())


@pytest.mark.parametrize(
    ("name", "steps"), [("two", 50), ("sharded", 16), ("then two", 50), ("then sharded", 36)]
)
def test_the_loss_curve_is_that_of_one_process(two, name, steps):
    assert_same_curve(two[0], name, steps)


def test_one_process_goes_on_with_what_two_began(two):
    place, _ = two
    names = [f"{name}, then one" for name in ("two half", "sharded")]
    by_one(place, *[options(place, n, resume=str(place / n), fsdp=False) for n in names])
    for name in names:
        assert_same_curve(place, name)


def test_two_go_on_bit_for_bit(two):
    place, _ = two
    mine, straight = (checkpoint.read(place / name) for name in ("two whole", "two"))
    assert mine[1]["step"] == straight[1]["step"] == 50
    assert [k for k, v in straight[0].items() if not torch.equal(v, mine[0][k])] == []
    assert torch.equal(curve(place / "two whole"), curve(place / "two"))


def test_a_sharded_run_leaves_the_same_files(two):
    place, _ = two
    whole, sharded = (checkpoint.read(place / name)[0] for name in ("one short", "sharded"))
    assert whole.keys() == sharded.keys()
    for name, value in whole.items():
        assert sharded[name].shape == value.shape and sharded[name].dtype == value.dtype, name
        scale = value.abs().max() + 1e-6
        assert (sharded[name] - value).abs().max() < 0.02 * scale, name
    names = [
        {str(p.relative_to(run)) for p in run.rglob("*.png")}
        for run in (place / "two", place / "sharded")
    ]
    assert names[1] <= names[0] and {"samples/step_000008.png", "samples.png"} <= names[1]


def test_the_history_of_t_is_that_of_one_process(two):
    place, _ = two
    alone, mine = (checkpoint.read(place / name)[0] for name in ("one aware", "two aware"))
    assert torch.equal(alone["t_sampler.counts"], mine["t_sampler.counts"])
    assert mine["t_sampler.counts"].sum() == 16 * 8
    torch.testing.assert_close(
        mine["t_sampler.losses"], alone["t_sampler.losses"], rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        curve(place / "two aware"), curve(place / "one aware"), rtol=1e-3, atol=1e-5
    )


def test_gradients_are_sent_once_a_step(two):
    place, _ = two
    sent = json.loads((place / "two.json").read_text())["sent"]
    assert sent == 50 + 1  # and once before, when DDP chooses its buckets


def test_a_gradient_that_is_not_finite_on_one_process_skips_the_step_on_all(two):
    place, told = two
    tensors, info = checkpoint.read(place / "nan")
    assert info["skipped"] == 1 and all(bool(v.isfinite().all()) for v in tensors.values())
    (event,) = (json.loads(row) for row in (place / "nan" / "events.jsonl").open())
    assert (event["step"], event["event"], event["loss"]) == (4, "skipped", None)
    assert event["pictures"] == data.order(40, 0, 3 * 8, 8).tolist()  # of the whole batch
    assert told.count("step skipped") == 1


def test_float16_has_one_scale_for_all(two):
    place, _ = two
    whole, sharded = (checkpoint.read(place / name) for name in ("fp16", "fp16 sharded"))
    for name in ("guard.scale", "guard.growth"):
        assert torch.equal(whole[0][name], sharded[0][name])
    assert whole[1]["skipped"] == sharded[1]["skipped"] == 0
    torch.testing.assert_close(
        curve(place / "fp16")[:, 0], curve(place / "one")[:6, 0], rtol=2e-3, atol=0
    )
    torch.testing.assert_close(
        curve(place / "fp16 sharded"), curve(place / "fp16"), rtol=2e-3, atol=0
    )


def test_the_first_process_alone_prints(two):
    _, told = two
    assert told.count("2 processes") == 10 and told.count("drawing 4 samples") == 2
    assert "Warning" not in told
    assert len(re.findall(r"100%.*50/50", told.replace("\r", "\n"))) >= 1


def test_a_killed_process_is_replaced_and_nothing_is_lost(place):
    """The job starts again, and goes on from its checkpoint. Three processes: sums of two numbers
    do not depend on their order, in which DDP's buckets begin otherwise than they go on."""
    change = {"steps": 10, "save_every": 4, "batch": 12}
    killed = options(place, "killed", signal=[1, 7, signal.SIGKILL], **change)
    runs = described(place, killed, options(place, "undisturbed", **change))
    done = torchrun(RUNS, runs, cwd=place, processes=3, options=["--max-restarts=1"])
    assert done.returncode == 0, done.stderr
    mine, straight = (checkpoint.read(place / name)[0] for name in ("killed", "undisturbed"))
    assert [k for k, v in straight.items() if not torch.equal(v, mine[k])] == []
    assert torch.equal(curve(place / "killed"), curve(place / "undisturbed"))
    assert done.stderr.count("3 processes") == 3  # two starts of the one, one of the other


def test_a_job_goes_on_with_its_own_run_alone(place, monkeypatch):
    monkeypatch.setitem(unet.PRESETS, "cifar10", TINY)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    given = options(place, "own", steps=2)
    config = command.TrainConfig(**given | {"out": place / "own"})
    command.train(config)
    longer = dataclasses.replace(config, steps=3)
    assert checkpoint.read(command.train(longer))[1]["step"] == 3
    others = [dataclasses.replace(longer, lr=0.5), dataclasses.replace(longer, dataset="elsewhere")]
    for other, name in [(c, "job 7") for c in others] + [(longer, "job 8"), (longer, "none")]:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        with pytest.raises(FileExistsError, match="already holds a run: go on with"):
            command.train(other)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    mine = job.job()
    assert mine == job.job() and str(os.getppid()) in mine


def test_a_signal_on_one_process_stops_all_after_saving(place):
    done = by_two(place, options(place, "stopped", signal=[1, 4, signal.SIGTERM]))
    assert done.returncode
    assert done.stderr.count("SIGTERM: stopped and saved at step 5 of 50") == 1, done.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(RUNS) not in done.stderr
    assert "FutureWarning" not in done.stderr, done.stderr  # of what torch is about to rename
    assert checkpoint.read(place / "stopped")[1]["step"] == 5


def test_what_cannot_be_is_one_sentence(place):
    told = ["--batch", 6, "--accumulate", 2, "--device", "cpu", "--out", place / "uneven"]
    done = torchrun("-m", "engine.train", "--dataset", place / "pictures", *told, cwd=place)
    assert done.returncode and not (place / "uneven").exists()
    assert done.stderr.count("--batch 6, in 2 pieces, cannot be cut equally for 2 processes") == 1
    assert done.stderr.count("error: ") == 1, done.stderr


def test_a_part_of_a_batch(place):
    """What each process decodes: its own pictures, as they are in the whole batch."""
    images = data.open_dataset(str(place / "pictures"), size=8, labels=True)
    whole, labels = data.batch(images, 3, 12, seed=1, flip=True)
    part = torch.tensor([1, 2, 7])
    decoded = dataclasses.replace(
        images, pixels=None, read=lambda i: seen.append(i) or images.pixels[i].numpy()
    )
    for source in (images, decoded):
        seen = []
        x, y = data.batch(source, 3, 12, seed=1, flip=True, part=part)
        assert torch.equal(x, whole[part]) and torch.equal(y, labels[part])
    assert sorted(seen) == sorted(data.order(40, 1, 36, 12)[part].tolist())

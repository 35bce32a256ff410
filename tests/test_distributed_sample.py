"""Sampling and evaluation by two processes: the same bits as by one, and the same end."""

import importlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from dealt_commands import carry_out
from PIL import Image
from two_processes import torchrun

from engine import Diffusion, UNet, checkpoint, checkpoint_file, cli, dealing, evaluate, schedules
from engine.distributed import Processes

pytest.importorskip("torchmetrics")

SAMPLE = ("sample", "run", "--steps", "3", "--device", "cpu")
EVALUATE = ("evaluate", "run", "--steps", "2", "--splits", "2", "--device", "cpu", "--cache")
COMMANDS = [
    [*SAMPLE, "--n", "13", "--batch", "2", "--out", "a.png", "--strip", "strip.png"],
    [*SAMPLE, "--n", "7", "--batch", "3", "--sampler", "ddpm", "--guidance", "2", "--out", "b.png"],
    [*SAMPLE, "--n", "2", "--sampler", "heun", "--label", "1", "--out", "c.png"],
    [
        *(*EVALUATE, "kept", "--n", "26", "--batch", "5", "--nll-n", "5", "--eta", "1"),
        *("--metrics", "fid,kid,is,prc,agreement,nll"),
    ],
    [
        *(*EVALUATE, "kept", "--n", "24", "--batch", "7", "--metrics", "fid,prc"),
        *("--inception-weights", "weights.pth"),
    ],
    [*EVALUATE, "kept", "--n", "24", "--batch", "30", "--metrics", "kid", "--no-baseline"],
    [*EVALUATE, "kept", "-n", "9", "--metrics", "nll", "--nll-n", "4", "--batch", "3"],
]


def make_run(folder: Path) -> None:
    """An untrained class-conditional run whose every weight counts, and 60 pictures."""
    rng = np.random.default_rng(0)
    for i in range(60):
        path = folder / "pictures" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8)).astype(np.uint8)).save(path)
    torch.manual_seed(0)
    sizes = dict(image_size=8, in_channels=1, model_channels=8, channel_mult=(1, 2), num_groups=4)
    model = UNet(**sizes, num_res_blocks=1, num_classes=2, label_dropout=0.1)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    weights = model.state_dict().items()
    tensors = {f"{k}.{n}": t.clone() for k in ("model", "ema") for n, t in weights}
    tensors["diffusion.betas"] = Diffusion(schedules.betas("cosine", 10)).betas
    info = {"model": model.config, "diffusion": {}, "train": {"dataset": "pictures"}, "step": 3}
    (folder / "run").mkdir()
    info |= {"skipped": 0, "classes": ["a", "b"]}
    checkpoint.save(folder / "run" / checkpoint.FILE, tensors, info)
    (folder / "weights.pth").write_bytes(b"weights")
    (folder / "commands.json").write_text(json.dumps(COMMANDS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where one process has carried the commands out, and where two have."""
    alone, both = (tmp_path_factory.mktemp(name) for name in ("alone", "both"))
    for folder in (alone, both):
        make_run(folder)
    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(alone)
    torch.set_num_threads(1)  # as torchrun has it: another number may round otherwise
    try:
        assert carry_out(COMMANDS) == [0] * len(COMMANDS)
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
    done = torchrun(Path(__file__).with_name("dealt_commands.py"), "commands.json", cwd=both)
    assert done.returncode == 0, done.stderr + (both / "said.0").read_text()
    return alone, both


def test_the_same_images(folders):
    for name in ("a", "b", "c"):
        one, two = (torch.load(folder / f"{name}.png.pt") for folder in folders)
        assert torch.equal(one, two), name
    assert len({tuple(image.flatten().tolist()) for image in one}) == len(one)
    for name in ("a.png", "b.png", "c.png", "strip.png"):
        one, two = ((folder / name).read_bytes() for folder in folders)
        assert one == two, name


def test_the_same_scores(folders):
    one, two = (json.loads((folder / "run" / "evaluation.json").read_text()) for folder in folders)
    assert len(one) == len(two) == 4
    for mine, theirs in zip(one, two, strict=True):
        assert mine | {"time": 0} == theirs | {"time": 0}
    files = [sorted(path.name for path in (folder / "kept").iterdir()) for folder in folders]
    assert files[0] == files[1] and len(files[0]) == 5
    for name in files[0]:  # not their bytes: safetensors writes metadata in an order of its own
        (mine, my_info), (theirs, their_info) = (
            checkpoint_file.read(folder / "kept" / name) for folder in folders
        )
        assert my_info == their_info and mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    plots = [(folder / "run" / "nll.png").read_bytes() for folder in folders]
    assert plots[0] == plots[1]


def test_the_work_is_dealt_out_and_one_process_is_heard(folders):
    alone, both = folders
    whole = (alone / "done.0").read_text().splitlines()
    shares = [(both / f"done.{rank}").read_text().splitlines() for rank in (0, 1)]
    assert whole[:3] == ["[0, 1, 2, 3, 4, 5, 6] of 7", "[0, 1, 2] of 3", "[0] of 1"]
    assert shares[0][:3] == ["[0, 2, 4, 6] of 7", "[0, 2] of 3", "[0] of 1"]
    assert shares[1][:3] == ["[1, 3, 5] of 7", "[1] of 3", "[] of 1"]
    assert len(whole) == len(shares[0]) == len(shares[1])
    assert (both / "said.1").read_text() == ""
    heard = (both / "said.0").read_text()
    assert "; 2 processes" in heard and "13 samples    a.png" in heard
    assert "samples, n = 26" in heard and "bits/dim" in heard


def test_pieces_come_back_in_order():
    """Three processes, each told what the others sent."""
    sent = {}

    class Told(Processes):
        def to_first(self, tensors):
            sent[self.rank] = list(tensors)
            return [sent[0], *(sent[r] for r in (1, 2))] if self.rank == 0 else None

    def work(mine):
        for i in mine:
            yield torch.full((1 + i % 2, 2), i), torch.tensor([10.0 * i] * (1 + i % 2))

    for count in (1, 2, 3, 7):
        expected = dealing.deal(Processes(), count, work)
        results = [dealing.deal(Told(rank, 3), count, work) for rank in (2, 1, 0)]
        assert results[:2] == [None, None]
        assert all(map(torch.equal, expected, results[2]))
    assert expected[0][:, 0].tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6]


FAILING = """
import importlib, os, sys
import engine.drawing
from engine import cli
failing, command, *args = sys.argv[1:]
def sample(*args, **options):
    raise OSError(28, "No space left on device", "a file")
if os.environ["RANK"] in failing.split(","):
    engine.drawing.draw_samples = sample
sys.exit(cli.main(importlib.import_module("engine." + command).command, args))
"""


@pytest.mark.parametrize("failing, command", [("1", SAMPLE), ("0,1", EVALUATE)])
def test_an_error_on_one_process_ends_all_with_one_sentence(folders, failing, command):
    both = folders[1]
    (both / "failing.py").write_text(FAILING)
    records = (both / "run" / "evaluation.json").read_bytes()
    options = ["kept"] if command is EVALUATE else ["--out", "no.png"]
    options += ["-n", "6", "--batch", "2"]
    done = torchrun("failing.py", failing, *command, *options, cwd=both)
    assert done.returncode != 0
    assert done.stderr.count("error: a file: No space left on device") == 1, done.stderr
    assert done.stderr.count("error: ") == 1 and "gloo" not in done.stderr, done.stderr
    assert done.stdout == "" and not (both / "no.png").exists()
    assert (both / "run" / "evaluation.json").read_bytes() == records


ONE = {
    "ablate": [],
    "plots": ["schedules"],
    "train_classifier": [],
    "verify": ["module:function"],
}


@pytest.mark.parametrize("name", ONE)
def test_commands_for_one_process_say_so(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(importlib.import_module(f"engine.{name}").command, ONE[name]) == 2
    said = capsys.readouterr()
    sentence = f"error: python -m engine.{name} runs in one process: start it without torchrun; "
    assert said.out == "" and said.err.startswith(sentence) and said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_is_shown_once(monkeypatch, capsys):
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as end:
            evaluate.main(["--help"])
        assert end.value.code == 0
        assert ("usage: python -m engine.evaluate" in capsys.readouterr().out) == (rank == "0")


def test_processes_with_different_weights_are_refused(folders):
    class Two(Processes):
        def gather_objects(self, thing):
            return [thing, {**thing, "weights": theirs}]

    model = checkpoint.load(folders[0] / "run")[0]
    theirs = mine = dealing.digest([model])
    dealing.check_alike(Two(0, 2), [model], precision="bfloat16")
    model.conv_out.bias.data[0] += 1e-6
    theirs = dealing.digest([model])
    model = checkpoint.load(folders[0] / "run")[0]
    with pytest.raises(ValueError, match=f"differ in their weights: process 0 has {mine}"):
        dealing.check_alike(Two(0, 2), [model])

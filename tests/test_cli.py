"""The command lines as a person meets them: help, one whole run, and what bad input is answered."""

import importlib
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

import engine
from engine import checkpoint, cli, dispatch, train, unet
from engine import sample as sample_function


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The current folder, with pictures and a U-Net small enough for tests."""
    for i in range(8):
        path = tmp_path / "pictures" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), 30 * i, np.uint8)).save(path)
    tiny = {
        "image_size": 8,
        "in_channels": 1,
        "model_channels": 8,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "num_groups": 4,
    }
    monkeypatch.setitem(unet.PRESETS, "cifar10", tiny)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other take ages
    yield tmp_path
    torch.set_num_threads(threads)


def sample_main(*args: str) -> int:
    return cli.main(importlib.import_module("engine.sample").command, args)


TRAIN = (
    *("--dataset", "pictures", "--out", "run", "--timesteps", "10", "--steps", "3", "--batch", "4"),
    *("--samples", "4", "--sample-steps", "2", "--sample-every", "0", "--device", "cpu"),
    *("--no-tensorboard", "--preset", "cifar10"),
)


def files(folder) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def refused(code: int, capsys) -> str:
    """Checks that bad input was answered by one sentence and code 2; returns the sentence."""
    said = capsys.readouterr()
    assert code == 2 and said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    return said.err


def test_train_resume_sample(work, capsys):
    assert train.main([*TRAIN, "--loss", "huber", "--schedule", "cosine"]) == 0
    said = capsys.readouterr()
    assert "run/samples.png" in said.out and "python -m engine.sample run" in said.out
    assert re.search(r"cpu .*U-Net of .*group_norm_silu: \w+.*from 8 of", said.err)
    for name in ("samples.png", "strip.png", "loss.png"):
        assert Image.open(work / "run" / name).size[0] > 10

    assert train.main(["--resume", "run", "--steps", "5"]) == 0
    assert checkpoint.read("run")[1]["step"] == 5
    assert checkpoint.read("run")[1]["diffusion"]["loss"] == "huber"
    capsys.readouterr()
    assert train.main(["--resume", "run"]) == 0
    assert "raise --steps" in capsys.readouterr().err

    options = ["--n", "5", "--steps", "3", "--seed", "7", "--device", "cpu"]
    assert sample_main("run", *options, "--out", "a.png", "--strip", "strip.png") == 0
    assert sample_main("run", *options, "--out", "b.png", "--batch", "2") == 0
    a, b = (np.asarray(Image.open(work / f"{name}.png")).astype(int) for name in "ab")
    assert abs(a - b).max() <= 4  # bf16 convolutions may depend on the batch
    assert sample_main("run", "--n", "2", "--sampler", "ddpm", "--out", "new/c.png") == 0
    assert (work / "new" / "c.png").is_file() and (work / "strip.png").is_file()


def test_sample_is_both_a_function_and_a_module(work):
    assert train.main([*TRAIN, "--samples", "0"]) == 0
    model, diffusion, _ = engine.load("run")
    expected = sample_function(model, diffusion, (2, 1, 8, 8), sampler="ddim", steps=2, seed=1)
    assert importlib.import_module("engine.sample") is engine.sample is sys.modules["engine.sample"]
    images = engine.sample(model, diffusion, (2, 1, 8, 8), sampler="ddim", steps=2, seed=1)
    assert torch.equal(images, expected)


@pytest.mark.parametrize("main", [train.main, lambda args: sample_main(*args)])
def test_help_teaches_every_option(main, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    module = train if main is train.main else sys.modules["engine.sample"]
    config = module.TrainConfig if module is train else module.SampleConfig
    for name in set(config.__dataclass_fields__) - {"run"}:
        assert f"-{name.replace('_', '-')}" in said, name
    if module is train:  # the text states what the recipes hold
        for recipe in train.RECIPES.values():
            for value in recipe.values():
                assert re.search(rf"\b{value:g}\b".replace("e+05", "00000"), said), value


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (["--dataset", "nowhere/at-all"], "neither fashion-mnist nor a folder|could not load"),
        (["--dataset", "./nowhere"], "no such folder"),
        (["--dataset", "empty"], "holds no picture"),
        (["--dataset", "fashion-mnist", "--data-dir", "cut"], "is truncated: found 20 bytes"),
        (["--preset", "resnet"], "--preset 'resnet' is unknown: choose one of fashion-mnist"),
        (["--image-size", "9"], "image_size 9 cannot be halved"),
        (["--width", "6"], "channels cannot be split into num_groups"),
        (["--channels", "2"], "not 2"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--accumulate", "3"], "--accumulate 3 does not divide --batch 4"),
        (["--lr", "-1"], "--lr must be positive"),
        (["--lr", "nan"], "--lr must be positive"),
        (["--sample-steps", "0"], "--sample-steps must be at least 1"),
        (["--device", "toaster"], "'toaster' is no device"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--classes"], "lies in no class folder"),
    ],
)
def test_bad_training_input_writes_nothing(work, capsys, changes, sentence):
    (work / "empty").mkdir()
    (work / "cut").mkdir()
    (work / "cut" / "train-images-idx3-ubyte").write_bytes(
        bytes([0, 0, 8, 3]) + bytes([0] * 15) + b"\1"
    )
    (work / "cut" / "train-labels-idx1-ubyte").write_bytes(bytes(8))
    raw = bytearray((work / "cut" / "train-images-idx3-ubyte").read_bytes())
    raw[4:16] = bytes([0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28])
    (work / "cut" / "train-images-idx3-ubyte").write_bytes(raw)
    before = files(work)
    code = train.main([*TRAIN, *changes])
    assert re.search(sentence, refused(code, capsys))
    assert files(work) == before


@pytest.mark.parametrize(
    "args", [["--schedule", "circular"], ["--stepz", "3"], ["--steps", "many"], ["--loss", "l3"]]
)
def test_wrong_options_exit_2(work, capsys, args):
    with pytest.raises(SystemExit) as end:
        train.main(args)
    assert end.value.code == 2 and args[0] in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        sample_main("run", "--sampler", "euler")
    assert end.value.code == 2
    assert not (work / "run").exists()


def test_a_run_is_not_overwritten_nor_changed(work, capsys):
    assert train.main([*TRAIN, "--samples", "0"]) == 0
    before = (work / "run" / checkpoint.FILE).read_bytes()
    capsys.readouterr()
    for args, sentence in (
        (TRAIN, "run already holds a run: go on with --resume run"),
        (["--resume", "run", "--loss", "l1"], "--loss cannot change on --resume.*with l2, not l1"),
        (["--resume", "run", "--out", "elsewhere"], "--resume goes on in run"),
        (["--resume", "nowhere"], "no checkpoint at nowhere"),
        (["--resume", "pictures"], "the folder has no checkpoint"),
        (["--resume", "pictures/1.png"], "not a readable checkpoint"),
    ):
        assert re.search(sentence, refused(train.main(list(args)), capsys)), sentence
    assert (work / "run" / checkpoint.FILE).read_bytes() == before
    assert not (work / "elsewhere").exists()


def test_bad_sampling_input_writes_nothing(work, capsys):
    assert train.main([*TRAIN, "--samples", "0"]) == 0
    (work / "cut.safetensors").write_bytes((work / "run" / checkpoint.FILE).read_bytes()[:-10])
    (work / "folder.png").mkdir()
    capsys.readouterr()
    before = files(work)
    for args, sentence in (
        (["nowhere"], "no checkpoint at nowhere"),
        (["pictures"], "has no checkpoint"),
        (["cut.safetensors"], "not a readable checkpoint"),
        (["run", "--steps", "11"], "more than the 10 steps"),
        (["run", "--steps", "0"], "--steps must be at least 1"),
        (["run", "--n", "0"], "--n must be at least 1"),
        (["run", "--eta", "2"], "--eta must lie in"),
        (["run", "--label", "1"], "--label needs a class-conditional model"),
        (["run", "--out", "grid.jpg"], "give the name of a .png file"),
        (["run", "--out", "folder.png"], "give the name of a .png file"),
        (["run", "--device", "cuda:99"], "CUDA devices"),
        (["run", "--out", "pictures/1.png/x.png"], "cannot write in .*pictures/1.png"),
    ):
        code = sample_main("--out", "grid.png", *args)
        assert re.search(sentence, refused(code, capsys)), sentence
    assert files(work) == before


def test_messages_name_the_file_of_an_operating_system_error():
    assert cli.sentence(FileNotFoundError(2, "No such file", "a.png")) == "a.png: No such file"
    assert cli.sentence(OSError(28, "No space left on device")) == "No space left on device"
    assert cli.sentence(ValueError("two\nlines")) == "two lines"
    assert cli.sentence(ValueError()) == "ValueError"


@pytest.mark.parametrize("backend, sentence", [("cuda", "is unknown"), ("native", "was requested")])
def test_a_back_end_that_cannot_serve(work, capsys, monkeypatch, backend, sentence):
    monkeypatch.setenv("ENGINE_BACKEND", backend)
    monkeypatch.setattr(
        dispatch, "absence", lambda op, name: "is not built" if name == "native" else ""
    )
    assert re.search(sentence, refused(train.main(TRAIN), capsys))
    assert not (work / "run").exists()


DAMAGE = {
    "list": lambda info: [info],
    "no model": lambda info: {k: v for k, v in info.items() if k != "model"},
    "no step": lambda info: {k: v for k, v in info.items() if k != "step"},
    "no train": lambda info: {k: v for k, v in info.items() if k != "train"},
    "no ema": lambda info: info,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_refused(work, capsys, damage):
    assert train.main([*TRAIN, "--samples", "0"]) == 0
    file = work / "run" / checkpoint.FILE
    with safe_open(file, "pt") as opened:
        tensors = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
        info = json.loads(opened.metadata()[checkpoint.KEY])
    if damage == "no ema":
        tensors = {k: t for k, t in tensors.items() if not k.startswith("ema.")}
    save_file(tensors, file, {checkpoint.KEY: json.dumps(DAMAGE[damage](info))})
    capsys.readouterr()
    code = train.main(["--resume", "run"])
    assert re.search("use another checkpoint", refused(code, capsys))
    code = sample_main("run", "--out", "grid.png")
    assert re.search("use another checkpoint", refused(code, capsys))

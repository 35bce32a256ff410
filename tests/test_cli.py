"""The command lines as a person meets them: help, one whole run, and what bad input is answered."""

import importlib
import inspect
import json
import os
import pydoc
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import engine
from engine import checkpoint, checkpoint_file, cli, dispatch, resume, samplers, train, train_config
from engine import sample as sample_function


def sample_main(*args: str) -> int:
    return cli.main(importlib.import_module("engine.sample").command, args)


TRAIN = (
    *("--dataset", "pictures", "--out", "run", "--timesteps", "10", "--steps", "3", "--batch", "4"),
    *("--samples", "4", "--sample-steps", "2", "--sample-every", "0", "--device", "cpu"),
    *("--no-tensorboard", "--preset", "cifar10"),
)


NO_CUDA = "device cuda:99: .*(built without CUDA: use cpu|no GPU: use cpu|the last is cuda:)"


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
    assert "run/samples.png" in said.out and re.search(r"python\S* -m engine.sample run", said.out)
    assert re.search(r"cpu .*U-Net of .*group_norm_silu: \w+.*from 24 of", said.err)
    for name in ("samples.png", "strip.png", "loss.png"):
        assert Image.open(work / "run" / name).size[0] > 10

    assert train.main(["--resume", "run", "--steps", "5"]) == 0
    assert checkpoint.read("run")[1]["step"] == 5
    assert checkpoint.read("run")[1]["diffusion"]["loss"] == "huber"
    capsys.readouterr()
    assert train.main(["--resume", "run", "--no-flip", "--no-tensorboard"]) == 0  # as it was
    assert "raise --steps" in capsys.readouterr().err

    options = ["--n", "5", "--steps", "3", "--seed", "7", "--device", "cpu"]
    assert sample_main("run", *options, "--out", "a.png", "--strip", "strip.png") == 0
    assert sample_main("run", *options, "--out", "b.png", "--batch", "2") == 0
    a, b = (np.asarray(Image.open(work / f"{name}.png")).astype(int) for name in "ab")
    assert abs(a - b).max() <= 4  # bf16 convolutions may depend on the batch
    assert sample_main("run", "--n", "2", "--sampler", "ddpm", "--out", "new/c.png") == 0
    assert (work / "new" / "c.png").is_file() and (work / "strip.png").is_file()


def test_train_and_sample_a_learned_variance(work, capsys):
    options = ["--variance", "learned_range", "--loss", "vlb", "--t-sampler", "loss-aware"]
    assert refused(train.main([*TRAIN, *options[:2]]), capsys).endswith(
        "needs a loss that trains it, not l2: give --loss hybrid, l2_vlb, vlb or rescaled_vlb\n"
    )
    assert train.main([*TRAIN, *options, "--prediction", "eps"]) == 0
    assert "t is drawn uniformly until each of the 10 has 10 losses" in capsys.readouterr().err
    assert train.main(["--resume", "run", "--steps", "4"]) == 0
    assert checkpoint.read("run")[0]["t_sampler.counts"].sum() == 16
    for sampler, steps in (("ddpm", "4"), ("ddim", "ddim5"), ("dpm++", "2,3")):
        assert sample_main("run", "--n", "2", "--sampler", sampler, "--steps", steps) == 0
    capsys.readouterr()
    args = ["--resume", "run", "--t-sampler", "uniform"]
    assert "--t-sampler cannot change on --resume" in refused(train.main(args), capsys)


def test_sample_is_both_a_function_and_a_module(work):
    assert train.main([*TRAIN, "--samples", "0"]) == 0
    model, diffusion, _ = engine.load("run")
    expected = sample_function(model, diffusion, (2, 1, 8, 8), sampler="ddim", steps=2, seed=1)
    assert importlib.import_module("engine.sample") is engine.sample is sys.modules["engine.sample"]
    images = engine.sample(model, diffusion, (2, 1, 8, 8), sampler="ddim", steps=2, seed=1)
    assert torch.equal(images, expected)
    assert inspect.signature(engine.sample) == inspect.signature(samplers.sample)
    assert "Draws images x_0" in pydoc.render_doc(engine.sample, renderer=pydoc.plaintext)


def test_modules_run_as_commands(work):
    for module, args in (("train", ["--stepz", "3"]), ("sample", ["nowhere"])):
        command = [sys.executable, "-m", f"engine.{module}", *args]
        path = os.pathsep.join([os.path.dirname(os.path.dirname(cli.__file__)), *sys.path])
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


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
    assert "None" not in said
    words = " ".join(said.replace("│", " ").split())
    assert words.count("(default: ") + words.count("(required)") == len(config.__dataclass_fields__)
    if module is train:  # the text states what the recipes hold
        for recipe in train_config.RECIPES.values():
            for value in recipe.values():
                assert re.search(rf"\b{value:g}\b".replace("e+05", "00000"), said), value


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (["--dataset", "nowhere/at-all"], "no such folder; give fashion-mnist, a folder|could not"),
        (
            ["--dataset", "fashion_mnist"],
            "fashion_mnist is unknown: did you mean fashion-mnist.*a fol",
        ),
        (["--dataset", "FashionMNIST"], "did you mean fashion-mnist"),
        (
            ["--dataset", "./pictrues"],
            r"no such folder .did you mean pictures\?.; give fashion-mnist",
        ),
        (["--dataset", ""], "--dataset is empty: give fashion-mnist"),
        (["--dataset", "pictures/b/1.png"], "is a file: give the folder"),
        (["--dataset", "empty"], "holds no picture: found no file at all, expected .bmp.*give the"),
        (["--dataset", "cut"], "for Fashion-MNIST, give --dataset fashion-mnist --data-dir cut"),
        (
            ["--dataset", "fashion-mnist", "--data-dir", "cut"],
            "is truncated: found 20 bytes.*a fresh",
        ),
        (
            ["--dataset", "fashion-mnist", "--data-dir", "cutt"],
            "no such folder .did you mean cut.*le",
        ),
        (
            ["--dataset", "fashion-mnist", "--data-dir", "empty"],
            "has no train-images.*give the folder",
        ),
        (["--preset", "resnet"], "--preset 'resnet' is unknown: choose one of fashion-mnist"),
        (["--image-size", "9"], "--image-size 9 cannot be halved"),
        (["--width", "6"], "channels cannot be split into num_groups.*another --width"),
        (["--width", "0"], "--width is 0, expected a whole number"),
        (["--channels", "2"], "not 2"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--accumulate", "3"], "--accumulate 3 does not divide --batch 4"),
        (["--lr", "-1"], "--lr must be positive"),
        (["--lr", "nan"], "--lr must be positive"),
        (["--sample-steps", "0"], "--sample-steps must be at least 1"),
        (["--device", "toaster"], "'toaster' is no device"),
        (["--device", "mps"], "device mps is not supported: give cpu or cuda"),
        (["--device", "cuda:99"], NO_CUDA),
        (["--label-dropout", "0.1"], "--label-dropout 0.1 must lie in 0 … 1 and needs --classes"),
        (["--changed-pictures"], "--changed-pictures is said of a run that goes on: give --resume"),
        (
            ["--fsdp"],
            "several processes, and this is one alone: start with torchrun .* -m engine.t",
        ),
        (["--dataset", "pictures/a", "--classes"], "lies in no class folder.*leave --classes out"),
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
    "args, sentence",
    [
        (["--schedule", "circular"], "--schedule 'circular' is unknown: choose one of 'linear', "),
        (["--stepz", "3"], "^error: --stepz is no option; did you mean --steps?; see"),
        (["--stepz=3", "-1"], "^error: --stepz is no option; did you mean --steps?; see"),
        (["-"], "^error: '-' belongs to no option; see"),
        (["--tensorbord", "--no-flipp"], "did you mean --tensorboard and --no-flip?"),
        (["--no-samples"], "^error: --no-samples is no option; did you mean --samples?; see"),
        (["--steps", "many"], "--steps 'many': expected a whole number; see"),
        (["--seed", "1.5"], "--seed '1.5': expected a whole number; see"),
        (["--lr", "fast"], "--lr 'fast': expected a number; see"),
        (["--clip", "x"], "--clip 'x': expected a number; see"),
        (["--data-dir"], "--data-dir needs a value; see"),
        (["run"], "'run' belongs to no option; see"),
    ],
)
def test_wrong_options_exit_2(work, capsys, args, sentence):
    with pytest.raises(SystemExit) as end:
        train.main(args)
    said = refused(end.value.code, capsys)
    assert re.search(sentence.replace("?", r"\?"), said) and said.endswith("engine.train --help\n")
    for args in (["run", "--sampler", "euler"], [], ["run", "--spacing", "foo"]):
        with pytest.raises(SystemExit) as end:
            sample_main(*args)
        assert re.search(
            "--sampler 'euler' is|RUN is missing: Fol|choose one of 'karras', 'uniform'; see",
            refused(end.value.code, capsys),
        )
    assert not (work / "run").exists()


def test_a_run_is_not_overwritten_nor_changed(work, capsys):
    assert train.main([*TRAIN, "--samples", "0"]) == 0
    before = (work / "run" / checkpoint.FILE).read_bytes()
    capsys.readouterr()
    for args, sentence in (
        (TRAIN, "run already holds a run: go on with --resume run"),
        (["--resume", "run", "--loss", "l1"], "--loss cannot change on --resume.*with l2, not l1"),
        (
            ["--resume", "run", "--steps", "2"],
            "--steps 2 is less than the 3 steps that run has done",
        ),
        (["--resume", "run", "--out", "elsewhere"], "--resume goes on in run"),
        (["--resume", "nowhere"], "no checkpoint at nowhere"),
        (["--resume", "pictures"], "the folder has no checkpoint"),
        (["--resume", "pictures/b/1.png"], "not a readable checkpoint"),
    ):
        assert re.search(sentence, refused(train.main(list(args)), capsys)), sentence
    assert (work / "run" / checkpoint.FILE).read_bytes() == before
    assert not (work / "elsewhere").exists()


@pytest.mark.parametrize("name", resume.RUN_FILES)
def test_files_of_a_run_without_a_checkpoint_are_not_overwritten(work, capsys, name):
    (work / "run").mkdir()
    (work / "run" / name).write_text("precious")
    before = files(work)
    code = train.main(TRAIN)
    assert re.search(f"run has {name} of another run, but no.*another --out", refused(code, capsys))
    assert files(work) == before and (work / "run" / name).read_text() == "precious"


def test_a_run_writes_no_file_that_is_not_guarded(work):
    options = ["--tensorboard", "--sample-every", "1", "--keep-every", "1"]
    assert train.main([*TRAIN, *options]) == 0
    pytest.importorskip("tensorboard")
    checkpoints = {path.name for path in checkpoint.files(work / "run")}
    assert checkpoints == {checkpoint.FILE, "checkpoint.step_000002.safetensors"}
    found = {path.name for path in (work / "run").iterdir()} | {"events.jsonl"}  # nothing unusual
    assert found == checkpoints | {*resume.RUN_FILES}


def test_other_files_do_not_take_a_folder(work):
    assert train.main([*TRAIN, "--out", "pictures/a", "--samples", "0"]) == 0


def test_resume_from_another_folder_and_with_moved_pictures(work, capsys, monkeypatch):
    assert train.main([*TRAIN, "--samples", "0", "--classes"]) == 0
    monkeypatch.chdir(work / "run")
    resume = ["--resume", ".", "--steps"]
    assert train.main([*resume, "4"]) == 0
    (work / "pictures").rename(work / "moved")
    capsys.readouterr()
    said = refused(train.main([*resume, "5"]), capsys)
    assert re.search("pictures: there is no such folder.*give fashion-mnist", said)
    assert train.main([*resume, "5", "--dataset", "../moved"]) == 0
    (work / "moved" / "b").rename(work / "moved" / "c")
    capsys.readouterr()
    said = refused(train.main([*resume, "6"]), capsys)
    assert re.search("has the classes a, c, but . was trained with a, b: give --dataset", said)
    said = refused(train.main([*resume, "6", "--dataset", "fashion-mnist"]), capsys)
    assert "--dataset cannot change on --resume" in said


def test_a_reader_that_has_enough(work):
    command = f"{sys.executable} -m engine.train --help"
    path = os.pathsep.join([os.path.dirname(os.path.dirname(cli.__file__)), *sys.path])
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.stderr == b"" and done.returncode in (0, 120, 141)


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
        (["run", "--steps", "11"], "more than the 10 that the model was trained with"),
        (["run", "--steps", "0"], "--steps must be at least 1"),
        (["run", "--steps", "many"], "--steps 'many': "),
        (["run", "--steps", "ddim11"], "--steps 'ddim11': "),
        (["run", "--n", "0"], "--n must be at least 1"),
        (["run", "--eta", "2"], "--eta must lie in"),
        (["run", "--label", "1"], "--label needs a class-conditional model"),
        (["run", "--out", "grid.jpg"], "give the name of a .png file"),
        (["run", "--out", "folder.png"], "give the name of a .png file"),
        (["run", "--device", "cuda:99"], NO_CUDA),
        (["rnu"], r"no such file or folder .did you mean run\?"),
        (["."], "has no checkpoint.safetensors; there are runs in run"),
        (["run", "--sampler", "ddpm", "--eta", "0.5"], "--eta 0.5 goes with --sampler ddim only"),
        (["run", "--seed", str(2**63)], "--seed must fit 64 bits"),
        (
            ["run", "--out", "pictures/b/1.png/x.png"],
            "cannot write in .*pictures/b/1.png .it is a file",
        ),
    ):
        code = sample_main("--out", "grid.png", *args)
        assert re.search(sentence, refused(code, capsys)), sentence
    assert files(work) == before


def test_messages_name_the_file_of_an_operating_system_error():
    assert cli.sentence(FileNotFoundError(2, "No such file", "a.png")) == "a.png: No such file"
    assert cli.sentence(OSError(28, "No space left on device")) == "No space left on device"
    assert cli.sentence(ValueError("two\nlines")) == "two lines"
    assert cli.sentence(ValueError()) == "ValueError"
    missing = ModuleNotFoundError("No module named 'PIL'", name="PIL")
    assert cli.sentence(missing) == "No module named 'PIL': pip install pillow"


def test_too_little_memory_is_no_traceback(work, capsys, monkeypatch):
    def run(self):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried …")

    monkeypatch.setattr("engine.trainer.Trainer.run", run)
    assert "try a smaller --batch" in train_error(train.main(TRAIN), capsys)
    monkeypatch.setattr("engine.trainer.Trainer.run", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main([*TRAIN, "--out", "other"])


def train_error(code: int, capsys) -> str:
    assert code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("asked, sentence", [("cuda", "is unknown"), ("native", "was requested")])
def test_a_back_end_that_cannot_serve(work, capsys, monkeypatch, asked, sentence):
    monkeypatch.setenv("ENGINE_BACKEND", asked)
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
    assert train.main([*TRAIN, "--samples", "0", "--keep-last", "1"]) == 0
    file = work / "run" / checkpoint.FILE
    tensors, info = checkpoint.read(file)
    info["format"] = 1  # without checksums
    if damage == "no ema":
        tensors = {k: t for k, t in tensors.items() if not k.startswith("ema.")}
    save_file(tensors, file, {checkpoint_file.KEY: json.dumps(DAMAGE[damage](info))})
    capsys.readouterr()
    code = train.main(["--resume", "run"])
    assert re.search("use another checkpoint", refused(code, capsys))
    code = sample_main("run", "--out", "grid.png")
    assert re.search("use another checkpoint", refused(code, capsys))

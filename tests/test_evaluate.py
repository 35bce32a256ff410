"""`python -m engine.evaluate`: what it prints, writes and refuses."""

import importlib
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from engine import checkpoint, cli, domain_classifier, evaluate, evaluation, scoring, train
from engine.coefficients import asked_steps

pytest.importorskip("torchmetrics")

RECIPE = {**domain_classifier.RECIPE, "widths": (8, 8, 16), "epochs": 1, "batch": 16}

TRAIN = (
    *("--dataset", "pictures", "--out", "run", "--timesteps", "10", "--steps", "2", "--batch", "4"),
    *("--samples", "0", "--sample-every", "0", "--device", "cpu"),
    *("--no-tensorboard", "--preset", "cifar10"),
)
SMALL = ("--cache", "kept", "--splits", "2", "--device", "cpu", "--steps", "2")


@pytest.fixture
def run(work, monkeypatch, capsys):
    """A trained run, beside 60 pictures of two classes; classifiers train for a moment."""
    rng = np.random.default_rng(1)
    for i in range(36):
        pixels = rng.integers(0, 256, (8, 8)).astype(np.uint8)
        Image.fromarray(pixels).save(work / "pictures" / "ab"[i % 2] / f"more{i}.png")
    monkeypatch.setattr(domain_classifier, "RECIPE", RECIPE)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(work / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "caches"))
    assert train.main([*TRAIN, "--classes"]) == 0
    capsys.readouterr()
    return work / "run"


def test_a_run_is_scored(run, capsys):
    options = ["run", *SMALL, "--n", "24", "--metrics", "fid,kid,is,prc,agreement"]
    assert evaluate.main(options) == 0
    said = capsys.readouterr()
    for fact in (
        *("2 training steps", "sampler: ddim with 2 steps", "seed 0", "samples, n = 24"),
        *("test pictures, n = 6", "against 54 training pictures", "domain classifier of"),
        *("16 features", "2 splits", "k = 3", "100 subsets of 12", "recipe"),
    ):
        assert fact in said.out, (fact, said.out)
    (record,) = json.loads((run / evaluation.FILE).read_text())
    found = record["results"]["samples"]
    assert found["n"] == 24 and found["fid"] > 0 and 1 <= found["is"] <= 2
    for name in ("precision", "recall", "agreement"):
        assert 0 <= found[name] <= 1
    assert record["real"]["count"] == 54 and record["splits"] == 2
    files = sorted(p.name.split("-")[0] for p in (run.parent / "kept").iterdir())
    assert files == ["domain", "statistics", "statistics"]

    assert evaluate.main([*options, "--no-baseline", "--batch", "7", "--precision", "fp32"]) == 0
    assert "once:" not in capsys.readouterr().err
    records = json.loads((run / evaluation.FILE).read_text())
    assert records[0] == record and list(records[1]["results"]) == ["samples"]


def test_heun_and_its_usual_steps(run, capsys):
    options = ["run", *SMALL[:-2], "--n", "8", "--metrics", "prc", "--sampler", "heun"]
    assert evaluate.main([*options, "--no-baseline"]) == 0
    assert "sampler: heun with 10 steps" in capsys.readouterr().out  # of 10
    assert asked_steps(None, "heun", None, 1000) == 18


def test_guidance(run, capsys):
    assert train.main([*TRAIN, "--classes", "--label-dropout", "0.5", "--out", "guided"]) == 0
    folder = run.parent / "guided"
    options = [str(folder), *SMALL, "--n", "8", "--metrics", "agreement", "--no-baseline"]
    assert evaluate.main([*options, "--guidance", "3"]) == 0
    assert "sampler: ddim with 2 steps, guidance 3, " in capsys.readouterr().out
    assert json.loads((folder / evaluation.FILE).read_text())[0]["settings"]["guidance"] == 3

    model, diffusion, _ = checkpoint.load(folder)
    for p in model.parameters():
        p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    drawn = {}
    for scale in (None, 1.0, 0.0, 8.0):
        config = evaluate.EvaluateConfig(folder, n=8, guidance=scale, precision="fp32")
        drawn[scale] = next(scoring.draw(config, model, diffusion, 2, torch.device("cpu"), [0]))
    assert torch.equal(drawn[None], drawn[1.0])
    assert not torch.equal(drawn[0.0], drawn[1.0]) and not torch.equal(drawn[8.0], drawn[1.0])


def test_inception_sees_colour_bytes_and_its_weights_are_named(run, capsys, monkeypatch):
    class Tiny(torch.nn.Module):
        def forward(self, pixels):
            assert pixels.dtype == torch.uint8 and pixels.shape[1:] == (3, 8, 8)
            flat = pixels[:, 1].flatten(1).float()
            return flat[:, :4], flat[:, :6]

    (run.parent / "weights.pth").write_bytes(b"weights")
    monkeypatch.setattr("engine.inception.load", lambda path: Tiny())
    options = ["run", *SMALL, "--n", "24", "--inception-weights", "weights.pth"]
    assert evaluate.main(options) == 0
    assert "features: Inception-v3 (weights.pth, SHA-256 " in capsys.readouterr().out
    found = json.loads((run / evaluation.FILE).read_text())[0]["results"]
    assert found["test pictures"]["n"] == 6 and found["samples"]["fid"] > 0


def test_too_few_pictures_for_the_features_are_told(run, capsys):
    assert evaluate.main(["run", *SMALL, "--n", "16", "--metrics", "fid"]) == 0
    said = capsys.readouterr()
    assert re.search("note: FID: n is 16, not above the 16 features.*use more than 16", said.err)
    assert json.loads((run / evaluation.FILE).read_text())[0]["notes"]


def test_bits_per_dim_is_printed_with_its_parts(run, capsys, monkeypatch):
    from types import SimpleNamespace

    from engine import Diffusion

    def terms(self, model, x0, *, y, **options):
        assert not torch.is_autocast_enabled("cpu")
        assert x0.shape[1:] == (1, 8, 8) and len(y) == len(x0) and -1 <= x0.min() < x0.max() <= 1
        n = torch.arange(len(x0), dtype=torch.float64)
        vb = torch.full((len(x0), 10), 0.25, dtype=torch.float64)
        return SimpleNamespace(total=3 + n, prior=0 * n + 0.5, vb=vb, mse=vb)

    monkeypatch.setattr(Diffusion, "bits_per_dim", terms, raising=False)
    assert evaluate.main(["run", *SMALL, "--metrics", "nll", "--nll-n", "4"]) == 0
    said = capsys.readouterr().out
    error = math.sqrt(5 / 3) / 2
    assert f"4.5000 ± {error:.4f} (standard error) = prior 0.5 + KL terms 2.2500" in said
    assert "decoder 0.2500; T = 10, 4 test pictures, float32, " in said
    assert Image.open(run / "nll.png").size[0] > 100 and not (run.parent / "kept").exists()
    assert "terms over t in nll.png" in said


def test_checkpoints_of_one_folder_have_terms_of_their_own(run, capsys):
    assert train.main(["--resume", "run", "--steps", "6", "--keep-every", "2"]) == 0
    for step in (4, 6):
        file = f"run/checkpoints/step_00000{step}.safetensors"
        assert evaluate.main([file, *SMALL, "--metrics", "nll", "--nll-n", "2"]) == 0
        assert f"terms over t in nll-step_00000{step}.png" in capsys.readouterr().out
    kept = run / "checkpoints"
    four, six = (evaluation.terms_of(kept / f"step_00000{step}.safetensors") for step in (4, 6))
    assert four["vb"] != six["vb"] and (kept / "nll-step_000004.png").is_file()
    records = json.loads((kept / evaluation.FILE).read_text())
    assert [r["nll"]["terms"] for r in records] == [four, six]
    with pytest.raises(ValueError, match="run has no bits/dim yet"):
        evaluation.terms_of(run)


def test_bad_input_is_one_sentence_and_writes_nothing(run, capsys):
    work = run.parent
    before = {p: p.stat().st_mtime_ns for p in work.rglob("*")}
    for args, sentence in (
        (["nowhere"], "no checkpoint at nowhere"),
        (["pictures"], "has no checkpoint"),
        (
            ["run", "--metrics", "fod"],
            "--metrics 'fod' is unknown: choose of fid.*did you mean fid",
        ),
        (["run", "--metrics", "fid,"], "--metrics '' is unknown"),
        (["run", "--n", "1"], "--n must be at least 2"),
        (["run", "--n", "3", "--metrics", "prc"], "--n 3 leaves no 3 neighbours"),
        (["run", "--n", "5", "--splits", "4", "--metrics", "is"], "does not make 4 splits"),
        (["run", "--n", "9", "--kid-subset-size", "10"], "less than --kid-subset-size 10"),
        (["run", "--steps", "11"], "more than the 10"),
        (
            ["run", "--steps", "2,2", "--sampler", "heun"],
            "karras spacing, heun's own, takes a number",
        ),
        (["run", "--steps", "2,9"], "--steps '2,9': section 2 of 2 has 5 of the T=10 steps"),
        (["run", "--eta", "1", "--sampler", "ddpm"], "goes with --sampler ddim only"),
        (["run", "--guidance", "inf"], "--guidance must be a finite number, not inf"),
        (["run", "--guidance", "2", "--metrics", "nll"], "--guidance guides samples, of which nll"),
        (["run", "--guidance", "2"], "--guidance 2.0 needs a model.*--classes and --label-dropout"),
        (["run", "--features", "inception"], "no Inception weights in .*nothing is downloaded"),
        (["run", "--inception-weights", "gone.pth"], "no Inception weights at gone.pth"),
        (["run", "--metrics", "agreement", "--features", "inception"], "needs --features domain"),
        (["run", "--dataset", "moved"], "there is no such folder|could not|unknown"),
        (["run", "--cache", "pictures/b/1.png"], "--cache: cannot write .*it is a file"),
        (["run", "--splits", "4", "--n", "60"], "6 test pictures do not make 4 splits: use fewer"),
        (["run", "--neighbours", "7", "--metrics", "prc"], "54 training and 6 test.*too few for"),
        (
            ["run", "--dataset", "pictures/a", "--metrics", "nll"],
            "a has the classes .none., but the run was trained with a, b",
        ),
        (["run", "--device", "toaster"], "'toaster' is no device"),
    ):
        code = evaluate.main([*SMALL[2:], *args])
        said = capsys.readouterr()
        assert code == 2 and said.out == "" and said.err.count("\n") == 1, (args, said.err)
        assert re.search(sentence, said.err), (sentence, said.err)
    after = {p: p.stat().st_mtime_ns for p in work.rglob("*")}
    assert set(after) == set(before)
    (run / evaluation.FILE).write_text("{}")
    assert evaluate.main(["run", *SMALL]) == 2
    assert "is not what engine.evaluate writes: move it away" in capsys.readouterr().err


def test_pictures_without_labels(work, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(work / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "caches"))
    for file in list((work / "pictures").rglob("*.png")):
        file.rename(work / "pictures" / file.name)
    assert train.main(TRAIN) == 0
    capsys.readouterr()
    for args, sentence in (
        ([], "no Inception weights in"),
        (["--features", "domain"], "has no labels to train a domain classifier on"),
        (["--metrics", "agreement"], "needs a class-conditional model"),
    ):
        assert evaluate.main(["run", *SMALL, "--no-baseline", *args]) == 2
        assert re.search(sentence, capsys.readouterr().err)
        assert not (work / "kept").exists()
    assert evaluate.main(["run", *SMALL]) == 2
    assert "22 training and 2 test pictures, too few for" in capsys.readouterr().err
    for file in list((work / "pictures").glob("*.png"))[12:]:
        file.unlink()
    assert evaluate.main(["run", *SMALL]) == 2
    assert "has 12 pictures: 20 are the least" in capsys.readouterr().err
    assert checkpoint.read("run")[1]["step"] == 2


def test_help_teaches_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main(["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "None" not in said
    for name in set(evaluate.EvaluateConfig.__dataclass_fields__) - {"run"}:
        assert cli.option(name)[1:] in said, name


def test_without_torchmetrics_one_sentence(run, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("torchmetrics")
    assert evaluate.main(["run", *SMALL, "--n", "20"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "pip install torchmetrics" in said

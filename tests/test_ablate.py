"""The ablation study: its grid, what a kill leaves, its statistics, its words."""

import csv
import gzip
import importlib
import io
import itertools
import json
import re
import struct

import numpy as np
import pytest
import torch

from engine import (
    ablate,
    ablation,
    ablation_report,
    checkpoint,
    cli,
    data,
    run_lock,
    schedules,
    train,
    trainer,
)
from engine.diffusion import Diffusion

TINY = dict(
    *({"image_size": 28, "in_channels": 1, "model_channels": 4, "channel_mult": (1, 1, 1)},),
    num_res_blocks=1,
    num_groups=2,
)


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Options of a small study: 12 random pictures, a tiny U-Net, 2 steps of 4 pictures."""
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        for kind, array in (
            ("images-idx3", rng.integers(0, 256, (12, 28, 28))),
            ("labels-idx1", np.arange(12) % 10),
        ):
            header = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
            file = tmp_path / f"{part}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))
    for name, protocol in list(ablation.PROTOCOLS.items()):
        monkeypatch.setitem(
            ablation.PROTOCOLS,
            name,
            ablation.dataclasses.replace(
                protocol,
                model=TINY,
                train=protocol.train | {"batch": 4, "steps": 2},
                n=5,
                sample_steps="1,3",
            ),
        )
    monkeypatch.setattr(ablation, "BATCH", 3)

    def options(**more):
        usual = {"schedules": "linear_unscaled,cosine", "losses": "l2", "device": "cpu"}
        return ablate.AblateConfig(out=tmp_path / "out", data_dir=tmp_path, **usual | more)

    return options


def scorer(pixels):
    """Stands in for the domain classifier."""
    assert pixels.dtype == torch.uint8 and pixels.shape == (5, 1, 28, 28)
    x = pixels.double()
    return {
        "is": {"value": 1 + float(x.mean()) / 255, "error": 0.1},
        "fid": {"value": float(x.std()), "error": 2.0},
    }


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_study_and_its_files(study, capsys):
    table = ablate.ablate(study(), scorer)
    text = table.read_text()
    assert "| linear_unscaled | l2 | 1." in text and "| cosine | l2 | 1." in text
    assert "Protocol `small`" in text and "5 samples" in text and "bootstrap" in text
    process = Diffusion(schedules.betas("cosine", 1000))
    factor = (process.alpha_bar[750] / process.alpha_bar[999]) ** 0.5
    assert f"cosine: the first reverse step multiplies by 1/√α = {factor:.3g}." in text
    assert "cosine's IS beside the mean of the other schedules" in text
    found = list(csv.DictReader(io.StringIO(table.with_suffix(".csv").read_text())))
    assert [(r["schedule"], r["clip"]) for r in found] == list(
        itertools.product(("linear_unscaled", "cosine"), ("True", "False"))
    )
    whole = json.loads(table.with_suffix(".json").read_text())
    assert len(whole["records"]) == 4 and whole["settings"]["scorer"] == "scorer"
    assert table.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    for record in whole["records"]:
        trace = record["trace"]
        assert trace["t"][0] == 999 and trace["t"][-1] == 0
        assert {len(v) for v in trace.values() if isinstance(v, list)} == {len(trace["t"])}
        assert trace["rms_x"][0] == pytest.approx(1, abs=0.05)  # pure noise
        assert record["clip"] is (record["final"]["outside"] == 0)
    assert not [f for f in files(table.parent) if "tmp" in f]
    model, _, info = checkpoint.load(table.parent / "cells" / "cosine-l2-seed0")
    assert info["train"]["schedule"] == "cosine" and model.config["model_channels"] == 4
    assert "2/2 cosine-l2-seed0: IS 1." in capsys.readouterr().out


def test_what_is_done_is_not_done_again(study, monkeypatch):
    """Killed between two records, and in training: the rest is done, to the same figures."""
    whole = ablate.ablate(study(), scorer).read_text()
    folder = study().out

    def never(*args, **kwargs):
        raise AssertionError("done again")

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "run", never)
        patch.setattr(ablation, "sample", never)
        assert ablate.ablate(study(), scorer).read_text() == whole
        assert len(ablate.ablate(study(losses="l2", clip="on"), scorer).read_text()) < len(whole)

    (folder / "cells" / "cosine-l2-seed0" / "no-clip.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "run", never)
        assert ablate.ablate(study(), scorer).read_text() == whole

    cell = folder / "cells" / "cosine-l2-seed0"
    for file in cell.iterdir():
        file.unlink()
    step = trainer.Trainer.train_step

    def interrupted(self, x, y):
        row = step(self, x, y)
        trainer.signal.raise_signal(trainer.signal.SIGINT)
        return row

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", interrupted)
        with pytest.raises(trainer.Stopped, match="step 1 of 2 of cosine-l2-seed0: the same com"):
            ablate.ablate(study(), scorer)
    assert checkpoint.read(cell)[1]["step"] == 1 and not (cell / "clip.json").exists()
    assert ablate.ablate(study(), scorer).read_text() == whole


def test_a_study_or_cell_in_use_is_refused(study):
    cell = study().out / "cells" / "cosine-l2-seed0"
    cell.mkdir(parents=True)
    for folder in (study().out, cell):
        with run_lock.held(folder), pytest.raises(ValueError, match="in use by another run, proc"):
            ablate.ablate(study(schedules="cosine", losses="l2"), scorer)
        assert not list(cell.iterdir())


def test_records_of_other_settings_are_refused(study):
    ablate.ablate(study(clip="on"), scorer)
    for more, sentence in (
        ({"n": 6}, "was made with about .* not .*; but --n 6: give the options of then, or"),
        ({"steps": 3}, "but --steps 3: give the options"),
        ({"protocol": "slides"}, "was made with name small, not slides"),
    ):
        with pytest.raises(ValueError, match=sentence):
            ablate.ablate(study(clip="on", **more), scorer)
    record = study().out / "cells" / "cosine-l2-seed0" / "clip.json"
    record.unlink()
    with pytest.raises(ValueError, match="--lr cannot change on --resume"):
        ablate.ablate(study(schedules="cosine", protocol="slides", clip="on"), scorer)
    record.write_text("{")
    with pytest.raises(ValueError, match=r"clip\.json is no record of an ablation: move it"):
        ablate.ablate(study(schedules="cosine", clip="on"), scorer)


def test_dry_run_writes_nothing_and_knows_what_is_left(study, capsys):
    config = study(dry_run=True, seeds=2, losses="l1,huber")
    assert ablate.ablate(config, scorer) is None
    said = capsys.readouterr().out
    assert said.count("step 0 of 2, 2 of 2 to sample") == 8 and "8 cells" in said
    assert re.search(r"about \d+ minutes left: 16 steps of", said) and not config.out.exists()
    ablate.ablate(study(losses="l1"), scorer)
    capsys.readouterr()
    ablate.ablate(config, scorer)
    said = capsys.readouterr().out
    assert said.count("done") == 2 and ": 12 steps of" in said


def test_slides_train_on_pictures_between_0_and_1(study, monkeypatch, capsys):
    seen = []
    step = trainer.Trainer.train_step

    def spy(self, x, y):
        seen.append((x.min().item(), x.max().item()))
        return step(self, x, y)

    monkeypatch.setattr(trainer.Trainer, "train_step", spy)
    table = ablate.ablate(study(protocol="slides", schedules="quadratic", clip="off"), scorer)
    assert len(seen) == 2 and all(0 <= low < 0.05 and 0.95 < high <= 1 for low, high in seen)
    cell = table.parent / "cells" / "quadratic-l2-seed0"
    tensors, info = checkpoint.read(cell)
    assert info["train"]["ema"] == 0 and info["diffusion"]["variance"] == "small"
    assert all(
        torch.equal(v, tensors[k.replace("ema.", "model.")])
        for k, v in tensors.items()
        if k[:4] == "ema."
    )
    assert "linear" not in table.read_text()
    capsys.readouterr()
    # They would clip and draw in [−1, 1].
    for name, more in (("sample", ()), ("evaluate", ("--metrics", "nll"))):
        command = importlib.import_module(f"engine.{name}").command
        assert cli.main(command, [str(cell), *more]) == 2
        assert "was trained on pictures in [0, 1]" in capsys.readouterr().err
    assert train.main(["--resume", str(cell), "--steps", "3"]) == 2
    assert "trained on pictures in [0, 1]" in capsys.readouterr().err


def test_published_protocols_build(monkeypatch):
    for protocol in ablation.PROTOCOLS.values():
        with torch.device("meta"):
            model = ablation.UNet(**protocol.model)
        assert model.config["image_size"] == 28
        steps = schedules.kept_steps(1000, protocol.sample_steps)
        assert steps[0] == 0 and steps[-20:] == list(range(980, 1000))
        process = Diffusion(schedules.betas("cosine", 1000)).respaced(protocol.sample_steps)
        assert (1 - process.betas[-1]) ** -0.5 == pytest.approx(1000**0.5)  # as all steps would
        config = ablation.train.TrainConfig(**protocol.train)
        ablation.train.validate(config)


def test_the_trace_is_of_this_reverse_process():
    """With a network that always says ε = x, x̂_0 = x (1 − √(1−ᾱ))/√ᾱ is known."""
    process = Diffusion(schedules.betas("cosine", 1000))
    watch = ablation.Watch(lambda x, t: x, process, -1.0)
    x = torch.linspace(-2, 2, 40).view(2, 1, 4, 5)
    watch(x, torch.tensor([500, 500]))
    a = process.alpha_bar[500]
    x0 = x.double() * (1 - (1 - a).sqrt()) / a.sqrt()
    expected = [500, 2, (x**2).mean(), x0.abs().max(), ((x0 < -1) | (x0 > 1)).double().mean()]
    assert watch.rows[0].tolist() == pytest.approx([float(v) for v in expected], rel=1e-5)


@pytest.mark.parametrize("unit", [False, True])
def test_pixels_and_what_lies_outside(unit):
    low = 0.0 if unit else -1.0
    values = torch.tensor([low, 1.0, (low + 1) / 2, 1.5, low - 1, 1 + 1e-4, 0.9, float("nan")])
    found = ablation.pixel_statistics(values, unit)
    assert found["outside"] == 3 / 8 and found["saturated"] == 6 / 8
    pixels = ablation.to_pixels(values, unit)
    assert pixels[:5].tolist() == [0, 255, 128, 255, 0]
    again = pixels.float() / 255 if unit else pixels.float() / 127.5 - 1
    assert torch.equal(ablation.to_pixels(again, unit), pixels)


def test_student_and_intervals():
    for freedom, t in ((1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (1000, 1.96234)):
        assert ablation_report.student(0.95, freedom) == pytest.approx(t, rel=1e-4)
    mean, half = ablation_report.interval([1.0, 2.0, 3.0], [None] * 3)
    assert (mean, half) == (2.0, pytest.approx(4.30265 / 3**0.5, rel=1e-4))
    assert ablation_report.interval([3.0], [0.5]) == (3.0, pytest.approx(0.98))
    assert ablation_report.interval([3.0], [None]) == (3.0, None)


def test_the_table_says_which_interval(study):
    text = ablate.ablate(study(seeds=2, schedules="cosine"), scorer).read_text()
    assert "95 % interval over 2 seeds (Student's t)" in text and "±" in text
    assert "beside the mean" not in text  # no other schedule
    first, _ = csv.DictReader(io.StringIO((study().out / "ablation.csv").read_text()))
    assert (first["seeds"], first["n"], first["interval"]) == ("2", "5", "student")
    records = json.loads((study().out / "ablation.json").read_text())["records"]
    scores = [r["scores"]["is"]["value"] for r in records if r["clip"]]
    assert float(first["is"]) == pytest.approx(sum(scores) / 2, rel=1e-5)
    half = 12.7062 * abs(scores[0] - scores[1]) / 2  # t₁ s/√2 with s = |a − b|/√2
    assert float(first["is_half"]) == pytest.approx(half, rel=1e-3)


def test_the_explanation_compares_what_was_measured():
    """Cosine at 2.0 (seeds 1.5, 2.5) unclipped and 4.0 clipped; the other one at 4.0 and 4.2."""

    def record(schedule, seed, clip, score, factor, rms):
        trace = {"t": [999, 998], "rms_x": [1.0, rms], "rms_forward": [1.0, 1.0]}
        trace |= {"outside_x0": [0.9, 0.5], "first_factor": factor, "highest_x": 10 * rms}
        return {
            "schedule": schedule,
            "loss": "l2",
            "seed": seed,
            "clip": clip,
            "scores": {"is": {"value": score, "error": 0.1}},
            "final": {"max": 1.0, "outside": 0.0 if clip else 0.25, "saturated": 0.4},
            "trace": trace,
        }

    records = [
        *(record("sigmoid", i, clip, 4.2 if clip else 4.0, 1.01, 1.0) for i, clip in WAYS),
        *(record("cosine", i, clip, 4.0 if clip else 1.5 + i, 31.6, 1 + i) for i, clip in WAYS),
    ]
    sigmoid, cosine, verdict = ablation_report.explanation(records)
    assert "1/√α = 1.01" in sigmoid and "1/√α = 31.6" in cosine
    assert "rms 1.5 not clipped, 1.5 x̂₀ clipped; the forward process has 1" in cosine
    assert "Largest |x| on the way: 20 not clipped" in cosine
    assert "of the samples: 25.0% not clipped, 0.0% x̂₀ clipped" in cosine
    assert "2.00 against 4.00 not clipped, 4.00 against 4.20 x̂₀ clipped" in verdict
    assert "from -2.00 to -0.20" in verdict
    only = [r for r in records if r["clip"]]
    assert len(ablation_report.explanation(only)) == 2  # nothing to compare


WAYS = list(itertools.product((0, 1), (True, False)))


@pytest.mark.parametrize(
    "more, sentence",
    [
        ({"schedules": "cosine,sigmoyd"}, "'sigmoyd' is unknown.*did you mean sigmoid"),
        ({"losses": "vlb"}, "--losses 'vlb' is unknown: choose of l1, l2, huber"),
        ({"seeds": 0}, "--seeds must be at least 1, not 0"),
        ({"n": 1}, "--n must be at least 4"),
        ({"sample_steps": "2000"}, "2000 shall be kept"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(study, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        ablate.ablate(study(**more), scorer)
    assert not study().out.exists()


def test_help_and_wrong_options(capsys):
    with pytest.raises(SystemExit):
        ablate.main(["--help"])
    said = capsys.readouterr().out
    for name in ablate.AblateConfig.__dataclass_fields__:
        assert cli.option(name) in said
    assert ablate.main(["--schedules", "cosin"]) == 2
    assert "did you mean cosine?" in capsys.readouterr().err


def test_batches_between_0_and_1():
    pixels = torch.arange(256, dtype=torch.uint8).view(16, 1, 4, 4)
    images = data.Images("ramp", 16, 1, 4, pixels=pixels, unit=True)
    x, _ = data.batch(images, 0, 16, seed=0)
    expected = pixels[data.order(16, 0, 0, 16)].double() / 255
    assert (x - expected).abs().max() < 2e-7

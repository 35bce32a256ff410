"""Pictures are what they should be, and whole or not there."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from engine import curves, plots, schedules, train


def test_grid_places_every_image(tmp_path):
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 4, 4)
    path = plots.grid(images, tmp_path / "new" / "grid.png", scale=1)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (2 * 5 + 1, 3 * 5 + 1)
    centres = [sheet[2 + 5 * (i // 3), 2 + 5 * (i % 3)] for i in range(5)]
    assert centres == [0, 64, 128, 191, 255]
    assert [f.name for f in path.parent.iterdir()] == ["grid.png"]


def test_colours_out_of_range_values_and_nan(tmp_path):
    images = torch.tensor([9.0, -9.0, float("nan")]).view(1, 3, 1, 1).bfloat16()
    pixel = np.asarray(Image.open(plots.grid(images, tmp_path / "a.png", scale=1)))[1, 1]
    assert pixel.tolist() == [255, 0, 0]


def test_strip_has_a_row_per_image_and_a_column_per_state(tmp_path):
    states = [torch.full((2, 1, 4, 4), value) for value in (-1.0, 0.0, 1.0)]
    sheet = np.asarray(Image.open(plots.strip(states, tmp_path / "strip.png", scale=1)))
    assert sheet.shape == (11, 16)
    assert sheet[2, 2::5].tolist() == sheet[7, 2::5].tolist() == [0, 128, 255]


def test_wrong_shapes(tmp_path):
    for shape in ((3, 4, 4), (1, 2, 4, 4), (0, 1, 4, 4)):
        with pytest.raises(ValueError, match="a grid needs images"):
            plots.grid(torch.zeros(shape), tmp_path / "a.png")
    with pytest.raises(ValueError, match="at least one state"):
        plots.strip([], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_loss_curve_leaves_out_skipped_steps_and_a_cut_line(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: drawn.append(a) or plot(self, *a, **k))
    rows = [{"step": i, "loss": 1 / i if i != 3 else None} for i in range(1, 9)]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9, "lo')
    path = plots.loss_curve(tmp_path)
    assert path == tmp_path / "loss.png" and Image.open(path).size[0] > 100
    steps = [1, 2, 4, 5, 6, 7, 8]
    (x, loss), (x_smooth, smooth) = drawn
    assert x == x_smooth == steps and loss == [1 / i for i in steps]
    assert smooth[0] == pytest.approx(1) and smooth[1] == pytest.approx((0.95 + 0.5) / 1.95)
    assert {f.name for f in tmp_path.iterdir()} == {"loss.png", "metrics.jsonl"}


def test_loss_curve_of_a_run_without_a_row(tmp_path):
    assert Image.open(plots.loss_curve(tmp_path, tmp_path / "none.png")).size[0] > 100


def test_a_failure_leaves_the_old_picture(tmp_path, monkeypatch):
    path = plots.grid(torch.zeros(1, 1, 4, 4), tmp_path / "a.png")
    before = path.read_bytes()
    monkeypatch.setattr("PIL.Image.Image.save", lambda _, file, **__: file.write_bytes(b"x") / 0)
    with pytest.raises(ZeroDivisionError):
        plots.grid(torch.ones(1, 1, 4, 4), path)
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["a.png"]


# --- schedules, forward and reverse process, films, bounds --------------------------------------


@pytest.fixture
def drawn(monkeypatch):
    """Every curve that matplotlib is given: (label, x, y)."""
    from matplotlib.axes import Axes

    curves, plot = [], Axes.plot

    def spy(self, *args, **options):
        lines = plot(self, *args, **options)
        curves.extend((options.get("label"), *line.get_data()) for line in lines)
        return lines

    monkeypatch.setattr(Axes, "plot", spy)
    return curves


def test_schedule_curves_are_the_tables(tmp_path, drawn):
    path = plots.schedule_curves(tmp_path / "s.png")
    assert path.stat().st_size < 150_000 and Image.open(path).size[0] > 1000
    assert len(drawn) == 3 * len(schedules.NAMES)
    curves = {}
    for name, _, y in drawn:
        curves.setdefault(name, []).append(np.asarray(y))
    alpha_bar, snr, beta = curves["cosine"]
    assert alpha_bar[499] == pytest.approx(0.4938435904, rel=1e-9)
    assert snr[499] == pytest.approx(0.4938435904 / (1 - 0.4938435904), rel=1e-8)
    assert beta[999] == 0.999
    assert curves["linear"][0][999] == pytest.approx(4.035829765e-5, rel=1e-9)


def test_forward_strips_end_in_the_same_noise(tmp_path, monkeypatch):
    sheets, sheet = [], curves.sheet
    monkeypatch.setattr(curves, "sheet", lambda x, **k: sheets.append(x) or sheet(x, **k))
    image = torch.linspace(-1, 1, 64).view(1, 8, 8)
    path = plots.forward_strips(image, tmp_path / "f.png", states=5)
    assert Image.open(path).size[0] > 300 and len(sheets) == len(schedules.NAMES)
    for x in sheets:
        assert x.shape == (5, 1, 8, 8)
        assert (x[0] - image).abs().max() < 0.1  # ᾱ_0 ≈ 1
    linear, cosine = (sheets[schedules.NAMES.index(name)] for name in ("linear", "cosine"))
    assert (linear[-1] - cosine[-1]).abs().max() < 0.01
    assert (linear[2] - cosine[2]).abs().max() > 0.1
    with pytest.raises(ValueError, match="at least 2"):
        plots.forward_strips(image, tmp_path / "g.png", states=1)


def test_film_shows_every_state_and_stays_at_the_last(tmp_path):
    states = [torch.full((2, 1, 4, 4), value) for value in (-1.0, 0.0, 1.0)]
    path = plots.film(states, tmp_path / "a.gif", seconds=3, scale=1)
    shown, length = [], []
    with Image.open(path) as gif:
        assert gif.info["loop"] == 0
        for i in range(gif.n_frames):
            gif.seek(i)
            shown.append(np.asarray(gif.convert("L"))[2, [2, 7]].tolist())
            length.append(gif.info["duration"])
    assert shown == [[0, 0], [128, 128], [255, 255]] and length == [1000, 1000, 2000]
    with pytest.raises(ValueError, match="at least one state"):
        plots.film([], path)


def run_plots(capsys, *args: str) -> str:
    assert plots.main(args) == 0
    return capsys.readouterr().out.strip()


TINY = (
    *("--dataset", "pictures", "--out", "run", "--timesteps", "10", "--steps", "2", "--batch", "4"),
    *("--samples", "0", "--sample-every", "0", "--device", "cpu", "--preset", "cifar10"),
    "--no-tensorboard",
)


def test_commands_draw(work, capsys, drawn):
    assert train.main([*TINY]) == 0
    (work / "run" / "evaluation.json").write_text(
        json.dumps(
            [
                {"nll": {"terms": {"vb": [9.0], "mse": [9.0]}}},
                {"nll": {"terms": {"vb": [2.0, 1.0, 0.5], "mse": [0.0, 0.1, 0.2]}}},
                {"results": {}},
            ]
        )
    )
    capsys.readouterr()
    assert run_plots(capsys, "schedules", "--timesteps", "50") == "schedules.png"
    assert run_plots(capsys, "forward", "--dataset", "pictures", "--size", "8") == "forward.png"
    options = ("--steps", "6", "--n", "3", "--device", "cpu")
    said = run_plots(capsys, "reverse", "run", "--out", "new/r.png", *options, "--states", "4")
    assert said == "new/r.png" and Image.open(work / said).size == (2 * 37, 2 * 28)
    assert run_plots(capsys, "gif", "run", *options, "--states", "7") == "reverse.gif"
    assert Image.open(work / "reverse.gif").n_frames == 7
    assert run_plots(capsys, "gif", "run", "--sampler", "heun", *options[2:]) == "reverse.gif"
    heun = plots.Gif(work / "run", sampler="heun", n=1, device="cpu")
    assert len(heun.trajectory()()) == 11  # of the 50: x_T, and one a step of all 10
    del drawn[:]
    assert run_plots(capsys, "vlb", "run") == "vlb.png"
    (label, x, y), (_, _, mse) = drawn
    assert (
        label == "run: 3.500 bits/dim and the prior's"
        and list(x) == [1, 2, 3]
        and list(y) == [2, 1, 0.5]
    )
    assert list(mse) == [1e-12, 0.1, 0.2]


def test_bad_input_is_one_sentence_and_draws_nothing(work, capsys):
    assert train.main([*TINY]) == 0
    (work / "other").mkdir()
    (work / "other" / "evaluation.json").write_text('{"nll": 3}')
    capsys.readouterr()
    before = set(work.rglob("*"))
    for args, sentence in (
        ([], "the command is missing: choose one of schedules, forward"),
        (["scedules"], r"'scedules' is unknown .did you mean schedules\?.: choose one of"),
        (["schedules", "--timesteps", "1"], "--timesteps must be at least 2, not 1"),
        (["schedules", "--timesteps", "15"], "linear needs T > 20"),
        (["schedules", "--out", "a.jpg"], "give the name of a .png file"),
        (["gif", "run", "--out", "a.png"], "give the name of a .gif file"),
        (["gif", "run", "--seconds", "0"], "--seconds must lie in"),
        (["reverse", "rnu"], r"no such file or folder .did you mean run\?"),
        (["reverse", "run", "--states", "1"], "--states must be at least 2"),
        (["reverse", "run", "--n", "0"], "--n must be at least 1"),
        (["reverse", "run", "--steps", "0"], "--steps must be at least 1"),
        (["reverse", "run", "--steps", "11"], "--steps 11 is more than the 10 steps that"),
        (["gif", "run", "--seed", str(2**63)], "--seed must fit 64 bits"),
        (["forward", "--dataset", "pictures", "--index", "24"], "--index 24 must lie in 0 … 23"),
        (["forward", "--states", "1"], "--states must be at least 2"),
        (["vlb", "run"], "has no bits/dim yet: run python -m engine.evaluate run --metrics nll"),
        (["vlb", "rnu"], r"has no bits/dim yet .did you mean run\?.: run"),
        (["vlb", "other"], "is not what engine.evaluate writes"),
    ):
        place = ("--out", "new/x.gif" if args[:1] == ["gif"] else "new/x.png")
        code = plots.main([*args[:1], *(place if len(args) > 1 else ()), *args[1:]])
        said = capsys.readouterr()
        assert code == 2 and said.out == "" and said.err.count("\n") == 1, (args, said.err)
        assert re.search(sentence, said.err), (sentence, said.err)
    assert set(work.rglob("*")) == before


@pytest.mark.parametrize("name", plots.COMMANDS)
def test_help_teaches_every_option(name, capsys):
    with pytest.raises(SystemExit) as end:
        plots.main([name, "--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0 and "None" not in said and f"engine.plots {name}" in said
    for option in set(plots.COMMANDS[name].__dataclass_fields__) - {"run", "runs"}:
        assert f"--{option.replace('_', '-')}" in said, option
    with pytest.raises(SystemExit) as end:
        plots.main(["--help"])
    assert end.value.code == 0 and name in capsys.readouterr().out


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, engine.plots as p\n"
        "try: p.main(['gif', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    root = os.path.dirname(os.path.dirname(plots.__file__))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])},
    )
    assert done.stdout.rstrip().endswith("False"), done.stdout + done.stderr

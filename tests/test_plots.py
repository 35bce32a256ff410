"""Pictures are what they should be, and whole or not there."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from engine import plots


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

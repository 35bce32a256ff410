"""A disk that refuses: training goes on, says so once, and what it must have is whole."""

import errno
import json
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from engine import data, decoded, metrics, output, pictures, plots, train
from engine.checkpoint import FILE, read

ARGS = {"dataset": "pictures", "preset": "cifar10", "batch": 4, "save-every": 100, "log-every": 1}
ARGS |= {"sample-every": 2, "samples": 0, "device": "cpu", "sample-steps": 2, "timesteps": 20}


def trained(run: str, steps: int, *flags: str, **changed) -> int:
    """Exit code of a run of a few steps."""
    given = (
        ARGS | {"out": run, "steps": steps} | {k.replace("_", "-"): v for k, v in changed.items()}
    )
    return train.main([*(w for k, v in given.items() for w in (f"--{k}", str(v))), *flags])


def resumed(run: str, steps: int, *flags: str) -> int:
    return train.main(["--resume", run, "--steps", str(steps), *flags])


def full(*args, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def rows(run) -> list[int]:
    return [row["step"] for row in metrics.read_metrics(run)]


def test_a_row_that_fails_is_a_row_less(tmp_path, monkeypatch, capsys):
    """Cut short by a full disk, a line ends there; the next ones are whole, and all is read."""
    path, line = tmp_path / "metrics.jsonl", '{"step": %d, "loss": 1.0}\n'
    with metrics.Log(tmp_path, 0, False) as log:
        for step in (1, 2):
            log.write(step, {"loss": 1.0})
        real = log.metrics.file

        class Full:
            room = 9

            def write(self, data):
                if not self.room:
                    full()
                written, self.room = real.write(data[: self.room]), 0
                return written

        log.metrics.file = Full()
        for step in (3, 4):
            log.write(step, {"loss": 1.0})
        log.metrics.file = real
        log.write(5, {"loss": float("nan")})
    assert path.read_text() == line % 1 + line % 2 + '{"step": \n{"step": 5, "loss": null}\n'
    assert rows(tmp_path) == [1, 2, 5]
    said = capsys.readouterr().err
    assert said == "metrics.jsonl cannot be written (No space left on device); training goes on\n"
    with metrics.Log(tmp_path, 2, False) as log:
        log.write(3, {"loss": 1.0})
    assert rows(tmp_path) == [1, 2, 3]


def test_a_disk_that_is_full(tmp_path, capsys):
    """The system's own: every write to /dev/full fails."""
    with metrics.Log(tmp_path, 0, False) as log:
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        for step in range(3):
            log.write(step, {"loss": 1.0})
    said = capsys.readouterr().err
    assert said == "metrics.jsonl cannot be written (No space left on device); training goes on\n"


@pytest.mark.parametrize("place", ["thread", "folder"])
def test_training_goes_on_without_log_and_grids(work, monkeypatch, capsys, place):
    """Every place beside the checkpoint's refuses; the weights are those of a run that could."""
    pytest.importorskip("tensorboard")
    assert trained("whole", 6, "--no-tensorboard") == 0
    capsys.readouterr()
    board, grid = output.board, plots.grid

    def refusing(folder, step):
        if place == "folder":
            folder.write_text("no folder")
        made = board(folder, step)
        made.file_writer.event_writer._async_writer._writer.write = full  # in its thread
        return made

    def blocked(images, path):
        if not path.parent.exists():
            path.parent.write_text("no folder")
        return grid(images, path)

    monkeypatch.setattr(plots, "grid", blocked)
    monkeypatch.setattr(output, "board", refusing)
    monkeypatch.setattr(output.Lines, "write", full)
    before = threading.excepthook
    try:
        assert trained("run", 6) == 0
    finally:
        threading.excepthook = before
    said = capsys.readouterr().err
    for what in ("metrics.jsonl", "the TensorBoard log", "grids of samples"):
        assert said.count(f"{what} cannot be written (") == 1, said
    assert "Traceback" not in said
    (whole, _), (other, info) = read(work / "whole" / FILE), read(work / "run" / FILE)
    assert info["step"] == 6 and all(torch.equal(whole[k], other[k]) for k in whole)


def test_the_final_pictures_fail_with_a_sentence_when_all_is_saved(work, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr("PIL.Image.Image.save", full)
        assert trained("a", 4, "--no-tensorboard", samples=4, sample_every=0) == 2
    assert "error: a/samples.png: No space left on device" in capsys.readouterr().err
    assert not list((work / "a").glob("*.tmp")) and rows("a") == [1, 2, 3, 4]
    assert read(work / "a" / FILE)[1]["step"] == 4
    assert resumed("a", 4) == 0 and (work / "a" / "samples.png").exists()


def test_half_a_picture_never_has_the_name_of_a_whole_one(tmp_path):
    path = tmp_path / "a.png"
    pictures.grid(torch.zeros(1, 1, 4, 4), path)
    before = path.read_bytes()
    with pytest.raises(OSError, match="No space") as error, pictures.atomic(path) as temporary:
        temporary.write_bytes(b"half")
        full()
    assert error.value.filename == str(path) and path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]


def test_resume_knows_the_pictures_again(work, capsys):
    """More, others, moved, renamed; allowed, the run goes on and knows the new ones."""
    assert trained("run", 2, "--no-tensorboard", sample_every=0) == 0
    info = read(work / "run" / FILE)[1]
    assert info["pictures"]["count"] == 24 and len(info["pictures"]["digest"]) >= 16
    new = work / "pictures" / "a" / "new.png"
    Image.new("L", (8, 8)).save(new)
    before = (work / "run" / FILE).read_bytes()
    capsys.readouterr()
    assert resumed("run", 3) == 2
    said = capsys.readouterr().err
    assert "has 25 pictures, but the run has seen 24" in said and "--changed-pictures" in said
    assert (work / "run" / FILE).read_bytes() == before
    new.unlink()
    (work / "pictures").rename(work / "moved")  # the same pictures elsewhere are the same
    assert resumed("run", 3, "--dataset", "moved") == 0
    (work / "moved" / "a" / "0.png").rename(new := work / "moved" / "b" / "00.png")
    capsys.readouterr()
    assert resumed("run", 4) == 2
    assert "as many pictures as it had, 24, but not the same" in capsys.readouterr().err
    assert resumed("run", 4, "--changed-pictures") == 0
    assert "from here on the run is another one" in capsys.readouterr().err
    assert resumed("run", 5) == 0  # these are now the run's
    new.rename(work / "moved" / "a" / "0.png")
    assert resumed("run", 6) == 2  # what was allowed once is not for ever


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """Opens a folder of eight pictures, one broken, through a cache."""
    monkeypatch.setattr(decoded, "SMALLEST", 0)
    monkeypatch.setattr(decoded, "PART", 64)
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "pictures" / "3.png").write_bytes(b"x")
    return lambda: data.open_dataset(tmp_path / "pictures", size=8, cache=tmp_path / "cache")


def test_a_flipped_bit_in_the_cache_is_noticed(entry, tmp_path):
    expected = entry().pixels.clone()
    (pixels,) = tmp_path.glob("cache/*/pixels.u8")
    for at in (0, 63, 64, 447):
        raw = bytearray(pixels.read_bytes())
        raw[at] ^= 1
        pixels.write_bytes(raw)
        assert torch.equal(entry().pixels, expected)
    assert pixels.read_bytes() == expected.numpy().tobytes()


def test_the_cache_leaves_room_for_checkpoints(entry, tmp_path, monkeypatch, capsys):
    free = (0, 0, decoded.SPARE + 8 * 64 - 1)
    monkeypatch.setattr(decoded.shutil, "disk_usage", lambda path: free)
    assert len(entry()) == 7
    said = capsys.readouterr().err
    assert "decoded pictures are not kept in" in said and "1024 MiB that stay free" in said
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(decoded.shutil, "disk_usage", lambda path: (0, 0, free[2] + 1))
    entry()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_what_a_killed_process_left_in_the_cache_goes(entry, tmp_path):
    left = tmp_path / "cache" / "0123456789abcdef-0123456789abcdef.xyz"
    left.mkdir(parents=True)
    (left / "pixels.u8").write_bytes(b"x")
    entry()
    assert left.exists()  # another process may be writing it
    (tmp_path / "pictures" / "9.png").write_bytes(b"x")
    for path in (left / "pixels.u8", left):
        os.utime(path, (1, 1))
    entry()
    assert not left.exists() and json.loads(next(tmp_path.glob("cache/*/index.json")).read_text())[
        "unreadable"
    ] == [3, 8]

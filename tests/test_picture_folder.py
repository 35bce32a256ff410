"""Folders with anything in them: the order of names, what is left out, and what it costs."""

import os
import random
import socket
import tracemalloc
from pathlib import Path

import picture_files
import pytest
from PIL import Image

from engine import data, decoded, picture_folder

PARTS = ("a", "a b", "a-b", "a.b", "A", "é", "\uffee", "𝛼", "z", "10", "9", "a!", "\udcff", "b")


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture_files.encoded(Image.new("L", (4, 4), 9), "PNG"))
    return path


def listed(folder) -> list[str]:
    return list(picture_folder.Listing(folder).names)


def test_the_order_is_that_of_sorted_paths(tmp_path):
    """As runs of before saw it: a folder's files stand where its name stands."""
    draw = random.Random(0)
    for _ in range(120):
        parts = [draw.choice(PARTS) for _ in range(draw.randint(0, 3))]
        name = draw.choice(PARTS) + draw.choice((".png", ".JPG", ".tif", ".txt", ""))
        path = tmp_path.joinpath(*parts, name)
        if not any(p.is_file() for p in path.parents) and not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    expected = sorted(f for f in files if f.suffix.lower() in picture_folder.SUFFIXES)
    assert len(expected) > 40
    assert listed(tmp_path) == [f.relative_to(tmp_path).as_posix() for f in expected]
    found = picture_folder.Listing(tmp_path)
    assert [found.path(i) for i in range(len(expected))] == [str(f) for f in expected]
    assert found.others == len(files) - len(expected)


def test_names_are_kept_in_their_bytes(tmp_path):
    names = picture_folder.Names(["a/b.png", "größe\udcff.png", ""])
    assert list(names) == [names[i] for i in range(3)] == ["a/b.png", "größe\udcff.png", ""]
    assert names[-1] == "" and names.digest() != picture_folder.Names(["a/b.png"]).digest()
    with pytest.raises(IndexError):
        names[3]
    tracemalloc.start()
    try:
        many = picture_folder.Names(f"class_{i % 7}/picture_{i:07d}.png" for i in range(50_000))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 50_000 * (len(many[9]) + 8) * 1.3  # a Path took 390


def test_what_is_no_file_is_left_out_with_a_sentence(tmp_path, capsys):
    """Nothing of this may block: opening a pipe does."""
    put(tmp_path / "real.png")
    put(tmp_path / "folder.png" / "inside.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("loop.png", tmp_path / "loop.png")
    os.symlink("nowhere.png", tmp_path / "broken.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    os.symlink("real.png", tmp_path / "link.png")
    os.symlink("folder.png", tmp_path / "around")
    os.symlink(".", tmp_path / "self.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "socket.png"))
    assert listed(tmp_path) == ["folder.png/inside.png", "link.png", "real.png"]
    said = capsys.readouterr().err
    for name in ("loop.png is a broken link", "broken.png is a broken", "pipe.png is no file (a"):
        assert f"left out: {name}" in said
    assert "zero.png is no file" in said or "is a broken link" in said
    assert "has 2 link(s) to folders, which are not followed" in said
    assert len(data.open_dataset(tmp_path, size=4)) == 3


def test_names_of_any_kind_are_pictures_and_print(tmp_path, capsys):
    for name in ("new\nline.png", "\udcff\udc80.png", "\x1b[2J.png", " .png", "日本.png", "-.png"):
        put(tmp_path / name)
        (tmp_path / f"bad{name}").write_bytes(b"x")
    images = data.open_dataset(tmp_path, size=4)
    assert len(images) == 6
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 7 and "6 of 12 pictures" in said and "\x1b" not in said
    assert "badnew\\nline.png: it is none of" in said and "bad\\udcff\\udc80.png" in said


def test_folders_and_files_without_permission(tmp_path, capsys, monkeypatch):
    """Root may read everything: the system's answer is exchanged."""
    for name in ("a/1.png", "b/2.png", "c/3.png"):
        put(tmp_path / name)
    scandir, opened = os.scandir, os.open

    def deny(path, *args):
        if str(path).endswith("b/"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path, *args)

    def refuse(path, *args, **options):
        if str(path).endswith("3.png"):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "scandir", deny)
    monkeypatch.setattr(os, "open", refuse)
    assert len(data.open_dataset(tmp_path, size=4)) == 1
    said = capsys.readouterr().err
    assert "left out: b/ cannot be listed (Permission denied)" in said
    assert f"skipped: {tmp_path / 'c' / '3.png'}: Permission denied" in said


def test_files_that_change_between_listing_and_reading(tmp_path, capsys, monkeypatch):
    for i in range(6):
        put(tmp_path / f"{i}.png")
    images = data.open_dataset(tmp_path, size=4, memory_limit=0)
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").unlink()
    os.mkfifo(tmp_path / "1.png")
    (tmp_path / "2.png").unlink()
    (tmp_path / "2.png").mkdir()
    (tmp_path / "3.png").write_bytes(b"")
    pixels, numbers = data.decode(images, data.order(6, 0, 0, 6))
    assert pixels.shape == (6, 1, 4, 4) and set(numbers.tolist()) <= {4, 5}
    said = capsys.readouterr().err
    for sentence in ("0.png: No such file", "1.png: it is no file of bytes", "3.png: it is empty"):
        assert sentence in said
    assert "2.png: it is no file of bytes" in said and len(images.skipped) == 4
    listing = picture_folder.Listing

    def gone(folder):
        found = listing(folder)
        for name in ("4.png", "5.png"):
            (tmp_path / name).unlink(missing_ok=True)
        return found

    put(tmp_path / "6.png")
    monkeypatch.setattr(picture_folder, "Listing", gone)
    monkeypatch.setattr(decoded, "SMALLEST", 0)
    assert len(data.open_dataset(tmp_path, size=4, cache=tmp_path / "cache")) == 1


def test_broken_pictures_are_read_once(tmp_path, capsys):
    """Half of a folder broken: not tried again for every picture that comes before them."""
    for i in range(40):
        put(tmp_path / f"{i:02d}.png")
        (tmp_path / f"x{i:04d}.png").write_bytes(b"")
    images = data.open_dataset(tmp_path, size=4, memory_limit=0)
    tries, read = [], images.read
    images.read = lambda i: tries.append(i) or read(i)
    for step in range(8):
        data.batch(images, step, 20, seed=0)
    assert len([i for i in tries if i >= 40]) <= 40 + 4 * os.cpu_count()
    assert len(images.skipped) == 40 == len(set(images.skipped))
    assert len(capsys.readouterr().err.splitlines()) == 10


def test_a_deep_tree(tmp_path):
    place = os.open(tmp_path, os.O_RDONLY)
    try:
        for depth in range(300):  # deeper than a path may be long
            if depth == 3:
                os.close(os.open("a.png", os.O_CREAT | os.O_WRONLY, dir_fd=place))
            os.mkdir("d" * 20, dir_fd=place)
            inner = os.open("d" * 20, os.O_RDONLY, dir_fd=place)
            os.close(place)
            place = inner
    finally:
        os.close(place)
    found = picture_folder.Listing(tmp_path)
    assert len(found.names) == 1 and found.count == 1
    assert "cannot be listed (File name too long)" in found.left_out[0]


def test_several_frames_are_said_once(tmp_path, capsys):
    for i in range(3):
        (tmp_path / f"{i}.gif").write_bytes(picture_files.variants()["animated gif"])
    put(tmp_path / "a.png")
    assert len(data.open_dataset(tmp_path, size=4)) == 4
    said = capsys.readouterr().err
    assert said.count("has several frames: of it, and of others like it, the first is taken") == 1

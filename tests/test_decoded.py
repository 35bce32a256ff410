"""A folder's decoded pictures: kept whole, never stale, never in the way."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from engine import data, decoded, decoding


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six pictures in two class folders, one of them broken; any folder is worth a cache entry."""
    monkeypatch.setattr(decoded, "SMALLEST", 0)
    rng = np.random.default_rng(1)
    for i in range(6):
        path = tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)).save(path)
    (tmp_path / "pictures" / "a" / "2.png").write_bytes(b"broken")
    return tmp_path / "pictures"


def opened(folder, size=8, **options):
    return data.open_dataset(str(folder), size=size, channels=3, labels=True, **options)


def test_decoded_pictures_are_kept_and_mapped(folder, tmp_path, monkeypatch, capsys):
    cache, plain = tmp_path / "cache", opened(folder)
    said = capsys.readouterr().err
    first = opened(folder, cache=cache)
    assert capsys.readouterr().err == said and "2.png" in said
    reads = []
    monkeypatch.setattr(decoding, "to_array", lambda *args: reads.append(args))
    again = opened(folder, cache=cache, memory_limit=0)  # whatever the memory
    assert not reads and capsys.readouterr().err == said
    for images in (first, again):
        assert torch.equal(images.pixels, plain.pixels)
        assert images.labels.tolist() == plain.labels.tolist() == [0, 0, 1, 1, 1]
        assert images.skipped == plain.skipped and len(images) == 5
        x, y = data.batch(images, 3, 4, seed=0, flip=True)
        like, labels = data.batch(plain, 3, 4, seed=0, flip=True)
        assert torch.equal(x, like) and torch.equal(y, labels)
    again.pixels.zero_()  # this process's copy alone
    assert torch.equal(opened(folder, cache=cache).pixels, plain.pixels)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("change", ["added", "removed", "rewritten", "touched", "renamed"])
def test_a_changed_folder_is_decoded_anew(folder, tmp_path, change):
    cache = tmp_path / "cache"
    opened(folder, cache=cache)
    (before,) = cache.iterdir()
    file = folder / "a" / "0.png"
    if change == "added":
        Image.new("RGB", (5, 5)).save(folder / "b" / "new.png")
    elif change == "removed":
        file.unlink()
    elif change == "rewritten":  # same name and time, another size
        times = file.stat()
        Image.new("RGB", (5, 5)).save(file)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "touched":  # same name and size, another time: perhaps another picture
        os.utime(file, ns=(1, 1))
    else:
        file.rename(folder / "b" / "0.png")
    images, plain = opened(folder, cache=cache), opened(folder)
    assert torch.equal(images.pixels, plain.pixels) and torch.equal(images.labels, plain.labels)
    (after,) = cache.iterdir()  # the old entry is gone
    assert after != before


def test_sizes_and_folders_have_entries_of_their_own(folder, tmp_path):
    cache = tmp_path / "cache"
    opened(folder, cache=cache)
    assert opened(folder, size=4, cache=cache).pixels.shape == (5, 3, 4, 4)
    data.open_dataset(str(folder / "b"), size=8, channels=3, cache=cache)
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", ["short", "long", "index", "no pixels", "empty index"])
def test_a_damaged_entry_is_made_anew(folder, tmp_path, damage):
    cache = tmp_path / "cache"
    expected = opened(folder, cache=cache).pixels.clone()
    (entry,) = cache.iterdir()
    pixels, index = entry / "pixels.u8", entry / "index.json"
    if damage == "short":
        pixels.write_bytes(pixels.read_bytes()[:-1])
    elif damage == "long":
        pixels.write_bytes(pixels.read_bytes() + b"x")
    elif damage == "no pixels":
        pixels.unlink()
    else:
        index.write_text("{" if damage == "index" else "{}")
    assert torch.equal(opened(folder, cache=cache).pixels, expected)
    assert pixels.stat().st_size == expected.numel() and index.read_text()[:2] == '{"'


def test_an_interrupted_or_impossible_entry(folder, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def interrupt(*args):
            raise KeyboardInterrupt

        patch.setattr(decoding, "to_array", interrupt)
        opened(folder, cache=cache)
    assert not list(cache.iterdir())
    (tmp_path / "file").write_text("")
    images = opened(folder, cache=tmp_path / "file")
    assert len(images) == 5
    assert "decoded pictures are not kept in" in capsys.readouterr().err
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 6 pictures can be read"):
        opened(folder, cache=cache)


def test_small_folders_have_no_entry(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(decoded, "SMALLEST", 1 << 20)
    assert len(opened(folder, cache=tmp_path / "cache")) == 5 and not (tmp_path / "cache").exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert decoded.place() == tmp_path / "xdg" / "diffusion-engine" / "pictures"

"""Where pictures come from, in which order, and what is said when they cannot be read."""

import gzip
import hashlib
import http.server
import struct
import sys
import threading
import types

import numpy as np
import picture_files
import pytest
import torch
from PIL import Image

from engine import data, fashion_mnist


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion(tmp_path):
    """A folder with a small Fashion-MNIST of 20 pictures."""
    rng = np.random.default_rng(0)
    for part in ("train", "t10k"):
        images = gzip.compress(idx(rng.integers(0, 256, (20, 28, 28))))
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(images)
        labels = gzip.compress(idx(np.arange(20) % 10))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(labels)
    return tmp_path


def picture(path, size=(40, 30), colour=(200, 100, 50), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **options)
    return path


def test_fashion_mnist_from_a_folder(fashion):
    images = data.open_dataset("fashion-mnist", data_dir=fashion)
    assert (len(images), images.pixels.shape) == (20, (20, 1, 28, 28))
    assert images.classes[9] == "Ankle boot" and images.labels.tolist()[:3] == [0, 1, 2]
    x, y = data.batch(images, 0, 8, seed=0)
    assert x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1 and y.shape == (8,)
    rgb = data.open_dataset("fashion-mnist", data_dir=fashion, size=32, channels=3, split="test")
    assert data.batch(rgb, 0, 4, seed=0)[0].shape == (4, 3, 32, 32)


def test_plain_files_serve_too(fashion):
    for file in fashion.glob("*.gz"):
        file.with_suffix("").write_bytes(gzip.decompress(file.read_bytes()))
        file.unlink()
    assert len(data.open_dataset("fashion-mnist", data_dir=fashion)) == 20


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (
            lambda raw: gzip.compress(raw)[:-900],
            r"images.*truncated: found \d+ bytes, expected 15696",
        ),
        (lambda raw: gzip.compress(raw[:5000]), "truncated: found 5000 bytes, expected 15696"),
        (lambda raw: gzip.compress(raw[:7]), "truncated: found 7 bytes, expected a header of 16"),
        (lambda raw: gzip.compress(raw + b"x"), "too long: expected 15696 bytes for 20 × 28 × 28"),
        (lambda raw: gzip.compress(b"\0\0\x08\1" + raw[4:]), "found magic number 0x00000801"),
        (lambda raw: b"not gzip", "truncated: found 0 bytes.*Not a gzipped file"),
    ],
)
def test_damaged_idx_file_is_named(fashion, damage, sentence):
    file = fashion / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(gzip.decompress(file.read_bytes())))
    with pytest.raises(ValueError, match=sentence) as error:
        data.open_dataset("fashion-mnist", data_dir=fashion)
    assert str(file) in str(error.value) and "put a fresh copy in its place" in str(error.value)


def test_images_and_labels_must_agree(fashion):
    (fashion / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(7))))
    with pytest.raises(ValueError, match=r"20 images, but .* 7 labels"):
        data.open_dataset("fashion-mnist", data_dir=fashion)


def test_files_that_are_not_fashion_mnist(fashion):
    images, labels = (fashion / f"train-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    whole = labels.read_bytes()
    labels.write_bytes(gzip.compress(idx(np.full(20, 10))))
    with pytest.raises(ValueError, match=r"labels.* has a label 10, expected 0 … 9: put a fresh"):
        data.open_dataset("fashion-mnist", data_dir=fashion)
    labels.write_bytes(whole)
    for count, size in ((20, 27), (0, 28)):
        images.write_bytes(gzip.compress(idx(np.zeros((count, size, 28)))))
        labels.write_bytes(gzip.compress(idx(np.arange(count) % 10)))
        with pytest.raises(ValueError, match=rf"holds {count} images of {size}×28, expected"):
            data.open_dataset("fashion-mnist", data_dir=fashion)


def test_missing_files_and_folders(fashion, monkeypatch):
    (fashion / "train-images-idx3-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no train-images.*; give .*leave --data-dir"):
        data.open_dataset("fashion-mnist", data_dir=fashion)
    (fashion / "files").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no such folder \(did you mean .*/files\?\)"):
        data.open_dataset("fashion-mnist", data_dir=fashion / "flies")

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ValueError, match=r"a cannot be read \(Permission denied\): check"):
        fashion_mnist.read_idx("a", 1)


def test_download_is_checked_and_kept(fashion, tmp_path_factory, monkeypatch):
    """From a server of our own; the cache is used the second time, a wrong checksum refused."""
    cache = tmp_path_factory.mktemp("cache")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=fashion)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sums = {
        file.name: "md5:" + hashlib.md5(file.read_bytes()).hexdigest()
        for file in fashion.glob("*.gz")
    }
    monkeypatch.setattr(fashion_mnist, "DEBIAN", fashion / "none")
    monkeypatch.setattr(fashion_mnist, "URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(fashion_mnist, "MD5", sums)
    monkeypatch.setattr("pooch.os_cache", lambda name: cache / name)
    try:
        assert len(data.open_dataset("fashion-mnist")) == 20
    finally:
        server.shutdown()
        server.server_close()
    assert len(data.open_dataset("fashion-mnist")) == 20
    monkeypatch.setitem(sums, "train-images-idx3-ubyte.gz", "md5:" + "0" * 32)
    with pytest.raises(ValueError, match=r"could not be downloaded.*dataset-fashion-mnist"):
        data.open_dataset("fashion-mnist")


def test_order_is_a_permutation_per_epoch_and_restartable():
    whole = data.order(10, seed=3, start=0, count=30)
    for epoch in whole.view(3, 10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert whole[:10].tolist() != whole[10:20].tolist()
    assert data.order(10, seed=3, start=7, count=9).tolist() == whole[7:16].tolist()
    assert data.order(10, seed=4, start=0, count=30).tolist() != whole.tolist()


def test_batch_larger_than_the_data_set_and_flips(fashion):
    images = data.open_dataset("fashion-mnist", data_dir=fashion)
    x, _ = data.batch(images, 1, 50, seed=0)
    flipped, _ = data.batch(images, 1, 50, seed=0, flip=True)
    mirrored = (flipped == x.flip(3)).flatten(1).all(1)
    same = (flipped == x).flatten(1).all(1)
    assert (mirrored | same).all() and mirrored.any() and same.any()
    again, _ = data.batch(images, 1, 50, seed=0, flip=True)
    assert torch.equal(flipped, again)


def test_folder_with_a_corrupt_picture(tmp_path, capsys):
    for i in range(5):
        picture(tmp_path / f"{i}.png")
    picture(tmp_path / "sub" / "grey.jpg", mode="L")
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("no picture either")
    images = data.open_dataset(str(tmp_path), size=16, channels=3)
    said = capsys.readouterr().err
    assert len(images) == 5 and images.pixels.shape == (5, 3, 16, 16)
    assert f"skipped: {tmp_path / '2.png'}" in said and "bad.jpg" in said
    assert "2 of 7 pictures" in said
    assert images.pixels[0, :, 8, 8].tolist() == [200, 100, 50]


def test_decoding_per_batch_gives_the_same_pictures(tmp_path, capsys):
    for i in range(6):
        picture(tmp_path / f"{i}.png", colour=(40 * i, 0, 0))
    kept = data.open_dataset(str(tmp_path), size=8, channels=3)
    read = data.open_dataset(str(tmp_path), size=8, channels=3, memory_limit=0)
    assert read.pixels is None
    stream = data.batches(read, 4, seed=1, start=2)
    for step in (2, 3):
        assert torch.equal(next(stream)[0], data.batch(kept, step, 4, seed=1)[0])
    stream.close()
    (tmp_path / "3.png").write_bytes(b"broken since")
    x, _ = data.batch(read, 0, 6, seed=1)
    assert x.shape == (6, 3, 8, 8) and read.skipped and "3.png" in capsys.readouterr().err
    for file in tmp_path.iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 6 pictures can be read"):
        data.batch(read, 0, 6, seed=1)


def test_pictures_are_upright_cropped_and_scaled(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255  # the centre square is white
    Image.fromarray(wide).save(tmp_path / "wide.png")
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    upside = np.zeros((32, 32), np.uint8)
    upside[:16] = 255
    Image.fromarray(upside).save(tmp_path / "upside.jpg", exif=exif, quality=100)
    deep = np.full((32, 32), 200 * 256, np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    images = data.open_dataset(str(tmp_path), size=16)
    deep, upside, wide = images.pixels[:, 0]
    assert wide.min() > 240
    assert upside[:6].max() < 10 and upside[10:].min() > 245
    assert deep.unique().tolist() == [200]


def test_transparent_pictures_lie_on_white(tmp_path):
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[:, 4:] = (200, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "a_rgba.png")
    half = np.stack([np.zeros((8, 8), np.uint8), np.full((8, 8), 51, np.uint8)], -1)
    Image.fromarray(half).save(tmp_path / "b_la.png")
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([0, 0, 255] * 8)
    palette.save(tmp_path / "c_palette.png", transparency=3)
    pixels = data.open_dataset(str(tmp_path), size=8, channels=3).pixels
    assert pixels[0, :, 0, 0].tolist() == [255] * 3 and pixels[0, :, 0, 7].tolist() == [200, 0, 0]
    assert pixels[1, :, 0, 0].tolist() == [204] * 3 and pixels[2, :, 0, 0].tolist() == [255] * 3


def test_class_folders_give_labels(tmp_path):
    for name in ("shoe", "bag"):
        for i in range(2):
            picture(tmp_path / name / f"{i}.png")
    images = data.open_dataset(str(tmp_path), size=8, labels=True)
    assert images.classes == ["bag", "shoe"] and images.labels.tolist() == [0, 0, 1, 1]
    assert data.open_dataset(str(tmp_path), size=8).labels is None
    picture(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"loose\.png lies in no class folder"):
        data.open_dataset(str(tmp_path), size=8, labels=True)


def test_empty_or_unreadable_folder(tmp_path):
    with pytest.raises(
        ValueError, match=r"holds no picture: found no file at all, expected \.bmp, "
    ):
        data.open_dataset(str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"found 1 other file\(s\) \(\.txt\), expected"):
        data.open_dataset(str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"")
    sentence = r"none of the 1 pictures can be read \(the first: .*a\.png: it is empty, 0 bytes\)"
    with pytest.raises(ValueError, match=sentence):
        data.open_dataset(str(tmp_path))


def test_unknown_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "pictures" / "a.png")
    monkeypatch.setitem(sys.modules, "datasets", None)
    choices = r"fashion-mnist, a folder of pictures, or a Hugging Face name"
    for name, sentence in (
        ("someone/pictures", rf"no such folder; give {choices}.*pip install datasets"),
        ("pictrues", rf"no such folder \(did you mean pictures\?\); give {choices}.*pip install"),
        ("./pictrues", rf"no such folder \(did you mean pictures\?\); give {choices} such as"),
        ("pictures/cats/small", rf"there is no such folder; give {choices} such as"),
        ("fashion_mnist", rf"did you mean fashion-mnist\? Known are {choices}"),
        ("Fashion MNIST", "did you mean fashion-mnist"),
        ("fashon-mnist", "did you mean fashion-mnist"),
        ("", f"--dataset is empty: give {choices}"),
        ("pictures/a.png", "is a file: give the folder"),
        ("~nobody-of-this-name/pictures", "there is no such user; give fashion-mnist"),
    ):
        with pytest.raises((ValueError, OSError, ModuleNotFoundError), match=sentence):
            data.open_dataset(name)
    assert len(data.open_dataset(tmp_path / "pictures")) == 1
    with pytest.raises(ValueError, match=r"--data-dir goes with .*: leave it out"):
        data.open_dataset("pictures", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"must be 1 \(grey\) or 3 \(RGB\), not 2"):
        data.open_dataset("fashion-mnist", channels=2)
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx" / "t10k-images-idx3-ubyte.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="give --dataset fashion-mnist --data-dir idx"):
        data.open_dataset("idx")


def test_hugging_face_names(monkeypatch):
    """Against a stand-in with the part of the library's interface that is used."""
    picture_kind, label_kind = type("Image", (), {}), type("ClassLabel", (), {"names": ["a", "b"]})

    class Table:
        features = {"img": picture_kind(), "label": label_kind()}  # noqa: RUF012

        def __len__(self):
            return 3

        def __getitem__(self, key):
            if key == "label":
                return [0, 1, 1]
            return {"img": Image.new("RGB", (9, 9), (10 * key, 0, 0))}

    def load_dataset(name, split):
        if name != "someone/pictures":
            raise RuntimeError("no such\ndata set")
        return Table()

    stand_in = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    images = data.open_dataset("someone/pictures", size=4, channels=3, labels=True)
    assert images.labels.tolist() == [0, 1, 1] and images.classes == ["a", "b"]
    assert images.pixels[:, 0, 0, 0].tolist() == [0, 10, 20]
    with pytest.raises(
        ValueError, match=r"could not load it .no such data set.; give fashion-mnist"
    ):
        data.open_dataset("someone/else")
    monkeypatch.setattr(Table, "features", {"img": picture_kind(), "text": object()})
    with pytest.raises(ValueError, match="no column of class labels, only img, text: leave --cl"):
        data.open_dataset("someone/pictures", labels=True)
    monkeypatch.setattr(Table, "features", {"text": object()})
    with pytest.raises(ValueError, match="has no column of images, only text: choose"):
        data.open_dataset("someone/pictures")
    monkeypatch.setattr(Table, "features", {"img": picture_kind()})
    monkeypatch.setattr(Table, "__len__", lambda self: 0)
    with pytest.raises(ValueError, match="has no rows"):
        data.open_dataset("someone/pictures")


def test_hugging_face_rows_of_any_kind(monkeypatch, capsys):
    """None, bytes, an undecoded file, a number, a row that the library cannot decode; labels of no
    class."""
    picture_kind, label_kind = type("Image", (), {}), type("ClassLabel", (), {"names": ["a", "b"]})
    file = picture_files.encoded(Image.new("RGB", (9, 9), (70, 0, 0)), "PNG")
    cells = [None, file, {"bytes": file, "path": None}, 7, KeyError("x"), file[:40], {"path": "x"}]
    labels = [0, 1, 1, 0, 1, 0, 1]

    class Table:
        features = {"img": picture_kind(), "label": label_kind()}  # noqa: RUF012

        def __len__(self):
            return len(cells)

        def __getitem__(self, key):
            if key == "label":
                return labels
            if isinstance(cells[key], Exception):
                raise cells[key]
            return {"img": cells[key]}

    stand_in = types.SimpleNamespace(load_dataset=lambda name, split: Table())
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    images = data.open_dataset("someone/pictures", size=4, channels=3, labels=True)
    assert images.pixels[:, 0, 0, 0].tolist() == [70, 70] and images.labels.tolist() == [1, 1]
    said = capsys.readouterr().err
    for row, why in (
        (0, "it has no picture"),
        (3, "it has no picture, but a value of type int"),
        (5, "it is none of"),
    ):
        assert f"skipped: someone/pictures row {row}: {why}" in said
    assert "row 4: it is damaged (KeyError: 'x')" in said and "5 of 7 pictures" in said
    for wrong in (-1, None, 2, "a"):
        labels[2] = wrong
        with pytest.raises(
            ValueError, match=r"row 2 of .* has the label .*, expected 0 … 1: leave"
        ):
            data.open_dataset("someone/pictures", labels=True)
        assert data.open_dataset("someone/pictures").labels is None
    assert "its labels are left out" in capsys.readouterr().err
    monkeypatch.setattr(Table, "features", None)
    with pytest.raises(ValueError, match="no column of images, only none at all"):
        data.open_dataset("someone/pictures")

"""Mutated files of data: each is a right picture or one sentence, in bounded memory."""

import contextlib
import gzip
import json
import resource
import struct
from pathlib import Path

import numpy as np
import picture_files
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import data, decoded, decoding, fashion_mnist, metrics, plots

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of Pillow, on damaged files
FILES = picture_files.variants()


def fuzzed(examples: int):
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None)


@st.composite
def mutations(draw):
    """A function of a file's bytes: some of them flipped, set, taken out, put in, or cut off."""
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(("flip", "set", "cut", "delete", "insert", "double")),
                st.floats(0, 1, exclude_max=True) | st.floats(0, 0.1),
                st.integers(0, 255),
                st.sampled_from((1, 2, 4, 60)),
            ),
            min_size=1,
            max_size=3,
        )
    )

    def mutate(raw: bytes) -> bytes:
        for kind, place, value, size in steps:
            at = int(place * len(raw))
            if kind == "flip" and raw:
                raw = raw[:at] + bytes([raw[at] ^ (value or 1)]) + raw[at + 1 :]
            elif kind == "set":
                raw = raw[:at] + bytes([(0, 0x7F, 0xFF)[value % 3]]) * size + raw[at + size :]
            elif kind == "cut":
                raw = raw[:at]
            elif kind == "delete":
                raw = raw[:at] + raw[at + size :]
            elif kind == "insert":
                raw = raw[:at] + bytes([value]) * size + raw[at:]
            else:
                raw = raw[:at] + raw[at : at + 60] * 2 + raw[at + 60 :]
        return raw

    return mutate


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module", autouse=True)
def bounded():
    """No more than 700 MB beside what this process has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (700 << 20), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def one_line(error: Exception, file: Path) -> None:
    assert str(file) in str(error) and str(error).isprintable(), repr(str(error))


@fuzzed(500)
@given(st.sampled_from(sorted(FILES)), mutations())
def test_pictures(place, name, mutate):
    file, raw = place / "a.png", mutate(FILES[name])
    file.write_bytes(raw)
    try:
        pixels, _ = decoding.read_file(str(file), 8, 3)
    except decoding.UnreadableImage as error:
        one_line(error, file)
        return
    assert pixels.shape == (3, 8, 8) and pixels.dtype == np.uint8
    if "png" in name and name != "apng":  # its checksums are looked at
        file.write_bytes(FILES[name])
        assert np.array_equal(pixels, decoding.read_file(str(file), 8, 3)[0])


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


@fuzzed(250)
@given(st.booleans(), st.booleans(), mutations())
def test_idx_files(place, zipped, before, mutate):
    """What is read is what was written: a gzip file has a checksum."""
    pixels = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    file = place / ("a.gz" if zipped else "a")
    raw = idx(pixels)
    if zipped:
        raw = gzip.compress(mutate(raw)) if before else mutate(gzip.compress(raw))
    else:
        raw = mutate(raw)
    file.write_bytes(raw)
    try:
        found = fashion_mnist.read_idx(file, 3)
    except ValueError as error:
        one_line(error, file)
        return
    if zipped and not before:
        assert np.array_equal(found, pixels)
    else:
        assert found.dtype == np.uint8 and found.ndim == 3 and found.nbytes <= len(raw) + 10_000


def test_a_gzip_bomb_is_not_unpacked(place):
    """A gigabyte in a megabyte: behind a header of little, of as much, and of more than allowed."""
    more = gzip.compress(bytes(64 << 20), 1) * 16
    for count, sentence in (
        (2, "is too long: expected 1584 bytes"),
        (10**6, "announces 784000000"),
    ):
        file = place / "bomb.gz"
        file.write_bytes(gzip.compress(struct.pack(">4I", 0x0803, count, 28, 28)) + more)
        with pytest.raises(ValueError, match=sentence):
            fashion_mnist.read_idx(file, 3)


@pytest.fixture(scope="module")
def entry(place):
    """A cache entry of seven pictures, and one that cannot be read, with what is in its files."""
    folder = place / "pictures"
    folder.mkdir()
    for i in range(8):
        broken = i == 3
        raw = b"x" if broken else picture_files.encoded(picture_files.noise(8, 8, i), "PNG")
        (folder / f"{i}.png").write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoded, "SMALLEST", 0)
        images = data.open_dataset(folder, size=8, cache=place / "cache")
    names = data.picture_folder.Listing(folder).names
    made = decoded.Entry(place / "cache", folder, names, 8, 1)
    files = {name: (made.path / name).read_bytes() for name in ("index.json", "pixels.u8")}
    return made, files, images.pixels.clone()


@fuzzed(250)
@given(st.sampled_from(("index.json", "pixels.u8")), mutations())
def test_decoded_pictures(entry, name, mutate):
    """Right pictures, in their right places, or none at all."""
    made, files, pixels = entry
    raw = mutate(files[name])
    (made.path / name).write_bytes(raw)
    found = made.load()
    assert found is not None or raw != files[name]
    if found is not None:
        assert np.array_equal(found[0], pixels.numpy()) and list(found[1]) == [3]
        assert isinstance(found[1][3], str)
    del found  # the file is mapped
    (made.path / name).write_bytes(files[name])


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"unreadable": [], "skipped": [], "sums": []}',
        '{"unreadable": [3, 3], "skipped": ["", ""], "sums": []}',
        '{"unreadable": {"3": 1}, "skipped": "a", "sums": 1}',
        '{"unreadable": [[3]], "skipped": ["a"], "sums": [1]}',
        '{"unreadable": [true], "skipped": ["a"], "sums": [1]}',
        f'{{"unreadable": [{"9" * 5000}], "skipped": ["a"], "sums": [1]}}',
        "null",
        "3",
    ],
)
def test_an_index_of_anything(entry, text):
    made, files, _ = entry
    (made.path / "index.json").write_text(text)
    assert made.load() is None
    (made.path / "index.json").write_bytes(files["index.json"])
    assert made.load() is not None


LOG = "".join(
    json.dumps({"step": s, "loss": 1 / s, "lr": 1e-3, "skipped": 0}) + "\n" for s in range(1, 30)
).encode()


@fuzzed(200)
@given(mutations())
def test_logs(place, mutate):
    (place / "metrics.jsonl").write_bytes(mutate(LOG))
    found = metrics.read_metrics(place)
    assert all(type(row["step"]) is int for row in found)
    with metrics.Log(place, 10, False) as log:
        log.write(11, {"loss": 1.0})
    steps = [row["step"] for row in metrics.read_metrics(place)]
    assert steps[-1] == 11 and max(steps) <= 11


@pytest.mark.parametrize(
    "line", ["[" * 100_000, "3", "null", '{"step": "1"}', '{"step": 1e400}', "\xff", "{}", '"step"']
)
def test_a_log_of_anything_is_drawn(place, line):
    rows = [{"step": 1, "loss": 2}, {"step": 2, "loss": "x"}, {"step": 3, "loss": 10**400}]
    rows += [{"step": 4, "loss": [1]}, {"step": 5, "loss": float("inf")}, {"step": 6, "loss": None}]
    text = "\n".join([line, *map(json.dumps, rows)])
    (place / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    assert [row["step"] for row in metrics.read_metrics(place)] == [1, 2, 3, 4, 5, 6]
    if line in ("3", "\xff"):
        with contextlib.suppress(MemoryError):
            assert plots.loss_curve(place).exists()


def test_the_limit_holds():
    with pytest.raises((MemoryError, RuntimeError)):
        torch.ones(1 << 28)

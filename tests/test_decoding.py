"""A picture's file of any kind becomes the right bytes, or one sentence says why not."""

import io
import os
import struct
import subprocess
import sys

import numpy as np
import picture_files
import pytest
from PIL import Image

from engine import cli, decoding
from engine.decoding import UnreadableImage

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")  # of Pillow, on damaged files


@pytest.fixture
def read(tmp_path):
    """What is read of these bytes, or of a picture saved as a format."""

    def read(source, kind="PNG", size=8, channels=3, name="a.png", **options):
        data = source if isinstance(source, bytes) else None
        data = picture_files.encoded(source, kind, **options) if data is None else data
        (tmp_path / name).write_bytes(data)
        return decoding.read_file(str(tmp_path / name), size, channels)[0]

    return read


def grey(values, dtype) -> Image.Image:
    """32 × 32: each of four values fills a quarter's row."""
    return Image.fromarray(np.repeat(np.array(values, dtype), 8)[:, None].repeat(32, 1))


def levels(array) -> list[int]:
    return array[0, 4::8, 16].tolist()


@pytest.mark.parametrize("name, data", picture_files.variants().items())
def test_truncated_files_are_pictures_or_sentences(read, name, data):
    """Cut at its end, a file may be whole enough; before the middle of its pixels never."""
    whole, n = read(data), len(data)
    assert whole.shape == (3, 8, 8) and whole.dtype == np.uint8 and whole.std() > 4
    first = n // 2 if name in ("animated gif", "pages", "apng") else n
    for cut in (0, 1, 3, 8, 13, 20, 30, n // 8, n // 3, n // 2 - 60, 3 * n // 4, n - 9, n - 1):
        try:
            found = read(data[:cut])
            assert cut > first * 0.9 and found.shape == (3, 8, 8), cut
        except UnreadableImage as error:
            text = str(error)
            assert "a.png: it is " in text and text.isprintable(), text
            assert cut or text.endswith("it is empty, 0 bytes")


BOMBS = """
import resource, sys
from pathlib import Path
from engine import decoding
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (600 << 20),) * 2)
for path in sys.argv[1:]:
    try:
        print(decoding.read_file(path, 8, 3)[0].shape)
    except decoding.UnreadableImage as error:
        print(error)
# Its own: getrusage tells the parent's where that was larger.
status = Path("/proc/self/status").read_text()
print(int(status.split("VmHWM:")[1].split()[0]) >> 10, "MB")
"""


def test_small_files_that_ask_for_gigabytes(tmp_path):
    """In a process that can have 600 MB more; none takes 200, or seconds."""
    files = []
    for name, data in picture_files.bombs().items():
        files.append(tmp_path / f"{name}.png")
        files[-1].write_bytes(data)
    with open(tmp_path / "sparse.webp", "wb") as file:
        file.truncate(5 << 30)
    files.append(tmp_path / "sparse.webp")
    root = os.path.dirname(os.path.dirname(decoding.__file__))
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, *files], capture_output=True, text=True, timeout=60, cwd=root
    )
    assert done.returncode == 0, done.stderr
    *said, peak = done.stdout.splitlines()
    assert int(peak.split()[0]) < 400
    for file, sentence in zip(files, said, strict=True):
        assert sentence.startswith(f"{file}: "), sentence
        if file.stem not in ("text", "profile"):
            assert "more than the" in sentence or "pixels" in sentence, sentence


def test_numbers_beyond_eight_bits_are_scaled_not_clipped(read):
    quarters = {"size": 32, "channels": 1}
    sixteen = grey([0, 1 << 12, 1 << 14, 65535], np.uint16)
    for kind in ("PNG", "TIFF", "PPM"):
        assert levels(read(sixteen, kind, **quarters)) == [0, 16, 64, 255]
    big = Image.frombytes("I;16B", (32, 32), np.asarray(sixteen).astype(">u2").tobytes())
    assert levels(read(big, "TIFF", **quarters)) == [0, 16, 64, 255]
    wide = grey([0, 1 << 12, 1 << 14, 65535], np.int32)  # Pillow's mode I, as PGM has it
    assert levels(read(wide, "PPM", **quarters)) == [0, 16, 64, 255]
    for values, expected in (
        ([0, 51, 102, 255], [0, 51, 102, 255]),
        ([0, 257, 25700, 65535], [0, 1, 100, 255]),
        ([-(10**9), 0, 10**9, 2 * 10**9], [0, 85, 170, 255]),
        ([7, 7, 7, 7], [7, 7, 7, 7]),
        ([-7, -7, -7, -7], [0, 0, 0, 0]),
    ):
        assert levels(read(grey(values, np.int32), "TIFF", **quarters)) == expected
    for values, expected in (
        ([0, 0.2, 0.4, 1], [0, 51, 102, 255]),
        ([0, 51, 102.2, 255], [0, 51, 102, 255]),
        ([-1, -0.5, 0.5, 1], [0, 64, 191, 255]),
        ([-1e38, 0, 1e38, 2e38], [0, 85, 170, 255]),
        ([np.nan, -np.inf, np.inf, 0.2], [0, 0, 255, 51]),
        ([np.nan, np.nan, np.nan, np.nan], [0, 0, 0, 0]),
    ):
        assert levels(read(grey(values, np.float32), "TIFF", **quarters)) == expected
    rgb = np.stack([np.full((16, 16), v) for v in (65535, 100 * 256, 0)], -1).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in rgb)
    png = picture_files.png(16, 16)
    header = png[:8] + png[8:24] + b"\x10\x02" + png[26:29]  # 16 bits, RGB
    header += picture_files.zlib.crc32(header[12:29]).to_bytes(4, "big")
    deep = header + picture_files.chunk(b"IDAT", picture_files.zlib.compress(rows))
    assert read(deep + picture_files.chunk(b"IEND", b""))[:, 4, 4].tolist() == [255, 100, 0]


def test_colours_of_every_mode(read):
    colour = Image.new("RGB", (16, 16), (200, 100, 50))
    for mode, kind in (("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LAB", "TIFF"), ("YCbCr", "JPEG")):
        source = colour.convert(mode) if mode != "LAB" else lab(colour)
        found = read(source, kind, **({"quality": 100} if kind == "JPEG" else {}))
        assert np.abs(found[:, 4, 4].astype(int) - (200, 100, 50)).max() <= 3, (
            mode,
            found[:, 4, 4],
        )
        assert abs(int(read(source, kind, channels=1)[0, 4, 4]) - 124) <= 3
    bits = Image.new("1", (16, 16), 1)
    bits.paste(0, (0, 0, 8, 16))
    assert read(bits, size=16)[0, 4].tolist() == [0] * 8 + [255] * 8
    index = Image.new("P", (16, 16), 0)
    index.putpalette([10, 20, 30, 200, 100, 50])
    index.paste(1, (8, 0, 16, 16))
    assert read(index, transparency=b"\xff\x00")[:, 4, ::7].tolist() == [
        [10, 255],
        [20, 255],
        [30, 255],
    ]
    half = Image.merge("LA", [Image.new("L", (16, 16), v) for v in (0, 51)])
    assert read(half)[:, 4, 4].tolist() == [204] * 3
    clear = Image.fromarray(np.full((16, 16), 1000, np.uint16))
    assert read(clear, transparency=1000)[0, 4, 4] == 255 and read(clear)[0, 4, 4] == 3


def lab(picture):
    from PIL import ImageCms

    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.applyTransform(picture, ImageCms.buildTransform(*profiles, picture.mode, "LAB"))


def test_adobe_inverted_four_colours(read):
    """YCCK, as Photoshop writes it: CMY as YCbCr, all four inverted, and a marker that says so."""
    rgb, black = (200, 100, 50), 0
    y, cb, cr = (
        Image.new("RGB", (16, 16), tuple(255 - v for v in rgb)).convert("YCbCr").getpixel((0, 0))
    )
    # Pillow inverts what it writes; the three that remain are taken for YCbCr of the inverted CMY.
    bands = [Image.new("L", (16, 16), 255 - v) for v in (y, cb, cr)]
    four = Image.merge("CMYK", [*bands, Image.new("L", (16, 16), black)])
    data = bytearray(picture_files.encoded(four, "JPEG", quality=100, subsampling=0))
    marker = data.index(b"Adobe")
    data[marker + 11] = 2  # the transform: YCCK
    found = read(bytes(data))[:, 4, 4].astype(int)
    assert np.abs(found - rgb).max() <= 4, found


@pytest.mark.parametrize("orientation", range(10))
def test_exif_turns_and_broken_exif_does_not(read, orientation, monkeypatch):
    square = np.zeros((16, 16), np.uint8)
    square[:8, :8] = 255  # top left
    exif = Image.Exif()
    exif[0x0112] = orientation
    corner = {2: (1, 0), 3: (1, 1), 4: (0, 1), 6: (1, 0), 7: (1, 1), 8: (0, 1)}
    x, y = corner.get(orientation, (0, 0))
    for kind in ("PNG", "WEBP", "JPEG"):
        found = read(Image.fromarray(square), kind, channels=1, exif=exif, quality=100)[0]
        assert found[1 + 5 * y, 1 + 5 * x] > 240, kind
        assert found[6 - 5 * y, 6 - 5 * x] < 15
    data = picture_files.encoded(Image.fromarray(square), "JPEG", exif=exif, quality=100)
    at = data.index(b"Exif\0\0") + 6
    for broken in (b"XX*\0", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff"):
        damaged = data[:at] + broken + data[at + len(broken) :]
        assert read(damaged, channels=1)[0, 1, 1] > 240  # the picture is whole
    monkeypatch.setattr(Image.Image, "getexif", lambda self: struct.unpack(">I", b""))
    assert read(data, channels=1)[0, 1, 1] > 240


def test_content_decides_not_the_suffix(read, monkeypatch):
    colour = Image.new("RGB", (16, 16), (200, 100, 50))
    for kind in picture_files.FORMATS:
        assert abs(int(read(colour, kind, name="a.tiff")[0, 4, 4]) - 200) < 4
    for kind in ("EPS", "PDF", "ICO", "TGA"):  # the first starts Ghostscript when it is decoded
        with pytest.raises(
            UnreadableImage, match=r"it is none of PNG, JPEG.* damaged at its begin"
        ):
            read(colour, kind)
    with pytest.raises(UnreadableImage, match=r"a\.png: it is none of PNG"):
        read(b"<svg xmlns='http://www.w3.org/2000/svg'/>")


def test_what_else_is_raised_is_a_sentence(read, monkeypatch):
    for error, sentence in (
        (MemoryError(), "the memory does not suffice to decode it"),
        (KeyError(7), r"it is damaged \(KeyError: 7\)"),
        (ValueError("two\nlines \x1b[2J"), r"it is damaged \(two lines \\x1b\[2J\)"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
    ):
        monkeypatch.setattr(
            decoding, "to_array", lambda *args, error=error: (_ for _ in ()).throw(error)
        )
        with pytest.raises(UnreadableImage, match=rf"a\.png: {sentence}$"):
            read(picture_files.noise())


@pytest.mark.parametrize("odd", range(9))
def test_large_jpegs_at_a_fraction_are_the_same_pictures(read, odd, monkeypatch):
    """At 1/8, 1/4 and 1/2, however they are turned and whatever is left over by 8; a picture that
    is not larger is not touched."""
    exif = Image.Exif()
    exif[0x0112] = odd
    smooth = picture_files.noise(40, 50).resize((640 + odd, 512 - odd), Image.Resampling.BICUBIC)
    data = picture_files.encoded(smooth, "JPEG", quality=95, progressive=bool(odd % 2), exif=exif)
    for size in (16, 32, 64, 128):
        fast = read(data, size=size).astype(int)
        monkeypatch.setattr(decoding, "REDUCED", 10**6)
        slow = read(data, size=size).astype(int)
        monkeypatch.undo()
        off = np.abs(fast - slow)
        assert off.max() <= (0 if size == 128 else 6) and off.mean() < 0.8, (size, off.max())
    sizes = []
    to_array = decoding.to_array
    monkeypatch.setattr(
        decoding, "to_array", lambda p, *a: sizes.append(p.width) or to_array(p, *a)
    )
    read(data, size=16)
    assert sizes[0] <= 162 and size == 128


def test_limits_are_of_what_is_decoded(read, monkeypatch):
    monkeypatch.setattr(decoding, "PIXELS", 10_000)
    big = picture_files.noise(128, 128)
    with pytest.raises(UnreadableImage, match=r"128 × 128 pixels, more than the 10000 that are"):
        read(big)
    assert read(big, "JPEG").shape == (3, 8, 8)  # a quarter of it each way
    monkeypatch.setattr(decoding, "LARGE", 100)
    held = []
    to_array = decoding.to_array
    monkeypatch.setattr(
        decoding, "to_array", lambda *a: held.append(decoding._one_large.locked()) or to_array(*a)
    )
    read(picture_files.noise(20, 20))
    read(picture_files.noise(9, 9))
    assert held == [True, False]
    monkeypatch.setattr(decoding, "FILE_BYTES", 50)
    with pytest.raises(UnreadableImage, match="more than the 50 that are read"):
        read(big)


def test_names_are_printable():
    assert cli.shown("größe 日本.png") == "größe 日本.png"
    assert cli.shown("a\nb\x1b[2J\udcff.png") == "a\\nb\\x1b[2J\\udcff.png"
    out = io.StringIO()
    print(cli.sentence(FileNotFoundError(2, "No such file", "a\udcff\n")), file=out)
    out.getvalue().encode()


@pytest.mark.parametrize("name", ["png", "deep png", "grey alpha", "palette", "bits"])
def test_a_flipped_bit_in_a_png_is_noticed(read, name):
    """In its pixels by their checksum; Pillow alone took one in a hundred for another picture."""
    whole = read(data := picture_files.variants()[name])
    for at in range(8, len(data), 1 + len(data) // 150):
        damaged = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        try:
            assert np.array_equal(read(damaged), whole), at
        except UnreadableImage as error:
            assert "a.png: it is" in str(error)

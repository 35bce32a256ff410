"""One picture's file → the bytes that are trained on, whatever lies in the file.

A file is what it says of itself, whatever its suffix: PNG, JPEG, WebP, BMP, GIF, TIFF, PGM or PPM.
Of several frames the first is taken. The picture is turned upright as its EXIF says, laid on white
where it is transparent, cut to the centred square and resized. More than 8 bits become 8 so: 16-bit
pictures by their type's range, 0 … 65535; floats and 32-bit integers by the smallest of 0 … 1
(floats alone), 0 … 255 and 0 … 65535 that holds all values, else by their own least and greatest.

What cannot be read is an UnreadableImage. A small file never takes much memory or time: limits are
below, and large pictures are decoded one at a time.
"""

from __future__ import annotations

import os
import stat
import struct
import threading
import warnings
import zlib
from functools import cache
from typing import BinaryIO

import numpy as np

from . import cli

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # others may start programs: EPS
KNOWN = "PNG, JPEG, WebP, BMP, GIF, TIFF, PGM, PPM"
FILE_BYTES = 1 << 30  # WebP is read whole
# Decoded: 67 million, some 1 GB at the worst. Of a JPEG, what is left after decoding at a fraction.
PIXELS = 1 << 26
LARGE = 1 << 24  # pixels from which one picture is decoded at a time
SCAN_PIXELS = 1 << 32  # of a progressive JPEG: each scan passes over all pixels
# A JPEG is decoded at 1/2, 1/4 or 1/8 where its shorter side stays at least so many times that of
# the result: 5 times as fast from 4000 × 3000 to 64, 2.6 times to 256. From 4 on values of a photo
# differed by 0.2 of 255 on average and by 1 at most, of random colours by 0.6 and 5; at 1, those of
# a photo by 0.7 and 4.
REDUCED = 4
_one_large = threading.Lock()


class UnreadableImage(ValueError):
    """A picture that cannot be decoded; the text names it."""


class Refused(ValueError):
    """A file that is no picture to be decoded; the text says why."""


def read_file(path: str, size: int, channels: int) -> tuple[np.ndarray, bool]:
    """(channels, size, size) uint8, and whether there are more frames. Raises UnreadableImage."""
    try:
        with regular(path) as file:
            return read(file, size, channels)
    except Exception as error:  # for damaged files Pillow's decoders raise a dozen kinds
        raise UnreadableImage(f"{cli.shown(path)}: {reason(error)}") from None


def regular(path: str) -> BinaryIO:
    """Opens a file of bytes. Raises Refused for anything else: a pipe would wait for ever."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise Refused("it is no file of bytes, but a folder, pipe or device")
        if not about.st_size:
            raise Refused("it is empty, 0 bytes")
        if about.st_size > FILE_BYTES:
            raise Refused(f"it has {about.st_size} bytes, more than the {FILE_BYTES} that are read")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def reason(error: Exception) -> str:
    """Why a picture cannot be read, in words."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {KNOWN}, or damaged at its beginning"
    if isinstance(error, MemoryError):
        return "the memory does not suffice to decode it"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more pixels than the {PIXELS} that are decoded; make it smaller"
    text = cli.shown(" ".join(str(error).split()))[:200]
    if isinstance(error, Refused):
        return text
    told = isinstance(error, OSError | ValueError | SyntaxError) and text
    return f"it is damaged ({text if told else f'{type(error).__name__}: {text}'})"


def read(file: BinaryIO, size: int, channels: int) -> tuple[np.ndarray, bool]:
    """As `read_file`, of an open file; raises what Pillow raises."""
    with _pillow().open(file, formats=FORMATS) as picture:
        extent = None
        if picture.format in ("JPEG", "MPO"):  # MPO: a JPEG with a second one behind it
            check_scans(picture, file)
            drafted = picture.draft(None, (REDUCED * size,) * 2)
            extent = drafted[1][2:] if drafted else None
        check_size(picture)
        if picture.format == "PNG":
            check_sums(file)
        if picture.width * picture.height <= LARGE:
            return to_array(picture, size, channels, extent), several(picture)
        with _one_large:
            return to_array(picture, size, channels, extent), several(picture)


@cache
def _pillow():
    """Pillow's Image. Its warnings are silenced: what is wrong with a picture we say ourselves."""
    from PIL import Image

    warnings.filterwarnings("ignore", module=r"PIL\.")
    return Image


def check_size(picture) -> None:
    """Raises Refused for more pixels than PIXELS: of the picture, or of a tile of it (TIFF)."""
    areas = [picture.size]
    if picture.format == "TIFF":
        areas.append(tuple(picture.tag_v2.get(tag, 0) for tag in (322, 323)))
    for width, height in areas:
        if width * height > PIXELS:
            raise Refused(
                f"it has {width} × {height} pixels, more than the {PIXELS} that are decoded; "
                "make it smaller"
            )


def check_sums(file: BinaryIO) -> None:
    """Raises Refused where a PNG's pixels lack their checksum: Pillow does not look at it."""
    where = file.tell()
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind != b"IDAT":
            file.seek(length + 4, os.SEEK_CUR)
            continue
        body, found = file.read(length), file.read(4)
        if len(found) < 4:
            raise Refused("it is truncated")
        if zlib.crc32(body, zlib.crc32(kind)) != int.from_bytes(found, "big"):
            raise Refused("it is damaged (its pixels do not have their checksum)")
    file.seek(where)


def check_scans(picture, file: BinaryIO) -> None:
    """Raises Refused for a progressive JPEG of so many scans that it would take minutes."""
    if not picture.info.get("progressive"):
        return
    where, scans, last = file.tell(), 0, b""
    file.seek(0)
    while chunk := file.read(1 << 20):
        scans += (last + chunk).count(b"\xff\xda")
        last = chunk[-1:]
    file.seek(where)
    if scans * picture.width * picture.height > SCAN_PIXELS:
        raise Refused(
            f"a progressive JPEG of {picture.width} × {picture.height} pixels in {scans} scans "
            "would take minutes: save it anew"
        )


def several(picture) -> bool:
    """Whether the file has more frames or pages than the one decoded."""
    if picture.format == "MPO":  # the second one of a phone's is a preview or a map of depths
        return False
    try:
        return bool(getattr(picture, "is_animated", False))
    except Exception:  # what follows the first frame is damaged
        return True


def to_array(
    picture, size: int, channels: int, extent: tuple[float, float] | None = None
) -> np.ndarray:
    """A Pillow picture → (channels, size, size) uint8: upright, on white, square, resized.

    `extent` is the part of its width and height that is picture: one decoded at 1/8 ends inside its
    last pixel.
    """
    from PIL import Image

    kind = picture.format
    picture, (left, top, width, height) = upright(picture, extent or picture.size)
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        picture = eight_bits(picture, kind)
    elif picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")  # what lies under transparency may be any colour
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    elif picture.mode == "LAB":
        picture = picture.convert("RGB")  # Pillow knows no shorter way to grey
    picture = picture.convert("L" if channels == 1 else "RGB")
    side = min(width, height)
    left, top = left + (width - side) * 0.5, top + (height - side) * 0.5
    box = (left, top, left + side, top + side)
    picture = picture.resize((size, size), Image.Resampling.BICUBIC, box)
    return np.asarray(picture).reshape(size, size, channels).transpose(2, 0, 1)


def upright(picture, extent: tuple[float, float]):
    """The picture, decoded, turned as its EXIF says, or as it lies where that is damaged; and left,
    top, width and height of the `extent` from its upper left corner, turned with it."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    picture.load()  # PNG has its EXIF behind the pixels
    try:
        orientation = picture.getexif().get(0x0112)
        turn = turns.get(orientation)
    except Exception:
        turn = None
    width, height = extent
    if turn is None:
        return picture, (0, 0, width, height)
    picture = picture.transpose(turn)
    if orientation >= 5:
        width, height = height, width
    left = picture.width - width if orientation in (2, 3, 6, 7) else 0
    top = picture.height - height if orientation in (3, 4, 7, 8) else 0
    return picture, (left, top, width, height)


def eight_bits(picture, kind: str | None):
    """Grey of 16 or 32 bits or of floats → a picture of mode L. `kind` is the file's format."""
    from PIL import Image

    values = np.asarray(picture)
    if picture.mode.startswith("I;16"):
        grey = (values >> 8).astype(np.uint8)
        clear = picture.info.get("transparency")
        if isinstance(clear, int):
            grey[values == clear] = 255
    elif picture.mode == "I" and kind in ("PNG", "PPM"):  # 16 bits, in 32 of Pillow's
        grey = (values.clip(0, 65535) >> 8).astype(np.uint8)
    else:
        grey = scaled(values, (1, 255, 65535) if picture.mode == "F" else (255, 65535))
    return Image.fromarray(grey)


def scaled(values: np.ndarray, whites: tuple[int, ...]) -> np.ndarray:
    """Values → uint8 by the first white that is not exceeded, else by their own range.

    NaN is black, an infinity black or white.
    """
    with np.errstate(invalid="ignore"):  # a NaN may be one that signals
        values = values.astype(np.float64)
    finite = np.isfinite(values)
    low = values.min(where=finite, initial=np.inf)
    high = values.max(where=finite, initial=-np.inf)
    if low > high:  # no finite value
        low, high = 0.0, 1.0
    white = next((white for white in whites if low >= 0 and high <= white), None)
    start, span = (low, high - low or 1.0) if white is None else (0.0, white)
    values -= start
    values *= 255 / span
    np.nan_to_num(values, copy=False, nan=0.0, posinf=255.0, neginf=0.0)
    return np.rint(values.clip(0, 255)).astype(np.uint8)

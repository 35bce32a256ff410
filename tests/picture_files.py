"""Pictures as bytes, in every format that is read, and files that lie about what they hold."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def encoded(picture, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=kind, **options)
    return file.getvalue()


def noise(height=24, width=32, seed=0, channels=3) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels))
    return Image.fromarray(pixels.astype(np.uint8).squeeze())


def variants() -> dict[str, bytes]:
    """Small pictures of many kinds, name → file."""
    rgb, grey = noise(), noise(channels=1)
    found = {kind.lower(): encoded(rgb, kind) for kind in FORMATS}
    two = {"save_all": True, "append_images": [noise(seed=1)]}
    deep = np.arange(24 * 32, dtype=np.uint16).reshape(24, 32) * 80
    exif = Image.Exif()
    exif[0x0112] = 6
    return found | {
        "apng": encoded(rgb, "PNG", **two),
        "animated gif": encoded(rgb, "GIF", **two),
        "animated webp": encoded(rgb, "WEBP", lossless=True, **two),
        "pages": encoded(rgb, "TIFF", **two),
        "lossless webp": encoded(rgb, "WEBP", lossless=True),
        "progressive": encoded(rgb, "JPEG", progressive=True),
        "cmyk": encoded(rgb.convert("CMYK"), "JPEG"),
        "exif": encoded(rgb, "JPEG", exif=exif),
        "exif png": encoded(rgb, "PNG", exif=exif),
        "deep png": encoded(Image.fromarray(deep), "PNG"),
        "deep pgm": encoded(Image.fromarray(deep.astype(np.int32)), "PPM"),
        "float tiff": encoded(Image.fromarray(deep.astype(np.float32)), "TIFF"),
        "lzw tiff": encoded(rgb, "TIFF", compression="tiff_lzw"),
        "jpeg tiff": encoded(rgb, "TIFF", compression="jpeg"),
        "packed tiff": encoded(grey, "TIFF", compression="packbits"),
        "palette": encoded(grey.convert("P"), "PNG", transparency=3),
        "bits": encoded(grey.convert("1"), "PNG"),
        "fax": encoded(grey.convert("1"), "TIFF", compression="group4"),
        "grey alpha": encoded(grey.convert("LA"), "PNG"),
    }


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A grey PNG of that size which holds less."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def tiff(**tags: int) -> bytes:
    """A TIFF of one strip of 64 bytes, or with tiles; tags by Pillow's names."""
    numbers = {"width": 256, "height": 257, "compression": 259, "strip": 273, "rows": 278}
    numbers |= {"counts": 279, "tile_width": 322, "tile_height": 323, "tile": 324, "sizes": 325}
    numbers |= {"bits": 258, "photometric": 262, "samples": 277}
    given = {"bits": 8, "compression": 1, "photometric": 1, "samples": 1} | tags
    entries = sorted((numbers[name], value) for name, value in given.items())
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4 + 64)


def bombs() -> dict[str, bytes]:
    """Files of at most a megabyte that ask for gigabytes or for minutes."""
    gif = bytearray(encoded(noise(), "GIF"))
    screen, frame = bytearray(gif), bytearray(gif)
    screen[6:10] = b"\xff" * 4
    at = gif.index(b",", 13 + 3 * 256)
    frame[at + 5 : at + 9] = b"\xff" * 4
    webp = bytearray(variants()["animated webp"])
    at = webp.index(b"VP8X") + 12
    webp[at : at + 6] = struct.pack("<I", 59_999)[:3] * 2
    bmp = bytearray(encoded(noise(), "BMP"))
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    scans = encoded(noise(512, 512), "JPEG", progressive=True)
    last = scans[scans.rindex(b"\xff\xda") : -2]
    text = zlib.compress(bytes(300 << 20), 1)
    return {
        "png": png(30_000, 30_000),
        "flat png": png(1, 2**31 - 1),
        "gif screen": bytes(screen),
        "gif frame": bytes(frame),
        "webp": bytes(webp),
        "bmp": bytes(bmp),
        "ppm": b"P6\n60000 60000\n255\n" + bytes(1000),
        "tiff": tiff(width=60_000, height=60_000, strip=8, counts=64, rows=60_000),
        "tile": tiff(
            width=64, height=64, tile_width=1 << 16, tile_height=1 << 16, tile=8, sizes=64
        ),
        "scans": scans[:-2] + last[:20] * 40_000,
        "text": png(64, 64, chunk(b"zTXt", b"Comment\0\0" + text)),
        "profile": png(64, 64, chunk(b"iCCP", b"profile\0\0" + text)),
    }

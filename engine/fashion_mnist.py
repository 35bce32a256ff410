"""Fashion-MNIST (Xiao et al. 2017): where its files are, and what is in them."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path

import numpy as np

from .cli import neighbour

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
MD5 = {
    "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
RENEW = "put a fresh copy in its place"
LARGEST = 1 << 28  # bytes of an IDX file, unpacked; Fashion-MNIST's have 47 million at most
CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def read(data_dir: str | os.PathLike | None, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 28, 28) and labels (n,) of "train" or "test", uint8.

    From data_dir, else from Debian's package, else downloaded into the user's cache. Raises
    ValueError, FileNotFoundError or ModuleNotFoundError, one sentence that says what to do.
    """
    if split not in ("train", "test"):
        raise ValueError(f"Fashion-MNIST has the splits 'train' and 'test', not {split!r}")
    part = "train" if split == "train" else "t10k"
    images_file = locate(f"{part}-images-idx3-ubyte.gz", data_dir)
    labels_file = locate(f"{part}-labels-idx1-ubyte.gz", data_dir)
    pixels, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if len(pixels) != len(labels):
        raise ValueError(
            f"{images_file} has {len(pixels)} images, but {labels_file} has {len(labels)} labels: "
            f"they are of different data sets, {RENEW}"
        )
    if not len(pixels) or pixels.shape[1:] != (28, 28):
        raise ValueError(
            f"{images_file} holds {len(pixels)} images of {pixels.shape[1]}×{pixels.shape[2]}, "
            f"expected Fashion-MNIST's of 28×28: {RENEW}"
        )
    if labels.max() >= len(CLASSES):
        raise ValueError(f"{labels_file} has a label {labels.max()}, expected 0 … 9: {RENEW}")
    return pixels, labels


def locate(name: str, data_dir: str | os.PathLike | None) -> Path:
    """Where this file is: --data-dir, else Debian's package, else the user's cache (downloaded)."""
    if data_dir is not None:
        folder = Path(data_dir).expanduser()
        for candidate in (folder / name, folder / name.removesuffix(".gz")):
            if candidate.is_file():
                return candidate
        if not folder.is_dir():
            fault = f": there is no such folder{neighbour(folder)}"
        else:
            fault = f" has no {name} (nor the same without .gz)"
        raise FileNotFoundError(
            f"--data-dir {folder}{fault}; give the folder with Fashion-MNIST's four IDX files, or "
            "leave --data-dir out to use Debian's or a download"
        )
    if (DEBIAN / name).is_file():
        return DEBIAN / name
    try:
        import pooch
    except ImportError:
        raise ModuleNotFoundError(
            "downloading Fashion-MNIST needs pooch: pip install pooch, or give a folder with the "
            "files as --data-dir"
        ) from None
    try:
        # pooch checks the sum on every use, so that a damaged cache is fetched anew.
        return Path(
            pooch.retrieve(
                URL + name,
                known_hash=MD5[name],
                fname=name,
                path=Path(pooch.os_cache("diffusion-engine")) / "fashion-mnist",
                progressbar=True,
            )
        )
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError: checksum
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{name} could not be downloaded from {URL} ({reason[:200]}); install "
            "Debian's package dataset-fashion-mnist or give a folder with the files as --data-dir"
        ) from None


def read_idx(path: str | os.PathLike, dims: int) -> np.ndarray:
    """Reads an IDX file of unsigned bytes with `dims` dimensions, plain or gzip → array of uint8.

    Raises ValueError naming the file, what was found and what was expected.
    """
    path = Path(path)
    data, header = bytearray(), 4 + 4 * dims
    expected, damage = header, ""  # bytes: of the header; once that is read, of all
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            # One more than expected tells a file that is too long, and a small gzip file that
            # unpacks to gigabytes is not unpacked. read() would lose what precedes the damage.
            while chunk := file.read1(min(1 << 20, expected + 1 - len(data))):
                data += chunk
                if expected == header and len(data) >= header:
                    expected += _size(path, data, dims)
                if len(data) > expected:
                    break
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        damage = f" ({str(error).rstrip('.')})"
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror or error}): check its permissions"
        ) from None
    if len(data) < header:
        raise ValueError(
            f"{path} is truncated: found {len(data)} bytes, expected a header of {header}{damage}; "
            f"{RENEW}"
        )
    shape = _shape(data, dims)
    of = " × ".join(map(str, shape))
    if len(data) > expected:
        raise ValueError(f"{path} is too long: expected {expected} bytes for {of}; {RENEW}")
    if len(data) < expected or damage:
        fault = "is truncated" if len(data) < expected else "is damaged"
        raise ValueError(
            f"{path} {fault}: found {len(data)} bytes, expected {expected} for {of}{damage}; "
            f"{RENEW}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _shape(data: bytearray, dims: int) -> list[int]:
    return [int.from_bytes(data[4 * i : 4 * i + 4], "big") for i in range(1, dims + 1)]


def _size(path: Path, data: bytearray, dims: int) -> int:
    """Bytes behind the header. Raises ValueError for another kind of file, or a huge one."""
    magic, known = int.from_bytes(data[:4], "big"), 0x0800 + dims
    if magic != known:
        raise ValueError(
            f"{path} is not an IDX file of {dims}-dimensional bytes: "
            f"found magic number 0x{magic:08x}, expected 0x{known:08x}; {RENEW}"
        )
    size = math.prod(_shape(data, dims))
    if size > LARGEST:
        raise ValueError(
            f"{path} announces {size} bytes, more than the {LARGEST} that are read; {RENEW}"
        )
    return size

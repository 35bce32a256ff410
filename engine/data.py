"""Training images: Fashion-MNIST, folders of pictures, Hugging Face data sets.

Whatever the source, a data set is an `Images`: n pictures of C × H × W bytes, with labels where
there are any. `batch` gives step number s its pictures as float32 in [-1, 1]; which pictures those
are depends on (seed, s) alone, so a resumed run goes on with the very pictures that it would have
seen uninterrupted.
"""

from __future__ import annotations

import functools
import gzip
import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
}
FASHION_MNIST_DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
FASHION_MNIST_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"}
MEMORY_LIMIT = 2 << 30  # bytes of pixels; larger data sets are decoded batch by batch


class UnreadableImage(Exception):
    """A picture that cannot be decoded; the text names it."""


@dataclass
class Images:
    """n pictures: `pixels` in memory, or `read(i)` → (C, H, W) uint8, one at a time."""

    name: str
    count: int
    channels: int
    size: int  # H = W, pixels
    pixels: Tensor | None = None  # (n, C, H, W) uint8
    read: Callable[[int], np.ndarray] | None = None
    labels: Tensor | None = None  # (n,) int64
    classes: Sequence[str] = ()
    skipped: list[str] = field(default_factory=list)  # names of unreadable pictures

    def __len__(self) -> int:
        return self.count


def open_dataset(
    name: str,
    *,
    size: int = 28,
    channels: int = 1,
    data_dir: str | os.PathLike | None = None,
    labels: bool = False,
    split: str = "train",
    memory_limit: int = MEMORY_LIMIT,
) -> Images:
    """Opens a data set by name: `fashion-mnist`, a folder of pictures, or a Hugging Face name.

    Pictures come as `channels` (1 grey, 3 RGB) × `size` × `size`. With `labels`, a folder's
    sub-folders are its classes. Raises ValueError, FileNotFoundError or ModuleNotFoundError, one
    sentence, when there is nothing to train on.
    """
    if channels not in (1, 3):
        raise ValueError(f"pictures have 1 channel (grey) or 3 (RGB), not {channels}")
    if size < 1:
        raise ValueError(f"the image size must be at least 1 pixel, not {size}")
    if name == "fashion-mnist":
        return _fashion_mnist(data_dir, split, size, channels)
    if data_dir is not None:
        raise ValueError(f"--data-dir goes with --dataset fashion-mnist only, not with {name!r}")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _folder(folder, size, channels, labels, memory_limit)
    if folder.exists():
        raise ValueError(f"--dataset {name} is a file; give the folder that holds the pictures")
    if name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"--dataset {name}: there is no such folder")
    return _hugging_face(name, split, size, channels, labels, memory_limit)


# --- order and batches --------------------------------------------------------------------------


def generator(seed: int, purpose: int, index: int) -> torch.Generator:
    """A CPU generator that is a function of its three numbers alone."""
    words = np.random.SeedSequence([seed % 2**64, purpose, index]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(words[0] >> 1))


@functools.lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, 0, epoch))


def order(n: int, seed: int, start: int, count: int) -> Tensor:
    """Picture numbers at positions start … start+count-1 of an endless stream.

    Epoch e is positions e·n … (e+1)·n-1 and has its own seeded permutation; a batch may span
    epochs, so none is short.
    """
    parts = []
    while count > 0:
        epoch, offset = divmod(start, n)
        part = _permutation(n, seed, epoch)[offset : offset + count]
        parts.append(part)
        start += len(part)
        count -= len(part)
    return torch.cat(parts)


def batch(
    images: Images, step: int, size: int, *, seed: int, flip: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Batch number `step` → x (size, C, H, W) float32 in [-1, 1], y (size,) int64 or None."""
    indices = order(len(images), seed, step * size, size)
    if images.pixels is not None:
        pixels = images.pixels[indices]
    else:
        pixels, indices = _decode(images, indices)
    x = pixels.float().div_(127.5).sub_(1.0)
    if flip:
        mirrored = torch.rand(size, generator=generator(seed, 1, step)) < 0.5
        x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    return x, None if images.labels is None else images.labels[indices]


def batches(
    images: Images, size: int, *, seed: int, flip: bool = False, start: int = 0
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches number start, start+1, …; what must be decoded is decoded one batch ahead."""
    if images.pixels is not None:
        while True:
            yield batch(images, start, size, seed=seed, flip=flip)
            start += 1
    with ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(batch, images, start, size, seed=seed, flip=flip)
        while True:
            ready, start = following.result(), start + 1
            following = ahead.submit(batch, images, start, size, seed=seed, flip=flip)
            yield ready


def _decode(images: Images, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Decodes a batch in threads; an unreadable picture is replaced by the next readable one."""

    def one(index: int) -> tuple[int, np.ndarray]:
        for candidate in range(index, index + len(images)):
            candidate %= len(images)
            try:
                return candidate, images.read(candidate)
            except UnreadableImage as error:
                _skip(images, str(error))
        raise ValueError(f"{images.name}: none of the {len(images)} pictures can be read")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = list(pool.map(one, indices.tolist()))
    pixels = torch.from_numpy(np.stack([picture for _, picture in decoded]))
    return pixels, torch.tensor([index for index, _ in decoded])


def _skip(images: Images, sentence: str) -> None:
    if sentence not in images.skipped:
        images.skipped.append(sentence)
        print(f"skipped ({len(images.skipped)} so far): {sentence}", file=sys.stderr)


# --- Fashion-MNIST ------------------------------------------------------------------------------


def _fashion_mnist(data_dir, split: str, size: int, channels: int) -> Images:
    if split not in ("train", "test"):
        raise ValueError(f"Fashion-MNIST has the splits 'train' and 'test', not {split!r}")
    part = "train" if split == "train" else "t10k"
    images_file = _fashion_mnist_file(f"{part}-images-idx3-ubyte.gz", data_dir)
    labels_file = _fashion_mnist_file(f"{part}-labels-idx1-ubyte.gz", data_dir)
    pixels, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if len(pixels) != len(labels):
        raise ValueError(
            f"{images_file} has {len(pixels)} images, but {labels_file} has {len(labels)} labels"
        )
    if not len(pixels):
        raise ValueError(f"{images_file} holds no image")
    x = torch.from_numpy(pixels).unsqueeze(1)  # (n, 1, 28, 28)
    if x.shape[2:] != (size, size):
        resize = functools.partial(
            torch.nn.functional.interpolate, size=(size, size), mode="bilinear", antialias=True
        )
        x = torch.cat([resize(part) for part in x.split(4096)])  # uint8 in, uint8 out
    return Images(
        "fashion-mnist",
        len(x),
        channels,
        size,
        pixels=x.expand(-1, channels, -1, -1),
        labels=torch.from_numpy(labels.astype(np.int64)),
        classes=FASHION_MNIST_CLASSES,
    )


def _fashion_mnist_file(name: str, data_dir) -> Path:
    """Where this file is: --data-dir, else Debian's package, else the user's cache (downloaded)."""
    if data_dir is not None:
        folder = Path(data_dir).expanduser()
        for candidate in (folder / name, folder / name.removesuffix(".gz")):
            if candidate.is_file():
                return candidate
        raise FileNotFoundError(f"--data-dir {folder} has no {name} (nor the same without .gz)")
    if (FASHION_MNIST_DEBIAN / name).is_file():
        return FASHION_MNIST_DEBIAN / name
    try:
        import pooch
    except ImportError:
        raise ModuleNotFoundError(
            "downloading Fashion-MNIST needs pooch: pip install 'diffusion-engine[train]'"
        ) from None
    try:
        # pooch checks the sum on every use, so that a damaged cache is fetched anew.
        return Path(
            pooch.retrieve(
                FASHION_MNIST_URL + name,
                known_hash=FASHION_MNIST_MD5[name],
                fname=name,
                path=Path(pooch.os_cache("diffusion-engine")) / "fashion-mnist",
                progressbar=True,
            )
        )
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError: checksum
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{name} could not be downloaded from {FASHION_MNIST_URL} ({reason[:200]}); install "
            "Debian's package dataset-fashion-mnist or give a folder with the files as --data-dir"
        ) from None


def read_idx(path: str | os.PathLike, dims: int) -> np.ndarray:
    """Reads an IDX file of unsigned bytes with `dims` dimensions, plain or gzip → array of uint8.

    Raises ValueError naming the file, what was found and what was expected.
    """
    path = Path(path)
    data = bytearray()
    damage = ""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            while chunk := file.read1(1 << 20):  # read() would lose what precedes the damage
                data += chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        damage = f" ({str(error).rstrip('.')})"
    header = 4 + 4 * dims
    if len(data) < header:
        raise ValueError(
            f"{path} is truncated: found {len(data)} bytes, expected a header of {header}{damage}"
        )
    magic, expected = int.from_bytes(data[:4], "big"), 0x0800 + dims
    if magic != expected:
        raise ValueError(
            f"{path} is not an IDX file of {dims}-dimensional bytes: "
            f"found magic number 0x{magic:08x}, expected 0x{expected:08x}"
        )
    shape = [int.from_bytes(data[4 * i : 4 * i + 4], "big") for i in range(1, dims + 1)]
    size = math.prod(shape)
    if len(data) != header + size:
        fault = "is truncated" if len(data) < header + size else "is too long"
        raise ValueError(
            f"{path} {fault}: found {len(data)} bytes, expected {header + size} for "
            f"{' × '.join(map(str, shape))}{damage}"
        )
    return np.frombuffer(data, np.uint8, size, header).reshape(shape)


# --- folders and Hugging Face -------------------------------------------------------------------


def _folder(folder: Path, size: int, channels: int, labels: bool, memory_limit: int) -> Images:
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    if not files:
        raise ValueError(f"{folder} holds no picture ({', '.join(sorted(SUFFIXES))})")
    classes, numbers = (), None
    if labels:
        loose = [f for f in files if f.parent == folder]
        if loose:
            raise ValueError(
                f"{loose[0]} lies in no class folder: for labels, every picture must be in a "
                f"sub-folder of {folder}"
            )
        names = [f.relative_to(folder).parts[0] for f in files]
        classes = sorted(set(names))
        numbers = torch.tensor([classes.index(name) for name in names])

    def read(index: int) -> np.ndarray:
        from PIL import Image

        try:
            with Image.open(files[index]) as picture:
                return to_array(picture, size, channels)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UnreadableImage(f"{files[index]}: {error}") from None

    images = Images(
        str(folder), len(files), channels, size, read=read, labels=numbers, classes=classes
    )
    return _into_memory(images, memory_limit)


def _hugging_face(
    name: str, split: str, size: int, channels: int, labels: bool, memory_limit: int
) -> Images:
    try:
        import datasets
    except ImportError:
        raise ModuleNotFoundError(
            f"--dataset {name} is neither fashion-mnist nor a folder here; to load it as a Hugging "
            "Face data set, pip install 'diffusion-engine[datasets]'"
        ) from None
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen kinds: unknown name, network, format
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"--dataset {name}: Hugging Face could not load it ({reason})") from None
    kinds = {column: type(kind).__name__ for column, kind in table.features.items()}
    column = next((c for c, kind in kinds.items() if kind == "Image"), None)
    if column is None:
        raise ValueError(f"--dataset {name} has no image column among {sorted(kinds)}")
    if not len(table):
        raise ValueError(f"--dataset {name} is empty")
    label = next((c for c, kind in kinds.items() if kind == "ClassLabel"), None)
    if labels and label is None:
        raise ValueError(f"--dataset {name} has no class labels among its columns {sorted(kinds)}")

    def read(index: int) -> np.ndarray:
        try:
            return to_array(table[index][column], size, channels)
        except (OSError, SyntaxError, ValueError) as error:
            raise UnreadableImage(f"{name} row {index}: {error}") from None

    images = Images(name, len(table), channels, size, read=read)
    if label is not None:
        images.labels = torch.tensor(table[label])
        images.classes = table.features[label].names
    return _into_memory(images, memory_limit)


def to_array(picture, size: int, channels: int) -> np.ndarray:
    """A Pillow picture → (channels, size, size) uint8: upright by EXIF, centre-cropped, resized."""
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):  # convert("L") would clip 16-bit grey at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    picture = picture.convert("L" if channels == 1 else "RGB")
    picture = ImageOps.fit(picture, (size, size), method=Image.Resampling.BICUBIC)
    return np.asarray(picture).reshape(size, size, channels).transpose(2, 0, 1)


def _into_memory(images: Images, memory_limit: int) -> Images:
    """Decodes everything once where it fits the limit, leaving unreadable pictures out."""
    if len(images) * images.channels * images.size**2 > memory_limit:
        return images
    from tqdm import tqdm

    def one(index: int) -> np.ndarray | str:
        try:
            return images.read(index)
        except UnreadableImage as error:
            return str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(one, range(len(images)))
        progress = tqdm(results, images.name, len(images), unit=" pictures", leave=False, delay=1)
        decoded = list(progress)
    readable = [i for i, result in enumerate(decoded) if not isinstance(result, str)]
    images.skipped = [result for result in decoded if isinstance(result, str)]
    for sentence in images.skipped[:10]:
        print(f"skipped: {sentence}", file=sys.stderr)
    if images.skipped:
        print(
            f"{len(images.skipped)} of {len(decoded)} pictures in {images.name} could not be read "
            "and were skipped",
            file=sys.stderr,
        )
    if not readable:
        raise ValueError(f"{images.name}: none of the {len(decoded)} pictures can be read")
    images.pixels = torch.from_numpy(np.stack([decoded[i] for i in readable]))
    images.count, images.read = len(readable), None
    if images.labels is not None:
        images.labels = images.labels[readable]
    return images

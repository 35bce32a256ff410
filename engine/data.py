"""Training images: Fashion-MNIST, folders of pictures, Hugging Face data sets.

Whatever the source, a data set is an `Images`: n pictures of C × H × W bytes, with labels where
there are any. `batch` gives step number s its pictures as float32 in [-1, 1]; which pictures those
are depends on (seed, s) alone, so a resumed run goes on with the very pictures that it would have
seen uninterrupted.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import cli, decoded, decoding, fashion_mnist, hugging_face, picture_folder
from .decoding import UnreadableImage
from .images import Images, decoded_in_turn, into_memory, kept, none_readable, skip

NAMES = ("fashion-mnist",)
CHOICES = "fashion-mnist, a folder of pictures, or a Hugging Face name such as uoft-cs/cifar10"
MEMORY_LIMIT = 2 << 30  # bytes of pixels; larger data sets are decoded batch by batch


def open_dataset(
    name: str,
    *,
    size: int = 28,
    channels: int = 1,
    data_dir: str | os.PathLike | None = None,
    labels: bool = False,
    split: str = "train",
    memory_limit: int = MEMORY_LIMIT,
    cache: Path | None = None,
) -> Images:
    """Opens a data set by name: `fashion-mnist`, a folder of pictures, or a Hugging Face name.

    Pictures come as `channels` (1 grey, 3 RGB) × `size` × `size`. With `labels`, a folder's
    sub-folders are its classes. With `cache`, a place for files, a folder's pictures are decoded
    once and mapped into memory from there (engine.decoded), whatever their number. Raises
    ValueError, FileNotFoundError or ModuleNotFoundError, one sentence, when there is nothing to
    train on.
    """
    if channels not in (1, 3):
        raise ValueError(f"the channels of pictures must be 1 (grey) or 3 (RGB), not {channels}")
    if size < 1:
        raise ValueError(f"the image size must be at least 1 pixel, not {size}")
    name = os.fspath(name)
    if name == "fashion-mnist":
        return _fashion_mnist(data_dir, split, size, channels)
    if not name:
        raise ValueError(f"--dataset is empty: give {CHOICES}")
    try:
        folder = Path(name).expanduser()
    except RuntimeError:  # ~name of no user
        raise FileNotFoundError(
            f"--dataset {name}: there is no such user; give {CHOICES}"
        ) from None
    if folder.is_file():
        raise ValueError(
            f"--dataset {name} is a file: give the folder that holds the pictures, an archive "
            "unpacked"
        )
    if not folder.is_dir():
        _check_name(name)
    if data_dir is not None:
        raise ValueError(
            f"--data-dir goes with --dataset fashion-mnist only, not with {name!r}: leave it out"
        )
    if folder.is_dir():
        return _folder(folder, size, channels, labels, memory_limit, cache)
    return _hugging_face(name, split, size, channels, labels, memory_limit)


def _check_name(name: str) -> None:
    """Raises ValueError for a near miss of a name that we know, and for a folder's path."""
    spelled = name.lower().replace("_", "-").replace(" ", "-")
    for known in difflib.get_close_matches(spelled, NAMES, cutoff=0.8):
        raise ValueError(f"--dataset {name} is unknown: did you mean {known}? Known are {CHOICES}")
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise FileNotFoundError(
            f"--dataset {name}: there is no such folder{cli.neighbour(name)}; give {CHOICES}"
        )


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
    images: Images,
    step: int,
    size: int,
    *,
    seed: int,
    flip: bool = False,
    part: Tensor | None = None,  # (n,) int64, positions in the batch; all of them unless given
) -> tuple[Tensor, Tensor | None]:
    """Batch number `step` → x (size, C, H, W) float32 in [-1, 1], y (size,) int64 or None.

    With `part`, x and y have those n of the pictures alone, and no other one is decoded.
    """
    indices = order(len(images), seed, step * size, size)
    if part is not None:
        indices = indices[part]
    if images.pixels is not None:
        pixels = images.pixels[indices]
    else:
        pixels, indices = decode(images, indices)
    x = pixels.float().div_(127.5).sub_(1.0)
    if flip:
        mirrored = torch.rand(size, generator=generator(seed, 1, step)) < 0.5
        mirrored = mirrored if part is None else mirrored[part]
        x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    if images.unit:
        x = x.add_(1.0).div_(2.0)
    return x, None if images.labels is None else images.labels[indices]


def batches(
    images: Images,
    size: int,
    *,
    seed: int,
    flip: bool = False,
    start: int = 0,
    part: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches number start, start+1, …; what must be decoded is decoded one batch ahead."""
    if images.pixels is not None:
        while True:
            yield batch(images, start, size, seed=seed, flip=flip, part=part)
            start += 1
    with ThreadPoolExecutor(1) as ahead:
        given = {"seed": seed, "flip": flip, "part": part}
        following = ahead.submit(batch, images, start, size, **given)
        while True:
            ready, start = following.result(), start + 1
            following = ahead.submit(batch, images, start, size, **given)
            yield ready


def decode(images: Images, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels (n, C, H, W) uint8 and the numbers of the pictures, decoded in threads.

    An unreadable picture is replaced by the next readable one.
    """

    def one(index: int) -> tuple[int, np.ndarray]:
        for candidate in range(index, index + len(images)):
            candidate %= len(images)
            if candidate in images.unreadable:
                continue
            try:
                return candidate, images.read(candidate)
            except UnreadableImage as error:
                skip(images, candidate, str(error))
        raise ValueError(none_readable(images))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = list(pool.map(one, indices.tolist()))
    pixels = torch.from_numpy(np.stack([picture for _, picture in decoded]))
    return pixels, torch.tensor([index for index, _ in decoded])


def in_order(images: Images, indices: Tensor, size: int) -> Iterator[Tensor]:
    """The pictures of these numbers once, as they are: (≤ size, C, H, W) uint8."""
    for some in indices.split(size):
        yield images.pixels[some] if images.pixels is not None else decode(images, some)[0]


def subset(images: Images, indices: Tensor) -> Images:
    """The data set of these pictures alone."""
    pixels = None if images.pixels is None else images.pixels[indices]
    read = None if images.read is None else lambda i: images.read(int(indices[i]))
    labels = None if images.labels is None else images.labels[indices]
    file = None if images.file is None else lambda i: images.file(int(indices[i]))
    return dataclasses.replace(
        images,
        count=len(indices),
        pixels=pixels,
        read=read,
        labels=labels,
        unreadable=set(),
        digest="",
        file=file,
    )


# --- Fashion-MNIST ------------------------------------------------------------------------------


def _fashion_mnist(data_dir, split: str, size: int, channels: int) -> Images:
    pixels, labels = fashion_mnist.read(data_dir, split)
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
        classes=fashion_mnist.CLASSES,
    )


# --- folders and Hugging Face -------------------------------------------------------------------


def _folder(
    folder: Path, size: int, channels: int, labels: bool, memory_limit: int, cache: Path | None
) -> Images:
    found = picture_folder.Listing(folder)
    names = found.names
    if not len(names):
        raise ValueError(found.no_picture())
    classes, numbers = found.labels() if labels else ((), None)
    told = []

    def read(index: int) -> np.ndarray:
        path = found.path(index)
        picture, more = decoding.read_file(path, size, channels)
        if more and not told:
            told.append(path)
            print(
                f"{cli.shown(path)} has several frames: of it, and of others like it, the first "
                "is taken",
                file=sys.stderr,
            )
        return picture

    images = Images(
        str(folder),
        len(names),
        channels,
        size,
        read=read,
        labels=None if numbers is None else torch.from_numpy(numbers),
        classes=classes,
        digest=names.digest(),
    )
    images.file = lambda i: names[i]
    if cache is not None:
        entry = decoded.Entry(cache, folder, names, size, channels)
        found_there = None
        if entry.bytes >= decoded.SMALLEST:
            found_there = decoded.cached(entry, decoded_in_turn(images))
        if found_there is not None:
            pixels, unreadable = found_there
            return kept(images, torch.from_numpy(pixels), unreadable)
    return into_memory(images, memory_limit)


def _hugging_face(
    name: str, split: str, size: int, channels: int, labels: bool, memory_limit: int
) -> Images:
    table = hugging_face.Table(name, split, labels, CHOICES)
    images = Images(name, len(table), channels, size)
    images.read = lambda index: table.read(index, size, channels)
    if table.labels is not None:
        images.labels = torch.from_numpy(table.labels)
        images.classes = table.classes
    return into_memory(images, memory_limit)

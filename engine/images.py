"""Pictures of one size: in memory, or decoded one by one, less those that cannot be read."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from . import cli
from .decoding import UnreadableImage


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
    unit: bool = False  # batches in [0, 1] in place of [−1, 1]
    skipped: list[str] = field(default_factory=list)  # of unreadable pictures, why
    unreadable: set[int] = field(default_factory=set)  # found so batch by batch
    digest: str = ""  # of a folder's names in order, less the unreadable
    file: Callable[[int], str] | None = None  # name of picture i, in a folder

    def __len__(self) -> int:
        return self.count


def into_memory(images: Images, memory_limit: int) -> Images:
    """Decodes everything once where it fits the limit, leaving unreadable pictures out."""
    shape = (len(images), images.channels, images.size, images.size)
    if math.prod(shape) > memory_limit:
        return images
    pixels, count, unreadable = np.empty(shape, np.uint8), 0, {}
    for i, picture in enumerate(decoded_in_turn(images)):
        if isinstance(picture, str):
            unreadable[i] = picture
        else:
            pixels[count] = picture
            count += 1
    return kept(images, torch.from_numpy(pixels[:count]), unreadable)


def decoded_in_turn(images: Images) -> Iterator[np.ndarray | str]:
    """Every picture in turn, decoded in threads; of an unreadable one, why."""
    from tqdm import tqdm

    def one(index: int) -> np.ndarray | str:
        try:
            return images.read(index)
        except UnreadableImage as error:
            return str(error)

    title = cli.shown(images.name)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # In pieces, so that a slow reader of this stream does not make all pictures wait in memory.
        parts = (
            pool.map(one, range(start, min(start + 512, len(images))))
            for start in range(0, len(images), 512)
        )
        results = itertools.chain.from_iterable(parts)
        yield from tqdm(results, title, len(images), unit=" pictures", leave=False, delay=1)


def kept(images: Images, pixels: Tensor, unreadable: dict[int, str]) -> Images:
    """The data set of its readable pictures; says which ones were not."""
    images.skipped = list(unreadable.values())
    for sentence in images.skipped[:10]:
        print(f"skipped: {sentence}", file=sys.stderr)
    if unreadable:
        print(
            f"{len(unreadable)} of {len(images)} pictures in {cli.shown(images.name)} could not be "
            "read and were skipped",
            file=sys.stderr,
        )
    if len(unreadable) == len(images):
        raise ValueError(none_readable(images))
    if unreadable:
        mask = torch.ones(len(images), dtype=torch.bool)
        mask[list(unreadable)] = False
        left = mask.nonzero().flatten()
        if images.labels is not None:
            images.labels = images.labels[left]
        if (whole := images.file) is not None:
            images.file = lambda i: whole(int(left[i]))
    if images.digest:
        without = f"{images.digest} {list(unreadable)}" if unreadable else images.digest
        images.digest = hashlib.sha256(without.encode()).hexdigest()
    images.pixels, images.read = pixels, None
    images.count -= len(unreadable)
    return images


def none_readable(images: Images) -> str:
    return (
        f"{cli.shown(images.name)}: none of the {len(images)} pictures can be read (the first: "
        f"{images.skipped[0]}); give a folder of whole pictures"
    )


def skip(images: Images, index: int, sentence: str) -> None:
    if index in images.unreadable:  # another thread was faster
        return
    images.unreadable.add(index)
    images.skipped.append(sentence)
    count = len(images.skipped)
    if count <= 10 or count % 1000 == 0:  # a folder may have a million broken ones
        print(f"skipped ({count} so far): {sentence}", file=sys.stderr)

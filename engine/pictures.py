"""Pictures of images: grids, strips of the reverse process, films; whole or not there."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # late: the command lines answer --help without torch
    import numpy as np
    from torch import Tensor


def to_bytes(images: Tensor) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1], any float dtype → (N, H, W, C) uint8."""
    import torch

    scaled = images.detach().float().add(1).mul(127.5).round_().clamp_(0, 255)
    return scaled.nan_to_num_(0).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def sheet(images: Tensor, *, columns: int | None = None, scale: int = 2) -> np.ndarray:
    """Images (N, C, H, W) in [-1, 1] in rows of `columns` → (height, width, C) uint8.

    The default is as square as can be. Each pixel becomes scale × scale pixels; C is 1 or 3.
    """
    import numpy as np

    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(f"a grid needs images (N, 1 or 3, H, W), N ≥ 1, not {tuple(images.shape)}")
    pixels = to_bytes(images)
    n, h, w, c = pixels.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    gap = 1
    drawn = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, c), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * (h + gap) + gap, i % columns * (w + gap) + gap
        drawn[top : top + h, left : left + w] = image
    return drawn.repeat(scale, 0).repeat(scale, 1)


def to_picture(pixels: np.ndarray):
    """(H, W, 1 or 3) uint8 → a Pillow picture, grey or RGB."""
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def grid(
    images: Tensor, path: str | os.PathLike, *, columns: int | None = None, scale: int = 2
) -> Path:
    """Draws images (N, C, H, W) in [-1, 1] as a `sheet`."""
    picture = to_picture(sheet(images, columns=columns, scale=scale))
    with atomic(path) as temporary:
        picture.save(temporary, format="PNG")
    return Path(path)


def strip(states: Sequence[Tensor], path: str | os.PathLike, *, scale: int = 2) -> Path:
    """Draws the reverse process, one row per image: states x_T … x_0, each (N, C, H, W)."""
    import torch

    if not len(states):
        raise ValueError("a strip needs at least one state")
    table = torch.stack([state.float() for state in states], dim=1)  # (N, states, C, H, W)
    return grid(table.flatten(0, 1), path, columns=len(states), scale=scale)


def film(
    states: Sequence[Tensor], path: str | os.PathLike, *, seconds: float = 4.0, scale: int = 2
) -> Path:
    """Draws the states x_T … x_0, each (N, C, H, W), as an endless GIF; the last one stays 2 s."""
    if not len(states):
        raise ValueError("a film needs at least one state")
    first, *others = (to_picture(sheet(state, scale=scale)) for state in states)
    moment = max(20, round(1000 * seconds / len(states)))  # ms; browsers slow shorter ones down
    with atomic(path) as temporary:
        first.save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=others,
            duration=[moment] * len(others) + [2000],
            loop=0,
        )
    return Path(path)


@contextlib.contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it when all went well and removed when not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename and os.fspath(path)  # the name that a user knows
        if error.errno:  # a full disk names no file, a folder without permission the temporary one
            error.filename = os.fspath(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)

"""What is dear to compute and cheap to keep: safetensors files in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint_file, data


def folder(given: str | os.PathLike | None = None) -> Path:
    """`given`, else $XDG_CACHE_HOME/diffusion-engine, else ~/.cache/diffusion-engine."""
    if given is not None:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "diffusion-engine"


def digest(*things) -> str:
    """16 hexadecimal digits of SHA-256 over things that JSON can hold; the key of a file."""
    return hashlib.sha256(json.dumps(things, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(images: data.Images) -> str:
    """A digest of size, labels and up to 256 evenly spaced pictures of a data set."""
    at = torch.linspace(0, len(images) - 1, min(256, len(images))).long()
    some = b"".join(p.contiguous().numpy().tobytes() for p in data.in_order(images, at, 64))
    labels = b"" if images.labels is None else images.labels.contiguous().numpy().tobytes()
    sums = [hashlib.sha256(part).hexdigest() for part in (some, labels)]
    return digest(len(images), images.channels, images.size, *sums)


def identity(images: data.Images) -> dict:
    """What the order of the pictures in a run rests on: how many, and a digest of which they are;
    of a folder's by their names, since a new version of a decoder makes other pixels."""
    return {"count": len(images), "digest": images.digest or fingerprint(images)}


def load(path: Path) -> tuple[dict[str, Tensor], dict] | None:
    """Tensors and info of a file that `store` wrote; None if it is not there or not whole."""
    try:
        return checkpoint_file.read(path) if path.is_file() else None
    except checkpoint_file.CheckpointError:
        return None  # it is made anew


def store(path: Path, tensors: dict[str, Tensor], info: dict) -> None:
    """Writes the file atomically. Raises OSError where that cannot be done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint_file.write(path, tensors, info)

"""Pictures of a folder, decoded once: a file of bytes that later runs map into memory.

A cache entry is a folder <pictures>-<state> with pixels.u8, the readable pictures' (C, H, W) bytes
end to end, and index.json, which says which are missing, why, and the checksums of parts of
pixels.u8. <pictures> stands for folder, size and colours; <state> for names, sizes and times of
change of all files: a file that is added, removed or changed makes another state, and the old entry
is removed. An entry comes into being whole, by a rename; a damaged one counts as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .picture_folder import Names

FORMAT = 2  # of the entry, and of what decoding does: another one is another state
SMALLEST = 4 << 20  # bytes of picture files from which a folder is worth an entry
SPARE = 1 << 30  # bytes that an entry leaves free on its disk, for checkpoints
PART = 1 << 24  # bytes with a checksum of their own; crc32 reads 2 GB/s on a core


def place() -> Path:
    """$XDG_CACHE_HOME/diffusion-engine/pictures, or under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "diffusion-engine" / "pictures"


class Entry:
    """The place of the decoded pictures `names` of a folder in a cache.

    Every file is asked for its size and time of change; one that is gone has none.
    """

    def __init__(self, cache: Path, folder: Path, names: Names, size: int, channels: int) -> None:
        self.shape = (channels, size, size)
        self.count, self.bytes = len(names), 0
        state = hashlib.sha256(f"{FORMAT} {names.digest()}".encode())
        for name in names:
            try:
                about = os.stat(os.path.join(folder, name))
            except OSError:
                state.update(b" gone")
            else:
                self.bytes += about.st_size
                state.update(b" %d %d" % (about.st_size, about.st_mtime_ns))
        self.start = _digest(str(folder.resolve()), size, channels)
        self.path = cache / f"{self.start}-{state.hexdigest()[:16]}"

    def load(self) -> tuple[np.ndarray, dict[int, str]] | None:
        """Pixels (n, C, H, W) uint8, mapped copy-on-write, and which pictures are missing, why.

        None if they are not there or not whole.
        """
        try:
            index = json.loads((self.path / "index.json").read_text())
            unreadable = dict(zip(index["unreadable"], index["skipped"], strict=True))
            if not self._plausible(index["unreadable"], unreadable):
                return None
            shape = (self.count - len(unreadable), *self.shape)
            file = self.path / "pixels.u8"
            if not shape[0] or file.stat().st_size != np.prod(shape):
                return None
            pixels = np.memmap(file, np.uint8, "c", shape=shape)
            return (pixels, unreadable) if _sums(pixels) == index["sums"] else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def _plausible(self, numbers: list, unreadable: dict) -> bool:
        return (
            all(type(i) is int and 0 <= i < self.count for i in numbers)
            and sorted(unreadable) == numbers
            and all(isinstance(why, str) for why in unreadable.values())
        )

    def store(self, pictures: Iterable[np.ndarray | str]) -> None:
        """Writes pictures (C, H, W), or why one cannot be read; one at a time is in memory.

        Raises OSError, and leaves nothing behind, where that cannot be done.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._sweep()
        needed, free = self.count * int(np.prod(self.shape)), shutil.disk_usage(self.path.parent)[2]
        if needed + SPARE > free:
            raise OSError(
                f"{needed >> 20} MiB are needed beside {SPARE >> 20} MiB that stay free, and "
                f"{free >> 20} MiB are free"
            )
        temporary = Path(tempfile.mkdtemp(prefix=f"{self.path.name}.", dir=self.path.parent))
        try:
            index: dict[str, list] = {"unreadable": [], "skipped": []}
            with open(temporary / "pixels.u8", "wb") as file:
                for i, picture in enumerate(pictures):
                    if isinstance(picture, str):
                        index["unreadable"].append(i)
                        index["skipped"].append(picture)
                    else:
                        file.write(np.ascontiguousarray(picture, np.uint8))
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            mapped = np.memmap(temporary / "pixels.u8", np.uint8, "r") if size else np.empty(0)
            index["sums"] = _sums(mapped)
            (temporary / "index.json").write_text(json.dumps(index))
            if self.path.exists():  # damaged, or another process was faster
                shutil.rmtree(self.path, ignore_errors=True)
            with contextlib.suppress(FileExistsError):
                try:
                    os.rename(temporary, self.path)
                except OSError:  # not empty: another process's, as good as ours
                    if self.load() is None:
                        raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for other in self.path.parent.glob(f"{self.start}-*"):  # states of before
            if "." not in other.name and other != self.path:
                shutil.rmtree(other, ignore_errors=True)  # who has it mapped keeps it

    def _sweep(self) -> None:
        """Removes what killed processes were writing: nothing was added to it for an hour."""
        for place in self.path.parent.glob("*-*.*"):
            with contextlib.suppress(OSError):
                inside = max((file.stat().st_mtime for file in place.iterdir()), default=0)
                if time.time() - max(inside, place.stat().st_mtime) > 3600:
                    shutil.rmtree(place, ignore_errors=True)


def cached(
    entry: Entry, pictures: Iterable[np.ndarray | str]
) -> tuple[np.ndarray, dict[int, str]] | None:
    """The entry, made if it is not there; None, after a word on stderr, where none can be made."""
    found = entry.load()
    if found is not None:
        return found
    try:
        entry.store(pictures)
    except OSError as error:
        why = error.strerror or error
        print(f"decoded pictures are not kept in {entry.path.parent}: {why}", file=sys.stderr)
        return None
    return entry.load()


def _sums(pixels: np.ndarray) -> list[int]:
    """crc32 of every PART bytes, on all cores."""
    flat = pixels.reshape(-1)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(zlib.crc32, (flat[i : i + PART] for i in range(0, len(flat), PART))))


def _digest(*things) -> str:
    return hashlib.sha256(json.dumps(things).encode()).hexdigest()[:16]

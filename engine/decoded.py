"""Pictures of a folder, decoded once: a file of bytes that later runs map into memory.

A cache entry is a folder <pictures>-<state> with pixels.u8, the readable pictures' (C, H, W) bytes
end to end, and index.json, which says which those are, and why others were left out. <pictures>
stands for folder, size and colours; <state> for names, sizes and times of change of all files: a
file that is added, removed or changed makes another state, and the old entry is removed. An entry
comes into being whole, by a rename; a damaged one counts as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

FORMAT = 1  # of the entry, and of what decoding does: another one is another state
SMALLEST = 4 << 20  # bytes of picture files from which a folder is worth an entry


def place() -> Path:
    """$XDG_CACHE_HOME/diffusion-engine/pictures, or under ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "diffusion-engine" / "pictures"


class Entry:
    """The place of the decoded pictures of `files` in a cache. Raises OSError for a lost file."""

    def __init__(
        self, cache: Path, folder: Path, files: Sequence[Path], size: int, channels: int
    ) -> None:
        self.shape = (channels, size, size)
        folder = folder.resolve()
        stats = [file.stat() for file in files]
        self.bytes = sum(stat.st_size for stat in stats)
        state = [
            (os.fspath(file), stat.st_size, stat.st_mtime_ns)
            for file, stat in zip(files, stats, strict=True)
        ]
        self.start = _digest(str(folder), size, channels)
        self.path = cache / f"{self.start}-{_digest(FORMAT, state)}"

    def load(self) -> tuple[np.ndarray, dict] | None:
        """Pixels (n, C, H, W) uint8, mapped copy-on-write, and the index; None if not there."""
        try:
            index = json.loads((self.path / "index.json").read_text())
            shape = (len(index["readable"]), *self.shape)
            file = self.path / "pixels.u8"
            if not shape[0] or file.stat().st_size != np.prod(shape):
                return None
            return np.memmap(file, np.uint8, "c", shape=shape), index
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def store(self, pictures: Iterable[np.ndarray | str]) -> None:
        """Writes pictures (C, H, W), or why one cannot be read; one at a time is in memory.

        Raises OSError, and leaves nothing behind, where that cannot be done.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{self.path.name}.", dir=self.path.parent))
        try:
            index: dict[str, list] = {"readable": [], "skipped": []}
            with open(temporary / "pixels.u8", "wb") as file:
                for i, picture in enumerate(pictures):
                    if isinstance(picture, str):
                        index["skipped"].append(picture)
                    else:
                        file.write(np.ascontiguousarray(picture, np.uint8))
                        index["readable"].append(i)
                file.flush()
                os.fsync(file.fileno())
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


def cached(entry: Entry, pictures: Iterable[np.ndarray | str]) -> tuple[np.ndarray, dict] | None:
    """The entry, made if it is not there; None, after a word on stderr, where none can be made."""
    found = entry.load()
    if found is not None:
        return found
    try:
        entry.store(pictures)
    except OSError as error:
        print(f"decoded pictures are not kept in {entry.path.parent}: {error}", file=sys.stderr)
        return None
    return entry.load()


def _digest(*things) -> str:
    return hashlib.sha256(json.dumps(things).encode()).hexdigest()[:16]

"""The file of a checkpoint: safetensors with checksums, written whole or not at all; no pickle.

    metadata["diffusion_engine"]         JSON: what the tensors are of, "format", and under "sums"
                                         the SHA-256 of every tensor's name, dtype, shape and bytes
    metadata["diffusion_engine.sha256"]  the SHA-256 of that text

So a reader of some tensors checks these alone, and one of the metadata reads nothing else. A
checksum tells damage; it is no signature. Files of format 1 have none and are read unchecked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

FORMAT = 2
THREADED = 2**18  # bytes of a tensor from which on a thread is worth its while
KEY = "diffusion_engine"
SUM = "diffusion_engine.sha256"
ADVICE = "use another checkpoint, or train again with another --out"
# What makes the info of a format that of the next one. 1 → 2: checksums came, which a file either
# has or not.
MIGRATIONS: dict[int, Callable[[dict], dict]] = {1: lambda info: info}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit; one sentence, whatever is in the file."""

    def __init__(self, text: str) -> None:
        super().__init__("".join(c if c.isprintable() else " " for c in text)[:2000])


class Damaged(CheckpointError):
    """A file that is not what was once written; an older one may serve in its place."""


class Unsaved(OSError):
    """A file could not be written; what was there before still is. One sentence."""


# --- writing ------------------------------------------------------------------------------------


def write(
    path: str | os.PathLike,
    tensors: dict[str, Tensor],
    info: dict,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Writes the file atomically: after a crash, the old or the new one is there, whole.

    `before` is called when the new file is on the disk and about to take the name. What a killed
    process was writing lies in FILE.tmp, a folder; the next write removes it. Raises Unsaved, an
    OSError of one sentence, where that cannot be done: disk full, no rights, read-only.
    """
    path = Path(path)
    place = path.with_name(path.name + ".tmp")  # same disk: os.replace must not cross disks
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network disks have no locks
                fcntl.flock(folder, fcntl.LOCK_EX)  # until it is closed: `place` may be another's
            _remove(place)
            place.mkdir(exist_ok=True)
            try:
                _fill(place / path.name, tensors, info)
                before()
                os.replace(place / path.name, path)
            finally:
                _remove(place)
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except OSError as error:
        raise Unsaved(_sentence(path, size, error)) from error


def _fill(path: Path, tensors: dict[str, Tensor], info: dict) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    values = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with Sums() as found:
        for name, value in values.items():
            found.add(name, value)
        text = json.dumps({**info, "format": FORMAT, "sums": found.all()})
    metadata = {KEY: text, SUM: hashlib.sha256(text.encode()).hexdigest()}
    try:
        save_file(values, path, metadata)
    except SafetensorError as error:
        # "I/O error: No space left on device (os error 28)"; before 0.6 "IoError(Os { code: 28, …"
        number = re.search(r"(?:\(os error|\bOs { code:) (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None
    with open(path, "rb+") as file:
        # safetensors makes it the user's own; here it gets what the umask has left of the folder's
        # mode. To ask for the umask is to change it, for all threads. A disk may know no modes.
        with contextlib.suppress(OSError):
            os.fchmod(file.fileno(), 0o666 & path.parent.stat().st_mode)
        os.fsync(file.fileno())


class Sums:
    """The digests of tensors, of large ones on threads, while the caller reads or writes."""

    def __enter__(self) -> Sums:
        self.pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
        self.found: dict[str, str | Future] = {}
        return self

    def add(self, name: str, value: Tensor) -> None:
        large = value.numel() * value.element_size() > THREADED
        self.found[name] = self.pool.submit(digest, name, value) if large else digest(name, value)

    def all(self) -> dict[str, str]:
        return {k: v if isinstance(v, str) else v.result() for k, v in self.found.items()}

    def __exit__(self, *exception) -> None:
        self.pool.shutdown()


def digest(name: str, value: Tensor) -> str:
    """SHA-256, in hexadecimal, of a tensor's name, dtype, shape and bytes."""
    what = [name, str(value.dtype).removeprefix("torch."), list(value.shape)]
    sha = hashlib.sha256(json.dumps(what).encode())
    sha.update(_bytes(value))  # without the GIL
    return sha.hexdigest()


def _bytes(value: Tensor):
    return value.reshape(-1).view(torch.uint8).numpy()


def _remove(place: Path) -> None:
    """Removes a folder with all that is in it, or a file; a folder only as far as that is allowed,
    for it does not stand in the way."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def _sentence(path: Path, size: int, error: OSError) -> str:
    reason = error.strerror or str(error)
    free = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with contextlib.suppress(OSError):
            free = f", where {_megabytes(shutil.disk_usage(path.parent).free)} are free"
    old = "the one there before is as it was" if path.exists() else "nothing is left of it"
    return (
        f"{path.name} cannot be written in {path.parent}{free}: {reason}; it needs "
        f"{_megabytes(size)}, and {old}"
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e7 else f"{size / 1e6:,.0f} MB"


# --- reading ------------------------------------------------------------------------------------


def read(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict]:
    """Tensors whose names start with `prefix`, on the CPU, and the file's info, both checked.

    Raises CheckpointError, one sentence: Damaged for a file that is none or not as it was written.
    """
    from safetensors import safe_open

    try:
        with _named(path) as name, safe_open(name, framework="pt") as opened:
            names, metadata = list(opened.keys()), opened.metadata() or {}
            info, sums = _info(path, names, metadata)
            tensors = {k: opened.get_tensor(k) for k in names if k.startswith(prefix)}
            if sums is not None:
                _check(path, tensors, sums)
            return tensors, info
    except CheckpointError:
        raise
    except OSError as error:
        kind = Damaged if error.errno in (errno.EIO, errno.EBADMSG) else CheckpointError
        raise kind(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # safetensors', of JSON, too deep for JSON, no memory for a tensor
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise Damaged(
            f"{path} is not a readable checkpoint ({path.stat().st_size} bytes; truncated, damaged "
            f"or of another kind): {reason}; {ADVICE}"
        ) from None


@contextlib.contextmanager
def _named(path: Path) -> Iterator[str]:
    """A name for the file that is UTF-8, which safetensors asks of what it reads."""
    text = os.fspath(path)
    if text.encode(errors="replace") == os.fsencode(path):
        yield text
        return
    file = os.open(path, os.O_RDONLY)
    try:
        yield f"/dev/fd/{file}"
    finally:
        os.close(file)


def _info(path: Path, names: list[str], metadata: dict) -> tuple[dict, dict | None]:
    """The info, of today's format, and the tensors' checksums, None for a file of format 1."""
    if KEY not in metadata:
        raise Damaged(
            f"{path} is a safetensors file, but not a checkpoint of this engine "
            f"(no {KEY!r} in its metadata)"
        )
    text = metadata[KEY]
    if SUM in metadata and metadata[SUM] != hashlib.sha256(text.encode()).hexdigest():
        raise Damaged(f"{path} is damaged: its metadata has another checksum; {ADVICE}")
    info = json.loads(text)
    if not isinstance(info, dict):
        raise Damaged(f"{path} has metadata that is no JSON object: {ADVICE}")
    number = info.get("format")
    if type(number) is not int or number < 1:
        raise Damaged(f"{path} is damaged: its format is {str(number)[:80]}, no number; {ADVICE}")
    if number > FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {number}, this engine reads formats up to {FORMAT}: a "
            "newer version of it has written the file, so use that or a newer one"
        )
    sums = info.pop("sums", None)
    if number > 1:
        if SUM not in metadata or not isinstance(sums, dict) or sums.keys() != set(names):
            raise Damaged(
                f"{path} is damaged: its checksums are not those of its tensors; {ADVICE}"
            )
    elif sums is not None or SUM in metadata:
        raise Damaged(f"{path} is damaged: it has checksums, which format 1 has not; {ADVICE}")
    for older in range(number, FORMAT):
        info = MIGRATIONS[older](info)
    return {**info, "format": FORMAT}, sums


def _check(path: Path, tensors: dict[str, Tensor], sums: dict[str, str]) -> None:
    with Sums() as found:
        for name, value in tensors.items():
            found.add(name, value)
        wrong = [name for name, its in found.all().items() if its != sums[name]]
    if wrong:
        more = f" and {len(wrong) - 1} more tensors have" if wrong[1:] else " has"
        raise Damaged(
            f"{path} is damaged: {wrong[0][:80]}{more} another checksum than was written; {ADVICE}"
        )

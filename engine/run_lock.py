"""One run at a time in a folder: RUN/lock, locked for as long as its process lives.

The kernel gives the lock back when the process ends, however that comes about: after kill -9 the
file may lie there, and nobody holds it. Where the disk has no locks, there is none.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

FILE = "lock"  # in the run's folder


class InUse(ValueError):
    """Another process trains in the folder; one sentence."""


@contextlib.contextmanager
def held(folder: str | os.PathLike) -> Iterator[None]:
    """Holds the lock of a folder, which must exist, while its block runs.

    Raises InUse, a ValueError of one sentence that names process and machine, where another process
    (or thread) holds it. Under torchrun the first process alone takes it, for all of them.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path = Path(folder) / FILE
    file = _locked(path)
    try:
        if file is not None:
            _write_owner(file)
        yield
    finally:
        if file is not None:
            # While it is locked: who has opened it meanwhile sees that it is another file's name.
            if _same(path, file):
                with contextlib.suppress(OSError):
                    path.unlink()
            os.close(file)


def _locked(path: Path) -> int | None:
    """The open, locked file; None where that cannot be had for want of rights or of locks."""
    while True:
        try:
            file = _open(path)
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(file)
            os.close(file)
            raise InUse(
                f"{path.parent} is in use by another run, {owner}: wait for its end or stop it, or "
                "give another --out"
            ) from None
        except OSError:  # this disk has no locks: the file would say what is not so
            os.close(file)
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        if _same(path, file):
            return file
        os.close(file)  # its owner has just removed it: the next one counts


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except (
        PermissionError
    ):  # another user's, of a run that was killed: it can be locked all the same
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def _same(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(file))
    except OSError:
        return False


def _write_owner(file: int) -> None:
    with contextlib.suppress(OSError):  # a full disk, a file of another user
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _owner(file: int) -> str:
    with contextlib.suppress(OSError):
        text = os.pread(file, 200, 0).decode(errors="replace").strip()
        if text.startswith("process ") and text.isprintable():
            return text
    return "whose process is not known"

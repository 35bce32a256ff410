"""Builds that several test processes share (pytest-xdist): one builds, the others wait for it."""

import fcntl
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def alone(name: str):
    folder = Path(__file__).resolve().parents[1] / "build"
    folder.mkdir(exist_ok=True)
    with open(folder / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

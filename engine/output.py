"""What a run writes beside its checkpoint: where that fails, training goes on.

A log's row or a grid of samples is not worth a run: where the disk is full or does not let us
write, that is said once for each kind. The checkpoint is what a run cannot do without.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path


class Spared:
    """`with spared("sample grids"): …` goes on after an OSError, and says so once."""

    def __init__(self) -> None:
        self.told: set[str] = set()

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        from tqdm import tqdm

        try:
            yield
        except OSError as error:
            if what not in self.told:
                self.told.add(what)
                why = error.strerror or error
                tqdm.write(f"{what} cannot be written ({why}); training goes on", file=sys.stderr)


class Lines:
    """A file of lines that is added to, a whole line at a time; a line that fails ends there."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, None
        self.torn = False  # whether the last line was cut short

    def write(self, line: str) -> None:
        """Adds a line. Raises OSError where that cannot be done; the next one may succeed."""
        if self.file is None:
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115  # close() closes
        data, self.torn = ("\n" * self.torn + line).encode(), True
        while data:
            data = data[self.file.write(data) :]
        self.torn = False

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def read_rows(path: Path) -> list[dict]:
    """The rows of a file of JSON objects with a "step"; lines that are none are left out: a crash
    or a full disk cut them short."""
    try:
        lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):  # no JSON; a million brackets
            row = json.loads(line)
            step = row.get("step") if isinstance(row, dict) else None
            if type(step) is int and 0 <= step < 2**53:
                rows.append(row)
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    """Replaces the file; after a crash or an OSError the old one is there."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def board(folder: Path, step: int):
    """A TensorBoard log in `folder` that goes on after a step; None if it is not installed.

    TensorBoard writes in a thread. Where that fails, the next call raises it: the thread's own
    traceback is left out.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("no TensorBoard log: tensorboard is not installed", file=sys.stderr)
        return None
    before = threading.excepthook
    if not hasattr(before, "for_tensorboard"):

        def hook(args) -> None:
            writer = type(args.thread).__module__.startswith("tensorboard.")
            if not (writer and issubclass(args.exc_type, OSError)):
                before(args)

        hook.for_tensorboard = True
        threading.excepthook = hook
    return SummaryWriter(str(folder), purge_step=step + 1)

"""The log of a run: metrics.jsonl and events.jsonl for machines, TensorBoard for eyes."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"


class Log:
    """metrics.jsonl, one JSON object per line, and TensorBoard where it is installed; events.jsonl
    from the first event on."""

    def __init__(self, folder: Path, step: int, tensorboard: bool):
        self.folder = folder
        for name in (METRICS, EVENTS):  # what was logged after the checkpoint would come twice
            cut(folder / name, step)
        self.file = open(folder / METRICS, "a", buffering=1)  # noqa: SIM115  # __exit__ closes
        self.board = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
            except ImportError:
                print("no TensorBoard log: tensorboard is not installed", file=sys.stderr)

    def __enter__(self) -> Log:
        return self

    def write(self, step: int, row: dict[str, float]) -> None:
        self.file.write(line({"step": step, **row}))
        for name, value in row.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def event(self, step: int, row: dict) -> None:
        """A step that was skipped, or whose loss is a spike: which, its figures, its pictures."""
        with open(self.folder / EVENTS, "a") as file:
            file.write(line({"step": step, **row}))

    def image(self, step: int, path: Path) -> None:
        if self.board:
            import numpy as np
            from PIL import Image

            with Image.open(path) as picture:
                self.board.add_image(
                    "samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC"
                )

    def __exit__(self, *exception) -> None:
        self.file.close()
        if self.board:
            self.board.close()


def line(row: dict) -> str:
    """The row as JSON, which has no NaN: a number that is not finite is null."""
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return json.dumps(finite) + "\n"


def cut(path: Path, step: int) -> None:
    """Leaves the rows up to a step; none is no file. After a crash, the old or the new file is
    there."""
    if not path.exists():
        return
    rows = [row for row in read_rows(path) if row["step"] <= step]
    if not rows:
        path.unlink()
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(temporary, path)


def read_metrics(folder: str | os.PathLike) -> list[dict]:
    """The rows of a run's metrics.jsonl; a last line that a crash cut short is left out."""
    return read_rows(Path(folder) / METRICS)


def read_rows(path: Path) -> list[dict]:
    rows = []
    if not path.exists():
        return rows
    for text in path.read_text().splitlines():
        try:
            rows.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return rows

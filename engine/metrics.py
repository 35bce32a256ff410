"""The log of a run: metrics.jsonl for machines, TensorBoard for eyes, events.jsonl for surprises"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from . import output

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"


class Log:
    """metrics.jsonl, one JSON object per line, and TensorBoard where it is installed; events.jsonl
    from the first event on.

    Where the disk refuses a row, that is said once, and the run goes on.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool):
        self.spared = output.Spared()
        for name in (METRICS, EVENTS):  # what was logged after the checkpoint would come twice
            with self.spared(name):
                cut(folder / name, step)
        self.metrics, self.events = (output.Lines(folder / name) for name in (METRICS, EVENTS))
        self.board = None
        if tensorboard:
            with self.spared("the TensorBoard log"):
                self.board = output.board(folder / "tensorboard", step)

    def __enter__(self) -> Log:
        return self

    def write(self, step: int, row: dict[str, float]) -> None:
        with self.spared(METRICS):
            self.metrics.write(line({"step": step, **row}))
        with self.spared("the TensorBoard log"):
            for name, value in row.items() if self.board else ():
                self.board.add_scalar(name, value, step)

    def event(self, step: int, row: dict) -> None:
        """A step that was skipped, or whose loss is a spike: which, its figures, its pictures."""
        with self.spared(EVENTS):
            self.events.write(line({"step": step, **row}))

    def image(self, step: int, path: Path) -> None:
        if self.board:
            import numpy as np
            from PIL import Image

            with self.spared("the TensorBoard log"), Image.open(path) as picture:
                self.board.add_image(
                    "samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC"
                )

    def __exit__(self, *exception) -> None:
        for lines in (self.metrics, self.events):
            with self.spared(lines.path.name):
                lines.close()
        with self.spared("the TensorBoard log"):
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
    rows = [row for row in output.read_rows(path) if row["step"] <= step]
    if rows:
        output.write_rows(path, rows)
    else:
        path.unlink()


def read_metrics(folder: str | os.PathLike) -> list[dict]:
    """The rows of a run's metrics.jsonl; lines that a crash cut short are left out."""
    return output.read_rows(Path(folder) / METRICS)

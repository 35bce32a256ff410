"""The log of a run: metrics.jsonl for machines, TensorBoard for eyes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

from . import output


class Log:
    """metrics.jsonl, one JSON object per line, and TensorBoard where it is installed.

    Where the disk refuses a row, that is said once, and the run goes on.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool):
        path = folder / "metrics.jsonl"
        self.spared = output.Spared()
        with self.spared("metrics.jsonl"):  # lines from after the checkpoint would come twice
            if path.exists():
                output.write_rows(
                    path, [row for row in read_metrics(folder) if row["step"] <= step]
                )
        self.file, self.board = output.Lines(path), None
        if tensorboard:
            with self.spared("the TensorBoard log"):
                self.board = output.board(folder / "tensorboard", step)

    def __enter__(self) -> Log:
        return self

    def write(self, step: int, row: dict[str, float]) -> None:
        # JSON has no NaN: a loss that is not finite is null.
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
        with self.spared("metrics.jsonl"):
            self.file.write(json.dumps({"step": step, **finite}) + "\n")
        with self.spared("the TensorBoard log"):
            for name, value in row.items() if self.board else ():
                self.board.add_scalar(name, value, step)

    def image(self, step: int, path: Path) -> None:
        if self.board:
            import numpy as np
            from PIL import Image

            with self.spared("the TensorBoard log"), Image.open(path) as picture:
                self.board.add_image(
                    "samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC"
                )

    def __exit__(self, *exception) -> None:
        with self.spared("metrics.jsonl"):
            self.file.close()
        with self.spared("the TensorBoard log"):
            if self.board:
                self.board.close()


def read_metrics(folder: str | os.PathLike) -> list[dict]:
    """The rows of a run's metrics.jsonl; lines that a crash cut short are left out."""
    return output.read_rows(Path(folder) / "metrics.jsonl")

"""The log of a run: metrics.jsonl for machines, TensorBoard for eyes."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path


class Log:
    """metrics.jsonl, one JSON object per line, and TensorBoard where it is installed."""

    def __init__(self, folder: Path, step: int, tensorboard: bool):
        path = folder / "metrics.jsonl"
        if step and path.exists():  # lines from after the checkpoint would come twice
            rows = [row for row in read_metrics(folder) if row["step"] <= step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
            os.replace(temporary, path)
        self.file = open(path, "a" if step else "w", buffering=1)  # noqa: SIM115  # __exit__ closes
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
        # JSON has no NaN: a loss that is not finite is null.
        finite = {k: v if math.isfinite(v) else None for k, v in row.items()}
        self.file.write(json.dumps({"step": step, **finite}) + "\n")
        for name, value in row.items() if self.board else ():
            self.board.add_scalar(name, value, step)

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


def read_metrics(folder: str | os.PathLike) -> list[dict]:
    """The rows of a run's metrics.jsonl; a last line that a crash cut short is left out."""
    rows = []
    if not (Path(folder) / "metrics.jsonl").exists():
        return rows
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows

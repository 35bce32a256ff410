"""A Hugging Face data set: which of its columns are pictures and labels, and what a row holds."""

from __future__ import annotations

import io
import sys

import numpy as np

from . import cli
from .decoding import Refused, UnreadableImage, read, reason, to_array


class Table:
    """The rows of a data set's split. Raises one sentence where there is nothing to train on.

    `labels` (n,) int64 and `classes`, where every row has a label; needed if `must_have_labels`.
    `choices` is what else a user may give.
    """

    def __init__(self, name: str, split: str, must_have_labels: bool, choices: str) -> None:
        self.name = name
        self.rows = _load(name, split, choices)
        features = self.rows.features or {}
        kinds = {column: type(kind).__name__ for column, kind in features.items()}
        column = next((c for c, kind in kinds.items() if kind == "Image"), None)
        if column is None:
            raise ValueError(
                f"--dataset {name} has no column of images, only {_columns(kinds)}: choose a data "
                "set of pictures"
            )
        self.column: str = column
        if not len(self.rows):
            raise ValueError(f"--dataset {name} has no rows: choose a data set of pictures")
        label = next((c for c, kind in kinds.items() if kind == "ClassLabel"), None)
        if must_have_labels and label is None:
            raise ValueError(
                f"--dataset {name} has no column of class labels, only {_columns(kinds)}: leave "
                "--classes out"
            )
        self.labels, self.classes = None, ()
        if label is not None:
            self._take_labels(label, list(features[label].names), must_have_labels)

    def _take_labels(self, column: str, classes: list[str], needed: bool) -> None:
        """Keeps the labels if each row has one of the classes; test splits often have none."""
        found = list(self.rows[column])
        wrong = next(
            (i for i, y in enumerate(found) if type(y) is not int or not 0 <= y < len(classes)),
            None,
        )
        if wrong is None:
            self.labels, self.classes = np.array(found, np.int64), classes
            return
        fault = (
            f"row {wrong} of --dataset {self.name} has the label {found[wrong]!r:.40}, expected "
            f"0 … {len(classes) - 1}"
        )
        if needed:
            raise ValueError(f"{fault}: leave --classes out, or choose another data set")
        print(f"{fault}: its labels are left out", file=sys.stderr)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int, size: int, channels: int) -> np.ndarray:
        """(channels, size, size) uint8 of a row. Raises UnreadableImage."""
        try:
            cell = self.rows[index][self.column]
            if isinstance(cell, dict):  # undecoded: {"bytes": …, "path": …}
                cell = cell.get("bytes")
            if isinstance(cell, bytes | bytearray):
                return read(io.BytesIO(cell), size, channels)[0]
            if cell is None:
                raise Refused("it has no picture")
            if not hasattr(cell, "convert"):
                raise Refused(f"it has no picture, but a value of type {type(cell).__name__}")
            return to_array(cell, size, channels)
        except Exception as error:  # the library decodes, and raises a dozen kinds
            raise UnreadableImage(f"{self.name} row {index}: {reason(error)}") from None


def _columns(kinds: dict[str, str]) -> str:
    return ", ".join(sorted(kinds)) or "none at all"


def _load(name: str, split: str, choices: str):
    try:
        import datasets
    except ImportError:
        raise ModuleNotFoundError(
            f"--dataset {name}: there is no such folder{cli.neighbour(name)}; give {choices}, "
            "which needs the package datasets: pip install datasets"
        ) from None
    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen kinds: unknown name, network, format
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--dataset {name}: there is no such folder{cli.neighbour(name)}, and Hugging Face "
            f"could not load it ({why}); give {choices}"
        ) from None

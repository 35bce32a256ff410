"""A run ends after a step, not in one: SIGINT and SIGTERM."""

from __future__ import annotations

import signal

from .cli import Failed


class Stopped(Failed):
    """A signal ended the training; the checkpoint is written. `code` is the shell's for it."""


class Signals:
    """Notes SIGINT and SIGTERM, so that a step is never cut in two; a second one ends at once,
    unless `patient`: torchrun and a cluster's scheduler may both pass on the one that they got."""

    caught = 0

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient

    def __enter__(self) -> Signals:
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, self.note)
            except ValueError:  # not the main thread: its owner handles signals
                return self
        return self

    def note(self, number, frame) -> None:
        self.caught = number
        if self.patient:
            return
        for each, handler in self.before.items():
            signal.signal(each, handler)

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

"""What the command lines share: options from a dataclass, bad input as one sentence and code 2."""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path


def parse(config_class: type, prog: str, args: Sequence[str] | None = None, default=None):
    """The options of `config_class` from the command line.

    Exits with code 2 on a wrong option, 0 on --help.
    """
    try:
        import tyro
    except ImportError:
        raise ModuleNotFoundError(
            "the command line needs tyro: pip install 'diffusion-engine[train]'"
        ) from None
    given = {} if default is None else {"default": default}
    config = (tyro.conf.FlagCreatePairsOff,)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config_class, prog=prog, args=args, config=config, **given)
    except SystemExit as end:
        if end.code:
            print(f"error: {unboxed(complaint.getvalue())}; see {prog} --help", file=sys.stderr)
        raise


def unboxed(text: str) -> str:
    """The first paragraph of tyro's framed message, as one line."""
    lines = []
    for line in text.splitlines()[1:]:  # the first is the frame's title
        words = line.strip("│| \t")
        if not words.strip("─-+╰╯"):
            if lines:
                break
            continue
        lines.append(words)
    told = " ".join(lines).rstrip(".") or "these options cannot be read"
    return told.replace("{None}|", "")  # how tyro writes an option that may be left out


class Failed(Exception):
    """An end that is no bug and no bad input; its text is the message, `code` the exit code."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


def main(command: Callable[[Sequence[str] | None], None], args: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 for bad input, Failed's own.

    Bad input is a ValueError, a missing module, or a file that is not as it should be: one sentence
    on stderr. `python -X dev -m …` shows the traceback instead.
    """
    try:
        command(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Failed as failure:
        print(failure, file=sys.stderr)
        return failure.code
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        if sys.flags.dev_mode or (isinstance(error, RuntimeError) and not refused(error)):
            raise
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    return 0


def refused(error: RuntimeError) -> bool:
    """Whether a back end that was asked for by name cannot serve."""
    from .dispatch import BackendError  # late: it imports torch

    return isinstance(error, BackendError)


def sentence(error: Exception) -> str:
    if isinstance(error, RuntimeError):
        return str(error).splitlines()[0]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def make_writable(folder: Path, option: str) -> None:
    """Makes the folder if need be. Raises ValueError if nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"{option}: cannot write in {folder} ({reason}); give another place"
        ) from None

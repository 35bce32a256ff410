"""What the command lines share: options from a dataclass, bad input as one sentence and code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


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
    return tyro.cli(
        config_class, prog=prog, args=args, config=(tyro.conf.FlagCreatePairsOff,), **given
    )


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
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    return 0


def sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__

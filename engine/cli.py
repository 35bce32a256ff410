"""What the command lines share: options from a dataclass, bad input as one sentence and code 2."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import re
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
        raise ModuleNotFoundError("the command line needs tyro", name="tyro") from None
    given = {} if default is None else {"default": default}
    # An option that is left out is None, and nobody types that.
    config = (tyro.conf.DisallowNone, tyro.conf.PositionalMetavarFromFieldName)
    complaint = io.StringIO()
    args = sys.argv[1:] if args is None else args
    try:
        with contextlib.redirect_stderr(complaint), shown_once():
            return tyro.cli(config_class, prog=prog, args=args, config=config, **given)
    except SystemExit as end:
        if end.code:
            told = plain(unboxed(complaint.getvalue())) + meant(config_class, args)
            tell(f"error: {told}; see {prog} --help")
        raise


def shown_once() -> contextlib.AbstractContextManager:
    """Of several processes that torchrun has started the first alone prints the help."""
    others = os.environ.get("RANK", "0") != "0"
    return contextlib.redirect_stdout(io.StringIO()) if others else contextlib.nullcontext()


def alone(prog: str) -> None:
    """Raises ValueError, one sentence, where torchrun has started several processes of a command
    that is for one."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            f"{prog} runs in one process: start it without torchrun; engine.train, engine.sample "
            "and engine.evaluate run in several"
        )


def parse_command(commands: dict[str, type], prog: str, args: Sequence[str] | None = None):
    """`prog NAME …` → the options of commands[NAME], a dataclass whose docstring is its help.

    Exits as `parse` does; for --help without a name, after a list of them. Raises ValueError for a
    name that is none.
    """
    name, *rest = (sys.argv[1:] if args is None else list(args)) or [""]
    if name in ("-h", "--help"):
        print(f"usage: {prog} COMMAND [-h] …\n")
        for known, config_class in commands.items():
            print(f"  {known:<12}{config_class.__doc__.splitlines()[0]}")
        raise SystemExit(0)
    if name not in commands:
        near = difflib.get_close_matches(name, commands, 1)
        fault = f"{name!r} is unknown" if name else "the command is missing"
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{fault}{hint}: choose one of {', '.join(commands)}; see {prog} --help")
    return parse(commands[name], f"{prog} {name}", rest)


def left_out(meaning: str, metavar: str | None = None):
    """For an option whose default is None: what --help says that it stands for.

    Use it in an Annotated under `from __future__ import annotations`: it is evaluated by `parse`.
    """
    import tyro

    def hint(default: str) -> str:  # a resumed run has its own defaults
        return f"(default: {meaning if default == 'None' else default})"

    return tyro.conf.arg(help_behavior_hint=hint, metavar=metavar)


def also(short: str):
    """For an option that has a second name. torchrun takes --n for the start of options of its own,
    also among those of the command that it starts."""
    import tyro

    return tyro.conf.arg(aliases=[short])


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
    return " ".join(lines).rstrip(".") or "these options cannot be read"


# What tyro says and what we say. What matches none of these is printed as it is.
PHRASES = (
    (r"Error parsing (\S+): .*\bINT\b.*\['(.*)'\]", r"\1 '\2': expected a whole number"),
    (r"Error parsing (\S+): .*\bFLOAT\b.*\['(.*)'\]", r"\1 '\2': expected a number"),
    (
        r"Error parsing (\S+): invalid literal for int.*: '(.*)'",
        r"\1 '\2': expected a whole number",
    ),
    (r"Error parsing (\S+): could not convert.*: '(.*)'", r"\1 '\2': expected a number"),
    (
        r"invalid choice ('.*') for argument '(\S+)'\. Expected one of \((.*)\)",
        r"\2 \1 is unknown: choose one of \3",
    ),
    (r"Missing value for argument '(\S+)'.*", r"\1 needs a value"),
    (r"Missing from .*?: +(\S+) (.*?)\.? \(required\)", r"\1 is missing: \2"),
    (r"Unrecognized options: ([^-\s]\S*|-+)", r"'\1' belongs to no option"),
)


def plain(text: str) -> str:
    """tyro's sentence in words that need no knowledge of Python."""
    for pattern, ours in PHRASES:
        if match := re.fullmatch(pattern, text):
            # None is the default of an option that is left out, nothing to type.
            text, one_of, choices = match.expand(ours).partition("one of ")
            if "'None'" in choices:  # of an option that may be left out: tyro has them in no order
                names = sorted(name for name in choices.split(", ") if name != "'None'")
                choices = ", ".join(names)
            return text + one_of + choices
    if match := re.fullmatch(r"Unrecognized options: (.*)", text):
        words = [word.split("=")[0] for word in match[1].split(", ")]
        named = [word for word in words if word.startswith("-") and any(map(str.isalpha, word))]
        if named:  # the others are values of these, or may be
            return " and ".join(named) + (" are no options" if named[1:] else " is no option")
    return text


def meant(config_class: type, args: Sequence[str]) -> str:
    """ "; did you mean --steps?" for what was typed and is nearly the name of an option."""
    fields = dataclasses.fields(config_class)
    names = [option(field.name) for field in fields]
    switches = [option(field.name) for field in fields if isinstance(field.default, bool)]
    names += [name.replace("--", "--no-", 1) for name in switches]
    found = []
    for arg in args:
        word = "--" + arg.split("=")[0].lstrip("-").replace("_", "-")
        named = arg.startswith("-") and any(map(str.isalpha, arg))  # not "-", "-1"
        if named and word not in names:
            found += difflib.get_close_matches(word, names, 1, 0.7)
    return f"; did you mean {' and '.join(found)}?" if found else ""


def option(name: str) -> str:
    """`save_every` → `--save-every`."""
    return "--" + name.replace("_", "-")


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
    if hasattr(sys.stdout, "reconfigure"):  # a path may be no UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        command(args)
    except KeyboardInterrupt:
        tell("interrupted")
        return 130
    except BrokenPipeError:  # as in `… --help | head`: the reader has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Failed as failure:
        tell(str(failure))
        return failure.code
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError, MemoryError) as error:
        if sys.flags.dev_mode or (isinstance(error, RuntimeError) and not expected(error)):
            raise
        tell(f"error: {sentence(error)}")
        return 2
    return 0


def tell(failure: str) -> None:
    """Prints why this process ends; of several that do one job, the first to fail does."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        print(failure, file=sys.stderr)
        return
    from . import torchrun  # late: it imports torch

    if torchrun.speaks():
        print(failure, file=sys.stderr, flush=True)
        torchrun.told()


def expected(error: RuntimeError) -> bool:
    """Whether this is no bug: a back end asked for by name cannot serve, or memory is too small."""
    from .dispatch import BackendError  # late: it imports torch

    return isinstance(error, BackendError) or out_of_memory(error)


def out_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def sentence(error: Exception) -> str:
    return shown(_sentence(error))


def _sentence(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "the memory does not suffice"
    if isinstance(error, RuntimeError):
        if out_of_memory(error):
            return "the memory does not suffice: try a smaller --batch, in another --out"
        return str(error).splitlines()[0]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = {"PIL": "pillow"}.get(error.name, error.name)
        ready = Path(".venv", "bin", "python")  # where `make` puts everything
        if ready.exists() and Path(sys.prefix).resolve() != ready.parent.parent.resolve():
            return f"{text}: use {ready}, which `make` has set up, or pip install {package}"
        return f"{text}: pip install {package}"
    return text


def shown(name: str | os.PathLike) -> str:
    """A name as it can be printed on one line: a newline, an escape, half a character are spelled
    out."""
    text = os.fspath(name)
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def make_writable(folder: Path, option: str) -> None:
    """Makes the folder if need be. Raises ValueError if nothing can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror or error
        raise ValueError(
            f"{option}: cannot write in {folder} ({reason}); give another place"
        ) from None


def neighbour(path: str | os.PathLike) -> str:
    """In brackets, the folder whose name is nearly this one's, which does not exist; or nothing."""
    folder = Path(path).expanduser()
    try:
        with os.scandir(folder.parent) as entries:  # of a million, some: the comparison is slow
            names = [entry.name for entry in itertools.islice(entries, 10_000) if entry.is_dir()]
    except OSError:
        return ""
    found = difflib.get_close_matches(folder.name, names, 1)
    return f" (did you mean {folder.parent / found[0]}?)" if found else ""

"""Which folder a run may use, and what it may go on from and change."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path

from . import cli

# What a run writes beside its checkpoint.
RUN_FILES = (
    *("metrics.jsonl", "events.jsonl", "tensorboard", "samples", "checkpoints"),
    *("samples.png", "strip.png", "loss.png"),
)

# What --resume may change: how the run is carried out, not what it computes.
RESUMABLE = {
    *("out", "resume", "data_dir", "steps", "device", "precision", "layout", "compile", "fsdp"),
    *("log_every", "save_every", "keep_last", "keep_every", "cache", "changed_pictures"),
    *("sample_every", "samples", "sample_steps", "tensorboard"),
}


def is_folder(dataset: str) -> bool:
    return bool(dataset) and dataset != "fashion-mnist" and Path(dataset).expanduser().is_dir()


def check_branch(file: Path, info: dict) -> None:
    """Raises ValueError, one sentence, for a checkpoint that training does not go on from; `file`
    is what --resume names, or a run's folder."""
    from . import checkpoint

    file = file.expanduser()
    if file.is_file() and file.name != checkpoint.FILE:
        raise ValueError(
            f"--resume {file}: a run goes on in its folder, from its {checkpoint.FILE}; to branch "
            "off from another checkpoint, copy it to a new folder under that name"
        )
    if info.get("unit"):
        raise ValueError(
            f"--resume {file}: a cell of engine.ablate, trained on pictures in [0, 1]; "
            "engine.ablate with the study's --out goes on with it"
        )


def check_free(folder: Path) -> None:
    """Raises FileExistsError, one sentence, when the folder holds a run or files of one."""
    from . import checkpoint

    if folder.is_dir() and checkpoint.files(folder):
        raise FileExistsError(
            f"{folder} already holds a run: go on with --resume {shlex.quote(str(folder))}, "
            "or give another --out"
        )
    found = [name for name in RUN_FILES if (folder / name).exists()]
    if found:
        raise FileExistsError(
            f"{folder} has {', '.join(found)} of another run, but no {checkpoint.FILE} to go on "
            "from: give another --out, or move these files away"
        )


def saved_options(path: str | os.PathLike, kind: type) -> dict:
    """The options that a run was trained with, as fields of `kind`, set to resume it."""
    from . import checkpoint

    file = checkpoint.find(path)
    _, info = checkpoint.read(path, prefix="none.", quiet=True)
    known = {field.name for field in dataclasses.fields(kind)}
    values = {k: v for k, v in info.get("train", {}).items() if k in known}
    values.pop("changed_pictures", None)  # it was said of that time
    values["data_dir"] = Path(values["data_dir"]) if values.get("data_dir") else None
    return {**values, "out": file.parent, "resume": Path(path)}


def check_pictures(config, images, info: dict) -> str:
    """What to say where the data set is not the one that the run has seen; nothing where it is.

    Raises ValueError, one sentence, unless --changed-pictures allows it: the order of the pictures
    would be another one, and a saved run cannot be unsaved.
    """
    from . import cache

    old, new = info.get("pictures"), cache.identity(images)
    if not isinstance(old, dict) or old == new:  # checkpoints of before have none
        return ""
    if old.get("count") == new["count"]:
        differ = f"as many pictures as it had, {new['count']}, but not the same"
    else:
        differ = f"{new['count']} pictures, but the run has seen {old.get('count')}"
    changed = f"{config.dataset} has {differ} (or unreadable ones are new)"
    if config.changed_pictures:
        return f"{changed}: from here on the run is another one than it would have been"
    raise ValueError(
        f"{changed}: give --dataset with the pictures of before, or --changed-pictures to go on "
        "with these, in another order"
    )


def check_changed(config) -> None:
    """Raises ValueError, one sentence, for --changed-pictures where there are none of before."""
    if config.changed_pictures and config.resume is None:
        raise ValueError(
            "--changed-pictures is said of a run that goes on: give --resume RUN too, or leave "
            "--changed-pictures out"
        )


def check_resume(config, saved) -> None:
    """Raises ValueError when `config` asks for another computation than the saved run's."""
    for field in dataclasses.fields(config):
        old, new = getattr(saved, field.name), getattr(config, field.name)
        if field.name == "dataset" and old != "fashion-mnist" and is_folder(new):
            continue  # the pictures have moved
        if field.name not in RESUMABLE and old != new:
            raise ValueError(
                f"{cli.option(field.name)} cannot change on --resume: "
                f"the run was started with {'its default' if old is None else old}, not {new}"
            )
    if config.out.resolve() != saved.out.resolve():
        raise ValueError(f"--resume goes on in {saved.out}: leave out --out {config.out}")


def restarted(config, saved, info: dict, job: str | None) -> bool:
    """Whether `saved`, with a checkpoint's info, is the very run that `config` asks for anew.

    So it is when the same job of torchrun made it with the same options: torchrun repeats the
    command when a process has died.
    """
    if job is None or info.get("job") != job:
        return False
    if is_folder(config.dataset) and (
        Path(config.dataset).expanduser().resolve() != Path(saved.dataset)
    ):
        return False
    try:
        check_resume(config, saved)
    except ValueError:
        return False
    return True

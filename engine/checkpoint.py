"""Checkpoints: one safetensors file with all that training needs to go on and sampling to start.

Tensors: `model.*` weights, `ema.*` their moving average, `optimizer.<state>.<parameter>`,
`diffusion.betas`. engine/checkpoint_file.py tells what the file is: checksums, no pickle. A run's
folder keeps the last few: FILE is the newest, those before it are checkpoint.step_<step>.…; where
the newest is damaged, who reads the folder gets the newest that is whole.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint_file
from .checkpoint_file import ADVICE, CheckpointError, Damaged, Unsaved
from .cli import neighbour
from .device import usable_device
from .foreign import (
    load_ddpm_tf,
    load_diffusers,
    load_openai,
    load_openai_classifier,
    save_diffusers,
)

__all__ = ["CheckpointError", "Damaged", "Unsaved", "build", "find", "load", "load_classifier"]
__all__ += ["newest", "part", "read", "save"]
# Other projects':
__all__ += ["load_ddpm_tf", "load_diffusers", "load_openai", "load_openai_classifier"]
__all__ += ["save_diffusers"]

FILE = "checkpoint.safetensors"  # in the run's folder
REQUIRED = {"model": dict, "diffusion": dict, "train": dict, "step": int, "skipped": int}


# --- which file ---------------------------------------------------------------------------------


def find(path: str | os.PathLike) -> Path:
    """The newest checkpoint of a run's folder, damaged or not, or the file itself.

    Raises CheckpointError if there is none.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        file = next(iter(files(path)), None)
        if file is not None:
            return file
        inside = sorted(str(found.parent) for found in path.glob(f"*/{FILE}"))
        runs = f"; there are runs in {', '.join(inside[:5])}" if inside else ""
        raise CheckpointError(f"no checkpoint at {path}: the folder has no {FILE}{runs}")
    if not path.is_file():
        hint = f"there is no such file or folder{neighbour(path)}"
        raise CheckpointError(f"no checkpoint at {path}: {hint}")
    return path


def files(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder, the newest first."""
    last = folder / FILE
    older = [file for _, file in _kept(last)]
    return [last, *older] if last.is_file() else older


def _kept(path: Path) -> list[tuple[int, Path]]:
    """Step and file of the checkpoints before `path`, the newest first."""
    name = re.compile(rf"{re.escape(path.stem)}\.step_(\d{{6,18}}){re.escape(path.suffix)}")
    matches = [name.fullmatch(entry) for entry in os.listdir(path.parent)]
    return sorted(((int(m[1]), path.with_name(m[0])) for m in matches if m), reverse=True)


# --- writing ------------------------------------------------------------------------------------


def save(
    path: str | os.PathLike, tensors: dict[str, Tensor], info: dict, keep_last: int | None = None
) -> None:
    """Writes the file atomically: after a crash, the old or the new one is there, whole.

    keep_last  how many checkpoints to keep, this one included: the one that had the name is kept
               as checkpoint.step_<step>.safetensors, and the oldest goes, when the new one is on
               the disk. None: the others stay as they are.

    Raises Unsaved, an OSError of one sentence, where that cannot be done.
    """
    path = Path(path)
    if keep_last is None:
        checkpoint_file.write(path, tensors, info)
        return
    step = info["step"]
    checkpoint_file.write(path, tensors, info, lambda: _keep(path, step) if keep_last > 1 else None)
    # Of a later step: what a run left that has since gone back to an older checkpoint.
    others = [(number, file) for number, file in _kept(path) if number < step]
    stay = {file for _, file in others[: keep_last - 1]}
    for _, file in _kept(path):
        if file not in stay:
            with contextlib.suppress(OSError):  # it costs room, and no more
                file.unlink()


def _keep(path: Path, step: int) -> None:
    """Gives the file a second name, by its step; not one that is damaged or not older than `step`.

    `path` is there all the time; only on disks without hard links is it gone until the new file
    takes the name, and `files` knows the second name too.
    """
    old = step_of(path)
    if old is None or old >= step:
        return
    kept = path.with_name(f"{path.stem}.step_{old:06d}{path.suffix}")
    kept.unlink(missing_ok=True)
    try:
        os.link(path, kept)
    except OSError:
        os.rename(path, kept)


def step_of(path: Path) -> int | None:
    """The step of a checkpoint; None where there is none or its metadata is damaged."""
    try:
        return read(path, prefix="none.")[1]["step"] if path.is_file() else None
    except CheckpointError:
        return None


# --- reading ------------------------------------------------------------------------------------


def read(
    path: str | os.PathLike, prefix: str = "", quiet: bool = False
) -> tuple[dict[str, Tensor], dict]:
    """Tensors whose names start with `prefix`, on the CPU, and the info of a checkpoint.

    `path` as in `newest`. Raises CheckpointError for an unreadable, damaged or foreign file, or one
    of a newer format.
    """
    return newest(path, prefix, quiet)[1:]


def newest(
    path: str | os.PathLike, prefix: str = "", quiet: bool = False
) -> tuple[Path, dict[str, Tensor], dict]:
    """The file that `path` stands for, its tensors under `prefix` and its info, checked.

    A file stands for itself. A folder stands for its newest checkpoint that is whole; where that is
    not the newest, a sentence on stderr says so, unless `quiet`. Raises as `read`.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return _checked(find(path), prefix)
    choice, first = files(path) or [find(path)], None
    for file in choice:
        try:
            found = _checked(file, prefix)
        except Damaged as error:
            first = first or error
            continue
        if file.name != FILE and not quiet:
            why = str(first or f"{path} has no {FILE}").split(ADVICE)[0].rstrip(":; ")
            print(f"{why}: {file.name} is used in its place", file=sys.stderr)
        return found
    raise first


def _checked(file: Path, prefix: str) -> tuple[Path, dict[str, Tensor], dict]:
    tensors, info = checkpoint_file.read(file, prefix)
    for key, kind in REQUIRED.items():
        if not isinstance(info.get(key), kind) or (kind is int and info[key] < 0):
            raise CheckpointError(f"{file} has no {key!r} in its metadata: {ADVICE}")
    return file, tensors, info


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def build(tensors: dict[str, Tensor], info: dict, weights: str, file: Path):
    """The model with `weights` ("ema" or "model") and the diffusion that a checkpoint describes."""
    from .diffusion import Diffusion
    from .unet import UNet

    if info.get("kind") == "classifier":
        raise CheckpointError(f"{file} is a classifier's, expected a diffusion model's: {ADVICE}")
    try:
        model = _filled(UNet, info["model"], tensors, weights, ("model", "ema"))
        diffusion = Diffusion(tensors["diffusion.betas"], **info["diffusion"])
    except Exception as error:  # whatever options of a wrong kind lead to
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"{file} does not describe a model of this engine: {reason}; {ADVICE}"
        ) from None
    return model, diffusion


def _filled(kind: type, options: dict, tensors: dict, weights: str, parts: tuple[str, ...]):
    """The model of `options` with the tensors under `weights`. Nothing of its size is made before
    it is known that the tensors under each of `parts` are its own. Raises ValueError and others."""
    blocks = len(options.get("channel_mult", ())) * int(options.get("num_res_blocks", 1))
    if blocks > len(tensors):
        raise ValueError(f"its model has {blocks} blocks, and the file {len(tensors)} tensors")
    with torch.device("meta"):
        model = kind(**options)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in parts:
        found = {key: tuple(value.shape) for key, value in part(tensors, f"{name}.").items()}
        if found.keys() != expected.keys():
            raise ValueError(f"its {name} weights do not belong to its model")
        for key, shape in found.items():
            if shape != expected[key]:
                raise ValueError(
                    f"size mismatch for {name}.{key}: {shape} in the file, {expected[key]} in its "
                    "model"
                )
    model = model.to_empty(device="cpu")
    model.load_state_dict(part(tensors, f"{weights}."))
    return model


def load(path: str | os.PathLike, *, device: str | torch.device = "cpu"):
    """A trained run, ready to sample: `model, diffusion, config = load("runs/a")`.

    `path` is the run's folder or its checkpoint file. The model has its EMA weights, frozen
    (`model.requires_grad_()` to train them), and is in eval mode; `config` is the checkpoint's
    info: "model", "diffusion", "train" (dicts), "step", "classes" (names), and "file", its path:
    not the newest's where that is damaged, as in `newest`.
    Raises CheckpointError (a ValueError), one sentence, when the file is missing or unreadable, and
    ValueError when the device is not there.
    """
    device = usable_device(device)
    file, tensors, info = newest(path)
    model, diffusion = build(tensors, info, "ema", file)
    model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return model, diffusion, {**info, "file": file}


def check_range(info: dict, run: str | os.PathLike) -> None:
    """Raises ValueError, one sentence, where the pictures of a run lay in [0, 1]: the commands that
    draw know [−1, 1]."""
    if info.get("unit"):
        raise ValueError(
            f"{run} was trained on pictures in [0, 1], a cell of engine.ablate's slides protocol: "
            "its pictures and scores are in that study's folder"
        )


def load_classifier(path: str | os.PathLike, *, device: str | torch.device = "cpu"):
    """The noisy classifier of a run of engine.train_classifier, in eval mode.

    `classifier(x_t, t)` gives logits (N, num_classes); `classifier.diffusion` is the process whose
    x_t it has learnt. Raises as `load`.
    """
    from .classifier import Classifier
    from .diffusion import Diffusion

    device = usable_device(device)
    file, tensors, info = newest(path)
    if info.get("kind") != "classifier":
        raise CheckpointError(
            f"{file} is a diffusion model's, expected a classifier's: give the folder of a run of "
            "python -m engine.train_classifier"
        )
    try:
        model = _filled(Classifier, info["model"], tensors, "model", ("model",))
        model.diffusion = Diffusion(tensors["diffusion.betas"])
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"{file} does not describe a classifier of this engine: {reason}; {ADVICE}"
        ) from None
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

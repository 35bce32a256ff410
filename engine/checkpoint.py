"""Checkpoints: one safetensors file with all that training needs to go on and sampling to start.

Tensors: `model.*` weights, `ema.*` their moving average, `optimizer.<state>.<parameter>`,
`diffusion.betas`. Metadata: one JSON text under the key `diffusion_engine`. No pickle, so a foreign
file can do no harm.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from .cli import neighbour
from .device import usable_device
from .foreign import (
    CheckpointError,
    load_ddpm_tf,
    load_diffusers,
    load_openai,
    load_openai_classifier,
    save_diffusers,
)

__all__ = ["CheckpointError", "build", "find", "load", "load_classifier", "part", "read", "save"]
# Other projects':
__all__ += ["load_ddpm_tf", "load_diffusers", "load_openai", "load_openai_classifier"]
__all__ += ["save_diffusers"]

FILE = "checkpoint.safetensors"  # in the run's folder
FORMAT = 1
KEY = "diffusion_engine"
REQUIRED = {"model": dict, "diffusion": dict, "train": dict, "step": int, "skipped": int}
ADVICE = "use another checkpoint, or train again with another --out"


def find(path: str | os.PathLike) -> Path:
    """The checkpoint of a run's folder, or the file itself. CheckpointError if there is none."""
    path = Path(path).expanduser()
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        hint = f"there is no such file or folder{neighbour(path)}"
        if path.is_dir():
            inside = sorted(str(found.parent) for found in path.glob(f"*/{FILE}"))
            runs = f"; there are runs in {', '.join(inside[:5])}" if inside else ""
            hint = f"the folder has no {FILE}{runs}"
        raise CheckpointError(f"no checkpoint at {path}: {hint}")
    return file


def save(path: str | os.PathLike, tensors: dict[str, Tensor], info: dict) -> None:
    """Writes the file atomically: after a crash, the old or the new one is there, whole.

    What a killed process was writing lies in FILE.tmp, a folder; the next save removes it.
    """
    from safetensors.torch import save_file

    path = Path(path)
    metadata = {KEY: json.dumps({"format": FORMAT, **info})}
    # Same disk: os.replace must not cross disks. A folder: safetensors writes under a name that it
    # makes up, and renames.
    place = path.with_name(path.name + ".tmp")
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network disks have no locks
            fcntl.flock(folder, fcntl.LOCK_EX)  # until it is closed: `place` may be another's
        _remove(place)
        place.mkdir(exist_ok=True)
        temporary = place / path.name
        try:
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata
            )
            with open(temporary, "rb+") as file:
                os.fchmod(file.fileno(), 0o666 & ~_umask())  # safetensors makes it the user's own
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            _remove(place)
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def _remove(place: Path) -> None:
    """Removes a folder with all that is in it, or a file; a folder only as far as that is allowed,
    for it does not stand in the way."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read(path: str | os.PathLike, prefix: str = "") -> tuple[dict[str, Tensor], dict]:
    """Tensors whose names start with `prefix`, on the CPU, and the file's info.

    Raises CheckpointError for an unreadable, truncated or foreign file, or one of a newer format.
    """
    from safetensors import SafetensorError, safe_open

    file = find(path)
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if KEY not in metadata:
                raise CheckpointError(
                    f"{file} is a safetensors file, but not a checkpoint of this engine "
                    f"(no {KEY!r} in its metadata)"
                )
            info = json.loads(metadata[KEY])
            if not isinstance(info, dict):
                raise CheckpointError(f"{file} has metadata that is no JSON object: {ADVICE}")
            if info.get("format") != FORMAT:
                raise CheckpointError(
                    f"{file} has checkpoint format {info.get('format')}, "
                    f"this engine reads format {FORMAT}"
                )
            for key, kind in REQUIRED.items():
                if not isinstance(info.get(key), kind):
                    raise CheckpointError(f"{file} has no {key!r} in its metadata: {ADVICE}")
            return {k: opened.get_tensor(k) for k in opened.keys() if k.startswith(prefix)}, info  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{file} is not a readable checkpoint ({file.stat().st_size} bytes; truncated, damaged "
            f"or of another kind): {error}; {ADVICE}"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None


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
        model = UNet(**info["model"])
        for name in ("model", "ema"):
            if part(tensors, f"{name}.").keys() != model.state_dict().keys():
                raise ValueError(f"its {name} weights do not belong to its model")
        model.load_state_dict(part(tensors, f"{weights}."))
        diffusion = Diffusion(tensors["diffusion.betas"], **info["diffusion"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{file} does not describe a model of this engine: {reason}; {ADVICE}"
        ) from None
    return model, diffusion


def load(path: str | os.PathLike, *, device: str | torch.device = "cpu"):
    """A trained run, ready to sample: `model, diffusion, config = load("runs/a")`.

    `path` is the run's folder or its checkpoint file. The model has its EMA weights, frozen
    (`model.requires_grad_()` to train them), and is in eval mode; `config` is the checkpoint's
    info: "model", "diffusion", "train" (dicts), "step", "classes" (names).
    Raises CheckpointError (a ValueError), one sentence, when the file is missing or unreadable, and
    ValueError when the device is not there.
    """
    device = usable_device(device)
    file = find(path)
    tensors, info = read(file)
    model, diffusion = build(tensors, info, "ema", file)
    model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return model, diffusion, info


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
    file = find(path)
    tensors, info = read(file)
    if info.get("kind") != "classifier":
        raise CheckpointError(
            f"{file} is a diffusion model's, expected a classifier's: give the folder of a run of "
            "python -m engine.train_classifier"
        )
    try:
        model = Classifier(**info["model"])
        model.load_state_dict(part(tensors, "model."))
        model.diffusion = Diffusion(tensors["diffusion.betas"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{file} does not describe a classifier of this engine: {reason}; {ADVICE}"
        ) from None
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

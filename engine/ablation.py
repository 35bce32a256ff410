"""The ablation of noise schedule and loss: a training run per cell, sampled clipped and not.

A cell is a folder with an ordinary run (from which engine.sample draws) and, per way of sampling, a
record: scores, and what the reverse process did on its way. Records are
written atomically and never twice, so a study that was killed goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint, data, resume, run_lock, train
from .device import autocast, choose_device, choose_precision
from .diffusion import Diffusion
from .samplers import sample
from .signals import Stopped
from .trainer import Trainer
from .unet import UNet

BATCH = 100  # samples drawn at a time
TRACED = 60  # steps of the reverse process that a record keeps, beside the first ten


@dataclass(frozen=True)
class Protocol:
    """How every cell is trained and sampled; what the cells differ in is not in it."""

    name: str
    about: str
    model: dict  # UNet's options
    train: dict  # TrainConfig's
    sample_steps: str  # as schedules.respace takes it
    n: int  # samples to score
    splits: int = 1  # of the Inception Score
    unit: bool = False  # pictures in [0, 1] in place of [−1, 1]


PROTOCOLS = {
    "slides": Protocol(
        "slides",
        "15 epochs of 128 pictures in [0, 1], Adam at 0.001, no EMA, all 1000 steps sampled",
        dict(
            image_size=28,
            in_channels=1,
            model_channels=28,
            channel_mult=(1, 2, 4),
            num_res_blocks=2,
            attention_resolutions=(14, 7),
            num_groups=4,
        ),
        # One epoch is 60,000/128 steps. Decay 0, EMA 0 and this gradient norm switch those off.
        dict(batch=128, steps=7031, lr=1e-3, warmup=0, decay=0.0, ema=0.0, clip=1e9),
        sample_steps="1000",
        n=1000,
        unit=True,
    ),
    "small": Protocol(
        "small",
        "for a CPU: 1000 steps of 32 pictures in [-1, 1]; 69 of the 1000 diffusion steps "
        "sampled, all of the last 20 among them",
        dict(
            image_size=28,
            in_channels=1,
            model_channels=24,
            channel_mult=(1, 2, 2),
            num_res_blocks=1,
            num_groups=4,
        ),
        dict(batch=32, steps=1000, lr=2e-3, warmup=50, decay=0.6, ema=0.99, clip=1.0),
        # Of every 20 steps the first, and all of the last 20, where the reverse process starts.
        sample_steps=",".join(["1"] * 49 + ["20"]),
        n=1000,
    ),
}


@dataclass(frozen=True)
class Cell:
    """One training run of the grid."""

    schedule: str
    loss: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.schedule}-{self.loss}-seed{self.seed}"


@dataclass
class Study:
    """All that the cells share."""

    protocol: Protocol
    folder: Path
    images: data.Images
    scorer: Callable[[Tensor], dict]  # (n, C, H, W) uint8 → {metric: {"value", "error"}}
    scorer_name: str
    clips: tuple[bool, ...] = (True, False)
    data_dir: Path | None = None
    device: str | None = None
    precision: str = "auto"

    def folder_of(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.name

    def record_of(self, cell: Cell, clip: bool) -> Path:
        return self.folder_of(cell) / ("clip.json" if clip else "no-clip.json")

    def train_config(self, cell: Cell) -> train.TrainConfig:
        config = train.TrainConfig(
            out=self.folder_of(cell),
            data_dir=self.data_dir,
            schedule=cell.schedule,
            prediction="eps",
            loss=cell.loss,
            seed=cell.seed,
            device=self.device,
            precision=self.precision,
            sample_every=0,
            samples=0,
            tensorboard=False,
            **self.protocol.train,
        )
        train.validate(config)
        return config

    def settings(self) -> dict:
        """What two records must share to stand in one table; JSON."""
        precision = choose_precision(self.precision, choose_device(self.device))
        shared = dataclasses.asdict(self.protocol) | {"scorer": self.scorer_name}
        shared["precision"] = str(precision).removeprefix("torch.")
        return json.loads(json.dumps(shared))


def grid(schedules: list[str], losses: list[str], seeds: int) -> list[Cell]:
    """Every cell, seed after seed, so that a study that is cut short has a whole table first."""
    return [
        Cell(*names, seed) for seed, *names in itertools.product(range(seeds), schedules, losses)
    ]


# --- a cell -------------------------------------------------------------------------------------


def run(study: Study, cell: Cell) -> tuple[list[dict], bool]:
    """Trains the cell as far as it is not trained, samples and scores what has no record yet.

    → its records, one per way of sampling, and whether any of them is new.
    """
    missing = [clip for clip in study.clips if read(study, cell, clip) is None]
    if missing:
        trained(study, cell)
        model, diffusion, _ = checkpoint.load(
            study.folder_of(cell), device=choose_device(study.device)
        )
    for clip in missing:
        start = time.perf_counter()
        x0, trace = draw(study, model, diffusion, seed=cell.seed, clip=clip)
        record = {
            "schedule": cell.schedule,
            "loss": cell.loss,
            "seed": cell.seed,
            "clip": clip,
            "settings": study.settings(),
            "n": len(x0),
            "scores": study.scorer(to_pixels(x0, study.protocol.unit)),
            "final": pixel_statistics(x0, study.protocol.unit),
            "trace": trace,
            "seconds": round(time.perf_counter() - start, 1),
        }
        write(study.record_of(cell, clip), json.dumps(record, indent=1) + "\n")
    return [read(study, cell, clip) for clip in study.clips], bool(missing)


def read(study: Study, cell: Cell, clip: bool) -> dict | None:
    """A record, or None. Raises ValueError for one that was made under other settings."""
    path = study.record_of(cell, clip)
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        saved = record["settings"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path} is no record of an ablation: move it away") from None
    now = study.settings()
    for name in now:
        if saved.get(name) != now[name]:
            raise ValueError(
                f"{path} was made with {name} {saved.get(name)}, not {now[name]}: give the options "
                "of then, or another --out"
            )
    return record


def write(path: Path, text: str) -> None:
    """Writes a file so that after a crash the old or the new one is there, whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def trainer(study: Study, cell: Cell) -> Trainer:
    """The cell's run as its folder has it, or a new one. Nothing is written."""
    config, folder = study.train_config(cell), study.folder_of(cell)
    tensors, info = {}, None
    if folder.is_dir() and checkpoint.files(folder):
        resume.check_resume(config, train.saved_config(folder))
        file, tensors, info = checkpoint.newest(folder)
        model, diffusion = checkpoint.build(tensors, info, "model", file)
    else:
        torch.manual_seed(cell.seed)
        model, diffusion = UNet(**study.protocol.model), train.new_diffusion(config)
    images = dataclasses.replace(study.images, unit=study.protocol.unit)
    loop = Trainer(config, model, diffusion, images, folder)
    if info is not None:
        loop.restore(tensors, info)
    return loop


def trained(study: Study, cell: Cell) -> None:
    folder = study.folder_of(cell)
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock.held(folder):  # engine.train could go on with it at the same time
        _trained(study, cell)


def _trained(study: Study, cell: Cell) -> None:
    loop = trainer(study, cell)
    if loop.step == loop.config.steps:
        return
    if loop.step > loop.config.steps:
        raise ValueError(
            f"{loop.folder} was trained for {loop.step} steps, not {loop.config.steps}: give the "
            "--steps of then, or another --out"
        )
    try:
        loop.run()
    except Stopped as stop:
        raise Stopped(
            f"stopped and saved at step {loop.step} of {loop.config.steps} of {cell.name}: "
            "the same command goes on from there",
            stop.code,
        ) from None


# --- sampling under observation -----------------------------------------------------------------


class Watch:
    """The model, called as ever; notes of every step what goes in and which x̂_0 comes out."""

    def __init__(self, model: Callable, diffusion: Diffusion, low: float) -> None:
        self.model, self.diffusion, self.low = model, diffusion, low
        self.rows: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        out = self.model(x, t)
        x0 = self.diffusion.predict_x0(x.float(), t, out.float())
        outside = ((x0 < self.low) | (x0 > 1)).float().mean()
        values = [t[0].float(), x.abs().max(), x.square().mean(), x0.abs().max(), outside]
        self.rows.append(torch.stack(values))
        return out


def draw(study: Study, model, diffusion: Diffusion, *, seed: int, clip: bool):
    """n samples x_0 (n, C, H, W) float32 on the CPU, and the trace of the reverse process.

    The trace has lists, one value per kept step: t; of what the network is given max_x = max |x_t|
    and rms_x, beside rms_forward, that of q(x_t | x_0) for real x_0; of the x̂_0 that it predicts,
    before any clipping, max_x0 and outside_x0, the share of pixels outside the data's range. And
    first_factor, 1/√α of the first reverse step.
    """
    p, config = study.protocol, model.config
    device = choose_device(study.device)
    precision = choose_precision(study.precision, device)
    shape = (config["in_channels"], config["image_size"], config["image_size"])
    parts, tables = [], []
    for start in range(0, p.n, BATCH):
        watch = Watch(model, diffusion, 0.0 if p.unit else -1.0)
        with autocast(device, precision):
            x = sample(
                watch,
                diffusion,
                (min(BATCH, p.n - start), *shape),
                steps=p.sample_steps,
                seed=seed,
                clip=clip,
                offset=start,
                device=device,
            )
        parts.append(x.cpu())
        tables.append(torch.stack(watch.rows).double().cpu())  # the one wait for the device
    table = torch.stack(tables)  # (batches, steps, values)
    size = torch.tensor([len(part) for part in parts], dtype=torch.float64)
    weight = (size / size.sum())[:, None]
    t, rms = table[0, :, 0].long(), (weight * table[:, :, 2]).sum(0).sqrt()
    alpha_bar = diffusion.alpha_bar[t]
    forward = (alpha_bar * mean_square(study.images, p.unit) + 1 - alpha_bar).sqrt()
    kept = sorted({*range(min(10, len(t))), *range(0, len(t), -(-len(t) // TRACED)), len(t) - 1})
    columns = {
        "max_x": table[:, :, 1].amax(0),
        "rms_x": rms,
        "rms_forward": forward,
        "max_x0": table[:, :, 3].amax(0),
        "outside_x0": (weight * table[:, :, 4]).sum(0),
    }
    trace = {"first_factor": float((1 - diffusion.respaced(p.sample_steps).betas[-1]) ** -0.5)}
    trace["t"] = t[kept].tolist()
    trace |= {k: [float(f"{v:.5g}") for v in c[kept].tolist()] for k, c in columns.items()}
    trace["highest_x"] = float(table[:, :, 1].max())
    return torch.cat(parts), trace


def mean_square(images: data.Images, unit: bool) -> float:
    """E x_0² over the first 1000 pictures."""
    pixels = images.pixels[:1000].double() / 255
    return float((pixels if unit else 2 * pixels - 1).square().mean())


def to_pixels(x0: Tensor, unit: bool) -> Tensor:
    """Samples in the protocol's range → (n, C, H, W) uint8."""
    scaled = x0.mul(255) if unit else x0.add(1).mul(127.5)
    return scaled.nan_to_num(0).round().clamp(0, 255).to(torch.uint8)


def pixel_statistics(x0: Tensor, unit: bool) -> dict[str, float]:
    """Of samples: max |x|; shares of pixels outside the data's range, and black or white in it."""
    low = 0.0 if unit else -1.0
    pixels, half = to_pixels(x0, unit), (1 - low) / 510  # within half a grey level rounding mends
    outside = (x0 < low - half) | (x0 > 1 + half) | ~x0.isfinite()
    return {
        "max": float(x0.abs().max()),
        "outside": float(outside.double().mean()),
        "saturated": float(((pixels == 0) | (pixels == 255)).double().mean()),
    }


# --- scores -------------------------------------------------------------------------------------

METRICS = ("is", "fid", "kid")
RESAMPLED = 100  # bootstrap samples behind a standard error


def domain_scorer(images: data.Images, test: data.Images, splits: int, device, folder=None):
    """→ scorer, its name, and the scores of the test pictures for a given n.

    Inception Score, FID and KID on the features of the data set's own classifier (engine.scores),
    against the training pictures. The classifier is trained once and cached in `folder`.
    """
    from . import cache, scores

    folder = cache.folder(folder)
    extractor = scores.domain_extractor(images, test, folder, device)
    real = scores.statistics(extractor, images, folder, "the training set")

    def figures(features: Tensor, logits: Tensor, subsets: int) -> dict[str, float]:
        size = max(2, min(1000, len(features) // 2))
        kid, _ = scores.kernel_distance(
            real.features, features, subsets=subsets, subset_size=size, seed=0
        )
        return {
            "is": scores.inception_score(logits, splits=splits, seed=0)[0],
            "fid": scores.frechet_distance(real.mean, real.cov, features),
            "kid": kid,
        }

    def scorer(pixels: Tensor) -> dict:
        pieces = extractor(pixels.split(scores.PIECE), len(pixels), "the samples")
        features, logits = map(torch.cat, zip(*pieces, strict=True))
        found = figures(features, logits, subsets=100)
        generator = torch.Generator().manual_seed(0)
        again = []
        for _ in range(RESAMPLED):
            i = torch.randint(len(features), (len(features),), generator=generator)
            again.append(figures(features[i], logits[i], subsets=10))
        errors = {k: torch.tensor([a[k] for a in again]).std().item() for k in found}
        return {k: {"value": v, "error": errors[k]} for k, v in found.items()}

    def baseline(n: int) -> dict:
        chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:n]
        return {"n": len(chosen), "scores": scorer(test.pixels[chosen])}

    return scorer, f"{extractor.name}, {splits} split(s)", baseline

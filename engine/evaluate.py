"""`python -m engine.evaluate`: score a trained run's samples against real pictures."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from . import cli, evaluation

if TYPE_CHECKING:
    import torch

    from .distributed import Processes

try:
    from tyro.conf import Positional
except ImportError:  # cli.parse says so
    Positional = None

PROG = "python -m engine.evaluate"
SETTINGS = ("sampler", "spacing", "eta", "clip", "guidance", "batch")
METRICS = ("fid", "kid", "is", "prc", "agreement", "nll")


@dataclass(frozen=True)
class EvaluateConfig:
    """Score the samples of a trained run against real pictures.

    The same figures for real test pictures stand beside, as the best that could be had. All of it
    is added to evaluation.json in the run's folder.
    """

    run: Annotated[Path, Positional]
    """Folder of a run, or its checkpoint file."""
    metrics: str = "fid,kid,is,prc"
    """What to compute, with commas between: fid, kid, is (Inception Score), prc (precision and
    recall), agreement (of a domain classifier with the labels asked for), nll (bits/dim)."""
    n: Annotated[int, cli.also("-n")] = 2000
    """Number of samples; FID falls as it grows, so compare figures of the same n alone."""
    seed: int = 0
    """Seed of the noise, the splits and the subsets."""
    features: Literal["auto", "domain", "inception"] = "auto"
    """Feature extractor: a classifier trained on the data set itself and cached, or Inception; auto
    is domain for fashion-mnist, else inception where its weights are, else domain."""
    inception_weights: Annotated[Path | None, cli.left_out("torch.hub's cache")] = None
    """File with torch-fidelity's Inception weights; nothing is downloaded."""
    splits: int = 10
    """Splits of the Inception Score."""
    kid_subsets: int = 100
    """Random subsets of KID."""
    kid_subset_size: Annotated[int | None, cli.left_out("1000, at most half of --n")] = None
    """Pictures in a subset of KID."""
    neighbours: int = 3
    """k of precision and recall: balls reach to the k-th neighbour."""
    nll_n: Annotated[int | None, cli.left_out("100, at most --n")] = None
    """Test pictures for bits/dim; each takes T network calls."""

    sampler: Literal["ddpm", "ddim", "dpm++", "heun"] = "ddim"
    """Sampler; heun calls the network twice a step."""
    steps: Annotated[
        str | None, cli.left_out("50 for ddim, 20 for dpm++, 18 for heun, all T for ddpm")
    ] = None
    """Steps of the reverse process: a number; 10,10,30 for so many of each third of the T; or ddimN
    for N at an even stride."""
    spacing: Annotated[
        Literal["uniform", "karras"] | None, cli.left_out("karras for heun, else uniform")
    ] = None
    """How the steps are spread: evenly over t, or as Karras et al. 2022 do, denser at low noise."""
    eta: float = 0.0
    """Noise of ddim, from 0, none, to 1, as much as ddpm's."""
    clip: bool = True
    """Clip x0 to [-1, 1] in every step."""
    guidance: Annotated[float | None, cli.left_out("none")] = None
    """Scale of classifier-free guidance, of a class-conditional model that was trained with label
    dropout: 1 is the model as it is, more gives clearer classes and less variety."""

    baseline: bool = True
    """Score real test pictures too."""
    dataset: Annotated[str | None, cli.left_out("what the run was trained on")] = None
    """Real pictures, as for engine.train: where they are now, if they have moved."""
    data_dir: Annotated[Path | None, cli.left_out("as for training")] = None
    """Folder with Fashion-MNIST's four IDX files."""
    cache: Annotated[Path | None, cli.left_out("~/.cache/diffusion-engine")] = None
    """Folder for the trained classifier and the statistics of the real pictures."""
    batch: int = 100
    """Samples computed at a time."""
    device: Annotated[str | None, cli.left_out("cuda where there is one, else cpu", "NAME")] = None
    """Device: cpu, cuda, cuda:1 …"""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the U-Net; auto is bf16 where the device has it, but fp32 for bits/dim."""

    @property
    def subset_size(self) -> int:
        return self.kid_subset_size or max(2, min(1000, self.n // 2))


def command(args: Sequence[str] | None) -> None:
    config = cli.parse(EvaluateConfig, PROG, args)
    metrics = check(config)

    from .dealing import together

    with together(config.device) as (processes, device):
        record = evaluate(config, metrics, processes, device)
    if record is not None:
        print(evaluation.table(record))


def check(config: EvaluateConfig) -> list[str]:
    """The metrics asked for. Raises ValueError, one sentence, before anything is computed."""
    metrics = [name.strip().lower() for name in config.metrics.split(",")]
    for name in metrics:
        if name not in METRICS:
            near = difflib.get_close_matches(name, METRICS, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"--metrics {name!r} is unknown: choose of {', '.join(METRICS)}, with commas "
                f"between{meant}"
            )
    least = {"n": 2, "batch": 1, "splits": 1, "kid_subsets": 1, "neighbours": 1}
    least |= {"kid_subset_size": 2, "nll_n": 2}
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise ValueError(f"{cli.option(name)} must be at least {low}, not {value}")
    if not -(2**63) <= config.seed < 2**63:
        raise ValueError(f"--seed must fit 64 bits, not {config.seed}")
    if not 0 <= config.eta <= 1 or (config.eta and config.sampler != "ddim"):
        raise ValueError(f"--eta {config.eta} must lie in 0 … 1 and goes with --sampler ddim only")
    if config.guidance is not None and not math.isfinite(config.guidance):
        raise ValueError(f"--guidance must be a finite number, not {config.guidance}")
    if config.guidance is not None and set(metrics) == {"nll"}:
        raise ValueError("--guidance guides samples, of which nll has none: leave it out")
    n = config.n
    if "kid" in metrics and config.subset_size > n:
        raise ValueError(f"--n {n} is less than --kid-subset-size {config.kid_subset_size}")
    if "is" in metrics and not makes(n, config.splits):
        raise ValueError(
            f"--n {n} does not make {config.splits} splits: give more --n, or fewer --splits"
        )
    if "prc" in metrics and n <= config.neighbours:
        raise ValueError(f"--n {n} leaves no {config.neighbours} neighbours: give more --n")
    return list(dict.fromkeys(metrics))


def evaluate(
    config: EvaluateConfig, metrics: list[str], processes: Processes, device: torch.device
) -> dict | None:
    """Draws, scores, adds a record to RUN/evaluation.json and returns it; None but on rank 0.

    All processes draw and compute features and bits/dim; rank 0 makes figures of them and alone
    has the cache and the run's folder.
    """
    from . import cache, checkpoint, dealing, scores, scoring
    from .coefficients import asked_steps
    from .device import choose_precision

    if {"fid", "kid", "is"} & set(metrics):
        import torchmetrics  # noqa: F401  # where it is missing, that is said before all the work
    model, diffusion, info = checkpoint.load(config.run, device=device)
    file = info["file"]  # an older one where the newest is damaged
    if processes.first:
        cli.make_writable(file.parent, "RUN")
        evaluation.read(file.parent)  # a file that is none is said before all the work
    checkpoint.check_range(info, config.run)
    steps = asked_steps(config.steps, config.sampler, config.spacing, diffusion.T)
    folder = cache.folder(config.cache)
    train, test = scoring.real_pictures(config, info, model, processes)
    check_pictures(config, metrics, info, model, train, test)
    precision = str(choose_precision(config.precision, device)).removeprefix("torch.")
    if processes.world > 1:
        pictures = [cache.fingerprint(images) for images in (train, test)]
        dealing.check_alike(processes, [model], precision=precision, pictures=pictures)
    record = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "run": str(config.run),
        "file": file.name,
        "trained_steps": info["step"],
        "n": config.n,
        "seed": config.seed,
        "settings": {
            **{k: getattr(config, k) for k in SETTINGS},
            "steps": steps,
            "device": str(device),
            "precision": precision,
        },
        "notes": [] if test.name == "fashion-mnist" else [SEEN.format(test.name)],
        "results": {},
    }
    drawn = real = held_out = terms = None
    if metrics != ["nll"]:
        extractor = scoring.choose_extractor(
            config, metrics, train, test, folder, device, processes
        )
        real = scores.statistics(extractor, train, folder, "the training set", processes)
        drawn = scoring.features(config, model, diffusion, steps, extractor, device, processes)
        if config.baseline:
            held_out = scores.statistics(extractor, test, folder, "the test set", processes)
    if "nll" in metrics:
        terms = scoring.likelihood(config, model, diffusion, test, device, processes)
    if not processes.first:
        return None
    if drawn is not None:
        record |= {
            "features": extractor.name,
            "real": {"data": train.name, "count": real.count},
            "splits": config.splits,
            "kid_subsets": config.kid_subsets,
            "kid_subset_size": config.subset_size,
            "neighbours": config.neighbours,
        }
        labels = scoring.labels_of(config, model)
        record["results"]["samples"] = scoring.score(
            config, metrics, real, *drawn, labels, record["notes"]
        )
    if held_out is not None:
        n = min(config.n, len(held_out.features))
        record["real"]["test_pictures"] = n
        some = held_out.features[:n], held_out.logits[:n], held_out.labels[:n]
        record["results"]["test pictures"] = scoring.score(config, metrics, real, *some, [])
    if terms is not None:
        plot = "nll.png" if file.name == checkpoint.FILE else f"nll-{file.stem}.png"
        computed = scoring.nll_precision(config, device)
        record["nll"] = scoring.bits_per_dim(config, terms, computed, file.parent / plot)
    for note in record["notes"]:
        print(f"note: {note}", file=sys.stderr)
    evaluation.add(file.parent, record)
    return record


SEEN = (
    "the test pictures are a tenth of {}: the classifier has not seen them, the run that is judged "
    "may have been trained on them"
)


def check_pictures(config: EvaluateConfig, metrics, info: dict, model, train, test) -> None:
    """Raises ValueError, one sentence, where real pictures and metrics do not fit each other."""
    conditional = model.config.get("num_classes")
    if "agreement" in metrics and not conditional:
        raise ValueError("--metrics agreement needs a class-conditional model (train --classes)")
    scale = config.guidance
    if scale is not None and (not conditional or (scale != 1 and model.null_label is None)):
        raise ValueError(
            f"--guidance {scale} needs a model that was trained with --classes and --label-dropout"
        )
    if conditional and {"agreement", "nll"} & set(metrics):
        found = [] if train.labels is None else list(train.classes)
        if found != info.get("classes"):
            raise ValueError(
                f"{train.name} has the classes {', '.join(found) or '(none)'}, but the run was "
                f"trained with {', '.join(info.get('classes', []))}: give --dataset with these"
            )
    n, k = min(config.n, len(test)), config.neighbours
    if config.baseline and "is" in metrics and not makes(n, config.splits):
        raise ValueError(
            f"{n} test pictures do not make {config.splits} splits: use fewer --splits, or "
            "--no-baseline"
        )
    fewest = min(n, len(train)) if config.baseline else len(train)
    if "prc" in metrics and fewest <= k:
        raise ValueError(
            f"{train.name} has {len(train)} training and {len(test)} test pictures, too few for "
            f"--neighbours {k}: use fewer, or --no-baseline"
        )


def makes(n: int, splits: int) -> bool:
    """Whether n pictures, in parts of equal length but for the last, make so many parts."""
    return -(-n // -(-n // splits)) == splits


def main(args: Sequence[str] | None = None) -> int:
    return cli.main(command, args)


if __name__ == "__main__":
    sys.exit(main())

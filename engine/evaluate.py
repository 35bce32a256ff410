"""`python -m engine.evaluate`: score a trained run's samples against real pictures."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal

from . import cli, evaluation

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
    n: int = 2000
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


def command(args: Sequence[str] | None) -> None:
    config = cli.parse(EvaluateConfig, PROG, args)
    metrics = check(config)
    record = evaluate(config, metrics)
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
    if "kid" in metrics and subset_size(config) > n:
        raise ValueError(f"--n {n} is less than --kid-subset-size {config.kid_subset_size}")
    if "is" in metrics and not makes(n, config.splits):
        raise ValueError(
            f"--n {n} does not make {config.splits} splits: give more --n, or fewer --splits"
        )
    if "prc" in metrics and n <= config.neighbours:
        raise ValueError(f"--n {n} leaves no {config.neighbours} neighbours: give more --n")
    return list(dict.fromkeys(metrics))


def subset_size(config: EvaluateConfig) -> int:
    return config.kid_subset_size or max(2, min(1000, config.n // 2))


def evaluate(config: EvaluateConfig, metrics: list[str]) -> dict:
    """Draws, scores, adds a record to RUN/evaluation.json and returns it."""
    from . import cache, checkpoint, scores
    from .coefficients import asked_steps
    from .device import choose_device, choose_precision

    if {"fid", "kid", "is"} & set(metrics):
        import torchmetrics  # noqa: F401  # where it is missing, that is said before all the work
    device = choose_device(config.device)
    model, diffusion, info = checkpoint.load(config.run, device=device)
    file = info["file"]  # an older one where the newest is damaged
    cli.make_writable(file.parent, "RUN")
    evaluation.read(file.parent)  # a file that is none is said before all the work
    checkpoint.check_range(info, config.run)
    steps = asked_steps(config.steps, config.sampler, config.spacing, diffusion.T)
    folder = cache.folder(config.cache)
    train, test = real_pictures(config, info, model)
    check_pictures(config, metrics, info, model, train, test)
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
            "precision": str(choose_precision(config.precision, device)).removeprefix("torch."),
        },
        "notes": [] if test.name == "fashion-mnist" else [SEEN.format(test.name)],
        "results": {},
    }
    if metrics != ["nll"]:
        extractor = choose_extractor(config, metrics, train, test, folder, device)
        dims = scores.statistics(extractor, train, folder, "the training set")
        record |= {
            "features": extractor.name,
            "real": {"data": train.name, "count": dims.count},
            "splits": config.splits,
            "kid_subsets": config.kid_subsets,
            "kid_subset_size": subset_size(config),
            "neighbours": config.neighbours,
        }
        drawn, y = draw(config, model, diffusion, steps, device)
        found = extractor(drawn.split(500), len(drawn), "the samples")
        record["results"]["samples"] = score(config, metrics, dims, *found, y, record["notes"])
        if config.baseline:
            real = scores.statistics(extractor, test, folder, "the test set")
            n = min(config.n, len(real.features))
            record["real"]["test_pictures"] = n
            record["results"]["test pictures"] = score(
                config, metrics, dims, real.features[:n], real.logits[:n], real.labels[:n], []
            )
    if "nll" in metrics:
        plot = "nll.png" if file.name == checkpoint.FILE else f"nll-{file.stem}.png"
        record["nll"] = bits_per_dim(config, model, diffusion, test, file.parent / plot, device)
    for note in record["notes"]:
        print(f"note: {note}", file=sys.stderr)
    evaluation.add(file.parent, record)
    return record


SEEN = (
    "the test pictures are a tenth of {}: the classifier has not seen them, the run that is judged "
    "may have been trained on them"
)


def real_pictures(config: EvaluateConfig, info: dict, model):
    """Training and test pictures; a data set without a test set of its own lends a tenth."""
    import torch

    from . import data

    name = config.dataset or info["train"].get("dataset") or "fashion-mnist"
    saved = info["train"].get("data_dir")
    options = {
        "size": model.config["image_size"],
        "channels": model.config["in_channels"],
        "data_dir": config.data_dir or (saved if name == "fashion-mnist" else None),
    }
    if name == "fashion-mnist":
        return tuple(data.open_dataset(name, split=s, **options) for s in ("train", "test"))
    try:
        images = data.open_dataset(name, labels=True, **options)
    except ValueError:  # no labels, or nothing at all
        images = data.open_dataset(name, **options)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held = len(images) // 10
    if held < 2:
        raise ValueError(
            f"--dataset {name} has {len(images)} pictures: 20 are the least, of which a tenth is "
            "held out as the test set"
        )
    return data.subset(images, order[held:]), data.subset(images, order[:held])


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


def choose_extractor(config: EvaluateConfig, metrics, train, test, folder: Path, device):
    """Makes the cache's folder too, but not where weights or labels are missing."""
    from . import inception, scores

    kind, weights = config.features, config.inception_weights
    if kind == "auto" and weights is not None:
        kind = "inception"
    if kind == "auto":
        kind = "domain" if train.name == "fashion-mnist" else "inception"
        if kind == "inception" and train.labels is not None:
            try:
                inception.find()
            except ValueError:
                kind = "domain"
    if "agreement" in metrics and kind != "domain":
        raise ValueError("--metrics agreement needs --features domain")
    if kind == "domain":
        if train.labels is not None and len(train.classes) > 1:  # else it will be refused
            cli.make_writable(folder, "--cache")
        return scores.domain_extractor(train, test, folder, device)
    extractor = scores.inception_extractor(inception.find(weights), device)
    cli.make_writable(folder, "--cache")
    return extractor


def draw(config: EvaluateConfig, model, diffusion, steps: int | str, device):
    """n samples as pictures (n, C, H, W) uint8, and the labels asked for (n,) or None."""
    import torch
    from tqdm import trange

    from . import pictures
    from .device import autocast, choose_precision
    from .samplers import sample

    precision = choose_precision(config.precision, device)
    size, channels = model.config["image_size"], model.config["in_channels"]
    classes = model.config.get("num_classes")
    y = torch.arange(config.n) % classes if classes else None
    parts = []
    for start in trange(0, config.n, config.batch, desc="sampling", unit="batch", leave=False):
        count = min(config.batch, config.n - start)
        with autocast(device, precision):
            images = sample(
                model,
                diffusion,
                (count, channels, size, size),
                sampler=config.sampler,
                steps=steps,
                spacing=config.spacing,
                eta=config.eta,
                seed=config.seed,
                clip=config.clip,
                guidance=config.guidance,
                y=None if y is None else y[start : start + count].to(device),
                offset=start,
            )
        # 8 bits, as the real ones have and a file of them would.
        parts.append(torch.from_numpy(pictures.to_bytes(images)).permute(0, 3, 1, 2))
    return torch.cat(parts), y


def score(config: EvaluateConfig, metrics, real, features, logits, labels, notes: list) -> dict:
    """The figures of one set of pictures against the statistics of the real one."""
    from . import scores

    n, d = features.shape
    found: dict = {"n": n}
    if "fid" in metrics:
        found["fid"] = scores.frechet_distance(real.mean, real.cov, features)
        for count, whose in ((n, "n"), (real.count, "the number of real pictures")):
            if count <= d:
                notes.append(
                    f"FID: {whose} is {count}, not above the {d} features, so a covariance is "
                    f"singular and the distance too large: use more than {d} pictures"
                )
    if "kid" in metrics:
        size = min(subset_size(config), n, len(real.features))
        options = {"subsets": config.kid_subsets, "subset_size": size, "seed": config.seed}
        found["kid"], found["kid_std"] = scores.kernel_distance(real.features, features, **options)
        found["kid_subset_size"] = size
    if "is" in metrics:
        splits = {"splits": config.splits, "seed": config.seed}
        found["is"], found["is_std"] = scores.inception_score(logits, **splits)
    if "prc" in metrics:
        some = real.features[:n]
        k = {"k": config.neighbours}
        found["precision"], found["recall"] = scores.precision_recall(some, features, **k)
        found["prc_real"] = len(some)
    if "agreement" in metrics:
        found["agreement"] = float((logits.argmax(1) == labels).double().mean())
    return found


def bits_per_dim(config: EvaluateConfig, model, diffusion, test, plot: Path, device) -> dict:
    """Bits/dim of test pictures with its parts; the terms over t as a picture."""
    import torch
    from tqdm import tqdm

    from . import curves, data
    from .device import autocast, choose_precision

    n = min(config.nll_n or min(100, config.n), len(test))
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:n]
    # bfloat16 would add to the bits: 0.014 of 3.87 on Fashion-MNIST.
    asked = "fp32" if config.precision == "auto" else config.precision
    precision = choose_precision(asked, device)
    conditional = model.config.get("num_classes")
    parts: dict[str, list] = {name: [] for name in ("total", "prior", "vb", "mse")}
    pieces = chosen.split(config.batch)
    for i, some in enumerate(tqdm(pieces, desc="bits/dim", unit="batch", leave=False)):
        pixels = next(data.in_order(test, some, len(some)))
        x0 = (pixels.float() / 127.5 - 1).to(device)
        y = {"y": test.labels[some].to(device)} if conditional else {}
        with autocast(device, precision):
            terms = diffusion.bits_per_dim(
                model, x0, **y, seed=config.seed, offset=i * config.batch, progress=True
            )
        for name, kept in parts.items():
            kept.append(getattr(terms, name).double().cpu())
    total, prior, vb, mse = (torch.cat(kept) for kept in parts.values())
    terms = {"vb": vb.mean(0).tolist(), "mse": mse.mean(0).tolist()}
    curves.vlb_terms({str(config.run): terms}, plot)
    return {
        "n": n,
        "bits_per_dim": float(total.mean()),
        "standard_error": float(total.std() / math.sqrt(n)) if n > 1 else None,
        "prior": float(prior.mean()),
        "decoder": float(vb[:, 0].mean()),  # −log p(x_0 | x_1)
        "kl": float(vb[:, 1:].sum(1).mean()),
        "T": diffusion.T,
        "precision": str(precision).removeprefix("torch."),
        "plot": plot.name,
        "terms": {name: [float(f"{v:.5g}") for v in values] for name, values in terms.items()},
    }


def main(args: Sequence[str] | None = None) -> int:
    return cli.main(command, args)


if __name__ == "__main__":
    sys.exit(main())

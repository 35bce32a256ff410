"""What engine.evaluate computes: pictures of both kinds, their features, figures, bits/dim."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from . import cli, curves, data, drawing, inception, pictures, scores
from .dealing import deal
from .device import autocast, choose_precision
from .distributed import Processes

if TYPE_CHECKING:
    from .evaluate import EvaluateConfig


def real_pictures(config: EvaluateConfig, info: dict, model, processes: Processes):
    """Training and test pictures; a data set without a test set of its own lends a tenth."""
    name = config.dataset or info["train"].get("dataset") or "fashion-mnist"
    saved = info["train"].get("data_dir")
    options = {
        "size": model.config["image_size"],
        "channels": model.config["in_channels"],
        "data_dir": config.data_dir or (saved if name == "fashion-mnist" else None),
    }
    if name == "fashion-mnist":
        # Machine by machine: the first process of each may have to download it.
        return processes.machine_by_machine(
            lambda: tuple(data.open_dataset(name, split=s, **options) for s in ("train", "test"))
        )
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


def choose_extractor(
    config: EvaluateConfig, metrics, train, test, folder: Path, device, processes: Processes
) -> scores.Extractor:
    """Makes the cache's folder too, but not where weights or labels are missing."""
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
    kind = processes.broadcast(kind)  # other machines may have other files
    if "agreement" in metrics and kind != "domain":
        raise ValueError("--metrics agreement needs --features domain")
    if kind == "domain":
        labelled = train.labels is not None and len(train.classes) > 1  # else it will be refused
        if processes.first and labelled:
            cli.make_writable(folder, "--cache")
        return scores.domain_extractor(train, test, folder, device, processes)
    extractor = scores.inception_extractor(inception.find(weights), device)
    processes.check_same({"Inception weights": extractor.key})
    if processes.first:
        cli.make_writable(folder, "--cache")
    return extractor


def draw(
    config: EvaluateConfig, model, diffusion, steps: int | str, device, mine: Iterable[int]
) -> Iterator[Tensor]:
    """The samples of these batches as pictures (≤ batch, C, H, W) uint8."""
    precision = choose_precision(config.precision, device)
    y = labels_of(config, model)
    for start in (i * config.batch for i in mine):
        with autocast(device, precision):
            images = drawing.numbered(config, model, diffusion, model, start, steps, y, device)
        # 8 bits, as the real ones have and a file of them would.
        yield torch.from_numpy(pictures.to_bytes(images)).permute(0, 3, 1, 2)


def labels_of(config: EvaluateConfig, model) -> Tensor | None:
    """The classes asked for (n,), or None."""
    classes = model.config.get("num_classes")
    return torch.arange(config.n) % classes if classes else None


def features(
    config: EvaluateConfig,
    model,
    diffusion,
    steps: int | str,
    extractor: scores.Extractor,
    device,
    processes: Processes,
) -> tuple[Tensor, Tensor] | None:
    """Features (n, d) and logits (n, classes) of n samples, on rank 0; None on other ranks."""

    def drawn(mine: range) -> Iterator[tuple[Tensor, Tensor]]:
        shown = tqdm(mine, desc="sampling", unit="batch", leave=False)
        return map(extractor.of, draw(config, model, diffusion, steps, device, shown))

    return deal(processes, -(-config.n // config.batch), drawn)


def score(config: EvaluateConfig, metrics, real, features, logits, labels, notes: list) -> dict:
    """The figures of one set of pictures against the statistics of the real one."""
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
        size = min(config.subset_size, n, len(real.features))
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


def likelihood(
    config: EvaluateConfig, model, diffusion, test: data.Images, device, processes: Processes
) -> tuple[Tensor, ...] | None:
    """Bits/dim of test pictures, float64: total (n,), prior (n,), vb (n, T), mse (n, T).

    On rank 0; None on the others.
    """
    n = min(config.nll_n or min(100, config.n), len(test))
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:n]
    conditional = model.config.get("num_classes")
    pieces = chosen.split(config.batch)

    def terms(mine: range) -> Iterator[tuple[Tensor, ...]]:
        for i in tqdm(mine, desc="bits/dim", unit="batch", leave=False):
            pixels = next(data.in_order(test, pieces[i], len(pieces[i])))
            x0 = (pixels.float() / 127.5 - 1).to(device)
            y = {"y": test.labels[pieces[i]].to(device)} if conditional else {}
            with autocast(device, nll_precision(config, device)):
                found = diffusion.bits_per_dim(
                    model, x0, **y, seed=config.seed, offset=i * config.batch, progress=True
                )
            yield tuple(
                getattr(found, name).double().cpu() for name in ("total", "prior", "vb", "mse")
            )

    return deal(processes, len(pieces), terms)


def nll_precision(config: EvaluateConfig, device) -> torch.dtype:
    # bfloat16 would add to the bits: 0.014 of 3.87 on Fashion-MNIST.
    return choose_precision("fp32" if config.precision == "auto" else config.precision, device)


def bits_per_dim(
    config: EvaluateConfig, found: tuple[Tensor, ...], precision: torch.dtype, plot: Path
) -> dict:
    """Bits/dim with its parts, of what `likelihood` found; the terms over t as a picture."""
    total, prior, vb, mse = found
    terms = {"vb": vb.mean(0).tolist(), "mse": mse.mean(0).tolist()}
    curves.vlb_terms({str(config.run): terms}, plot)
    n = len(total)
    return {
        "n": n,
        "bits_per_dim": float(total.mean()),
        "standard_error": float(total.std() / math.sqrt(n)) if n > 1 else None,
        "prior": float(prior.mean()),
        "decoder": float(vb[:, 0].mean()),  # −log p(x_0 | x_1)
        "kl": float(vb[:, 1:].sum(1).mean()),
        "T": vb.shape[1],
        "precision": str(precision).removeprefix("torch."),
        "plot": plot.name,
        "terms": {name: [float(f"{v:.5g}") for v in values] for name, values in terms.items()},
    }

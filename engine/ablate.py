"""`python -m engine.ablate`: noise schedules × losses on Fashion-MNIST, clipped and not."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from . import cli, run_lock

PROG = "python -m engine.ablate"
SCHEDULES = ("linear", "linear_unscaled", "cosine", "quadratic", "sigmoid")
LOSSES = ("l1", "l2", "huber")


@dataclass(frozen=True)
class AblateConfig:
    """Train Fashion-MNIST with every schedule and loss, sample with and without clipping, score.

    The same command goes on where a study was stopped. Its folder gets a run per cell, and
    ablation.md, .csv, .png and .json with all that is scored so far.
    """

    out: Path = Path("runs/ablation")
    """Folder of the study."""
    protocol: Literal["auto", "slides", "small"] = "auto"
    """How each cell is trained and sampled: slides as published, 15 epochs; small in 4 minutes on
    one CPU core; auto is slides on a GPU, else small."""
    schedules: str = "linear_unscaled,cosine,quadratic,sigmoid"
    """Noise schedules, with commas between: linear, linear_unscaled, cosine, quadratic, sigmoid."""
    losses: str = "l1,l2,huber"
    """Losses, with commas between."""
    seeds: int = 1
    """Seeds 0, 1, … per cell: weights, order of the pictures, noise."""
    clip: Literal["both", "on", "off"] = "both"
    """Clip x0 to [-1, 1] in every reverse step: the same weights sampled both ways, or one."""
    steps: Annotated[int | None, cli.left_out("the protocol's")] = None
    """Optimiser steps per cell."""
    n: Annotated[int | None, cli.left_out("the protocol's")] = None
    """Samples to score per cell and way of sampling."""
    sample_steps: Annotated[str | None, cli.left_out("the protocol's")] = None
    """Reverse steps: a number, or kept steps per section of the 1000, such as 1,1,1,50."""
    splits: Annotated[int | None, cli.left_out("the protocol's")] = None
    """Splits of the Inception Score."""
    dry_run: bool = False
    """List the cells and how long they may take, from one measured step; write nothing."""

    data_dir: Annotated[
        Path | None, cli.left_out("Debian's dataset-fashion-mnist, or download")
    ] = None
    """Folder with Fashion-MNIST's four IDX files."""
    cache: Annotated[Path | None, cli.left_out("~/.cache/diffusion-engine")] = None
    """Folder for the classifier whose features are compared, and the real pictures' statistics."""
    device: Annotated[str | None, cli.left_out("cuda where there is one, else cpu", "NAME")] = None
    """Device: cpu, cuda, cuda:1 …"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the U-Net; auto is bf16 where the device has it."""


def check(config: AblateConfig) -> tuple[list[str], list[str]]:
    """Schedules and losses asked for. Raises ValueError, one sentence, for what makes no sense."""
    chosen = []
    for name, known in (("schedules", SCHEDULES), ("losses", LOSSES)):
        found = [word.strip() for word in getattr(config, name).split(",")]
        for word in found:
            if word not in known:
                near = difflib.get_close_matches(word, known, 1)
                meant = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(
                    f"--{name} {word!r} is unknown: choose of {', '.join(known)}, with commas "
                    f"between{meant}"
                )
        chosen.append(list(dict.fromkeys(found)))
    for name, least in (("seeds", 1), ("steps", 1), ("n", 4), ("splits", 1)):
        number = getattr(config, name)
        if number is not None and number < least:
            raise ValueError(f"{cli.option(name)} must be at least {least}, not {number}")
    return chosen[0], chosen[1]


def ablate(config: AblateConfig, scorer: Callable | None = None) -> Path | None:
    """Carries out what is left of the study and returns the path of its table; None for a dry run.

    scorer  in place of the domain classifier: (n, C, H, W) uint8 → {metric: {"value", "error"}}
    """
    schedules, losses = check(config)
    # Late, so that --help and a wrong option are answered without waiting for torch.
    from . import ablation, data
    from .device import choose_device
    from .schedules import kept_steps

    device = choose_device(config.device)
    protocol = choose_protocol(config, device)
    kept_steps(1000, protocol.sample_steps)
    images, test = (
        data.open_dataset("fashion-mnist", data_dir=config.data_dir, split=split)
        for split in ("train", "test")
    )
    study = ablation.Study(
        protocol,
        config.out,
        images,
        scorer,
        getattr(scorer, "__name__", "domain classifier"),
        clips={"both": (True, False), "on": (True,), "off": (False,)}[config.clip],
        data_dir=config.data_dir,
        device=config.device,
        precision=config.precision,
    )
    cells = ablation.grid(schedules, losses, config.seeds)
    if config.dry_run:
        print("\n".join(forecast(study, cells)))
        return None
    cli.make_writable(config.out, "--out")
    with run_lock.held(config.out):
        return carry_out(study, cells, config, test, device)


def carry_out(study, cells: list, config: AblateConfig, test, device) -> Path:
    """Trains, samples, scores and publishes what is left of the cells."""
    from . import ablation

    baseline = None
    if study.scorer is None:
        if config.cache is not None:
            cli.make_writable(config.cache, "--cache")
        study.scorer, study.scorer_name, baseline = ablation.domain_scorer(
            study.images, test, study.protocol.splits, device, config.cache
        )
    real = real_scores(study, baseline)
    records: list[dict] = []
    for number, cell in enumerate(cells, 1):
        start = time.perf_counter()
        found, fresh = ablation.run(study, cell)
        records += found
        taken = f"{time.perf_counter() - start:.0f} s" if fresh else "done before"
        print(f"{number}/{len(cells)} {cell.name}: {summary(found)}; {taken}", flush=True)
        if fresh or number == len(cells):
            path = publish(study, records, real)
    return path


def choose_protocol(config: AblateConfig, device):
    """The protocol with the options that replace parts of it."""
    from .ablation import PROTOCOLS

    usual = "slides" if device.type == "cuda" else "small"
    protocol = PROTOCOLS[usual if config.protocol == "auto" else config.protocol]
    names = ("steps", "n", "sample_steps", "splits")
    given = {k: getattr(config, k) for k in names if getattr(config, k) is not None}
    if given:
        said = ", ".join(f"{cli.option(k)} {v}" for k, v in given.items())
        given["about"] = f"{protocol.about}; but {said}"
    if "steps" in given:
        given["train"] = protocol.train | {"steps": given.pop("steps")}
    return dataclasses.replace(protocol, **given)


def real_scores(study, baseline: Callable | None) -> dict | None:
    """The scores of as many test pictures, kept beside the cells."""
    from . import ablation

    if baseline is None:
        return None
    path, key = study.folder / "real.json", [study.scorer_name, study.protocol.n]
    if path.exists():
        found = json.loads(path.read_text())
        if found["key"] == key:
            return found
    found = {"key": key, **baseline(study.protocol.n)}
    ablation.write(path, json.dumps(found, indent=1) + "\n")
    return found


def summary(records: list[dict]) -> str:
    """A cell's scores, one way of sampling / the other."""
    return ", ".join(
        f"{m.upper()} {' / '.join(format(r['scores'][m]['value'], '.3g') for r in records)}"
        for m in records[0]["scores"]
    )


def publish(study, records: list[dict], real: dict | None) -> Path:
    """Table, CSV, figure and all records so far, each replaced as a whole."""
    from . import ablation, ablation_report

    folder = study.folder
    ablation.write(folder / "ablation.md", ablation_report.markdown(records, real))
    ablation.write(folder / "ablation.csv", ablation_report.as_csv(records))
    whole = {"settings": study.settings(), "real": real, "records": []}
    whole["records"] = [{k: v for k, v in r.items() if k != "settings"} for r in records]
    ablation.write(folder / "ablation.json", json.dumps(whole) + "\n")
    figure = folder / "ablation.png.tmp"
    ablation_report.plot(records, real, figure)
    os.replace(figure, folder / "ablation.png")
    return folder / "ablation.md"


def forecast(study, cells) -> list[str]:
    """A line per cell, and the time that is left, from one step of training and one of sampling."""
    import torch

    from . import ablation, data
    from .schedules import kept_steps

    p, left, drawn, lines = study.protocol, 0, 0, []
    for cell in cells:
        loop = ablation.trainer(study, cell)
        undrawn = sum(ablation.read(study, cell, clip) is None for clip in study.clips)
        todo = loop.config.steps - loop.step if undrawn else 0
        left, drawn = left + todo, drawn + undrawn
        state = (
            f"step {loop.step} of {loop.config.steps}, {undrawn} of {len(study.clips)} to sample"
        )
        lines.append(f"{cell.name:<32} {state if undrawn else 'done'}")
    loop = ablation.trainer(study, cells[0])
    batch = data.batch(loop.images, 0, loop.config.batch, seed=0)
    size = (min(p.n, ablation.BATCH), *loop.images.pixels.shape[1:])

    def timed(function: Callable[[], object]) -> float:
        function()
        start = time.perf_counter()
        function()
        if loop.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    step = timed(lambda: loop.train_step(*batch))

    def forward() -> None:
        x = torch.zeros(size, device=loop.device)
        with torch.inference_mode(), loop.execution.autocast():
            loop.model(x, torch.zeros(len(x), dtype=torch.int64, device=loop.device))

    calls = len(kept_steps(loop.diffusion.T, p.sample_steps)) * -(-p.n // ablation.BATCH)
    call = timed(forward)
    seconds = left * step + drawn * calls * call
    return [
        *lines,
        f"{len(cells)} cells by protocol {p.name}: {p.about}",
        f"about {seconds / 60:.0f} minutes left: {left} steps of {1000 * step:.0f} ms, {drawn} "
        f"times {p.n} samples in {calls} calls of {1000 * call:.0f} ms; scoring not counted",
    ]


def command(args: Sequence[str] | None) -> None:
    config = cli.parse(AblateConfig, PROG, args)
    cli.alone(PROG)
    table = ablate(config)
    if table is not None:
        print(table.read_text())
        for suffix in (".md", ".csv", ".png", ".json"):
            print(table.with_suffix(suffix))


def main(args: Sequence[str] | None = None) -> int:
    return cli.main(command, args)


if __name__ == "__main__":
    sys.exit(main())

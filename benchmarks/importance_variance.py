"""How much loss-aware importance sampling of t lessens the noise of the VLB's gradient.

    python benchmarks/importance_variance.py        # 3 minutes on a CPU core

A small U-Net learns Fashion-MNIST at 16×16 by loss="vlb" (T = 1000, learned variance), once with t
uniform, once loss-aware. At some steps of the loss-aware run its weights are held:
there both samplers estimate the same gradient g, so that the trace of the estimate's covariance,
E|ĝ − g|², tells them apart (Nichol & Dhariwal 2021, §3.3). Writes
results/importance-variance.json and .png.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine import UNet, checkpoint, data
from engine.train import TrainConfig, complete, new_diffusion
from engine.trainer import Trainer

RESULTS = Path(__file__).parent / "results"
SIZE, BATCH = 16, 32
NET = dict(
    image_size=SIZE,
    in_channels=1,
    out_channels=2,
    model_channels=16,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    num_groups=4,
)


def trainer(t_sampler: str, steps: int, images: data.Images, folder: Path) -> Trainer:
    config = complete(
        TrainConfig(
            out=folder,
            timesteps=1000,
            prediction="eps",
            variance="learned_range",
            loss="vlb",
            t_sampler=t_sampler,
            steps=steps,
            batch=BATCH,
            lr=1e-3,
            device="cpu",
            precision="fp32",
        )
    )
    torch.manual_seed(config.seed)
    return Trainer(config, UNet(**NET), new_diffusion(config), images, folder)


def measure(run: Trainer, images: data.Images, count: int) -> dict:
    """Gradient noise of both samplers at the run's weights, from the same draws.

    One picture each, t ~ p of the loss-aware sampler, with weight w = 1/(T p_t) and gradient g_t of
    L_t. What the loss-aware sampler sees is w g_t, so that E_p[w² |g_t|²] − |g|² is its variance
    for one picture; E_p[w |g_t|²] − |g|² is the uniform sampler's, whose rare large terms would
    need many more draws of its own. g = E_p[w g_t].
    """
    x, _ = data.batch(images, run.step, count, seed=17)
    generator = data.generator(17, 2, run.step)
    t, weights = run.t_sampler.sample(count, generator)
    run.model.train()
    w, squares = weights.double(), torch.empty(count, dtype=torch.float64)
    mean = 0.0
    for i in range(count):
        draw = {"t": t[i : i + 1], "key": 17, "step": run.step * count + i}
        loss = run.diffusion.loss(run.model, x[i : i + 1], **draw)
        found = torch.autograd.grad(loss, list(run.parameters.values()))
        g = torch.cat([part.flatten() for part in found]).double()
        squares[i] = g.square().sum()
        mean = mean + w[i] * g / count
    seen = {"uniform": w * squares, "loss-aware": w**2 * squares}
    # |mean|² is too large by the variance of the mean.
    norm = mean.square().sum()
    signal = (norm - (seen["loss-aware"].mean() - norm) / (count - 1)).clamp(min=0)
    record = {"step": run.step, "warm": run.t_sampler.warm, "signal": float(signal)}
    left = {}  # each without one of the draws: the jackknife
    for name, values in seen.items():
        left[name] = (values.sum() - values) / (count - 1) - signal
        record[name] = {
            "variance": float(values.mean() - signal),
            "standard_error": float(values.std() / count**0.5),
        }
    ratios = left["uniform"] / left["loss-aware"]
    record["ratio"] = record["uniform"]["variance"] / record["loss-aware"]["variance"]
    spread = (count - 1) / count * (ratios - ratios.mean()).square().sum()
    record["ratio_standard_error"] = float(spread.sqrt())
    return record


def train(run: Trainer, images: data.Images, each_step: Callable[[], None]) -> list[float]:
    """Trains to the end, calling each_step() after every step; the losses."""
    losses = []
    stream = data.batches(images, BATCH, seed=run.config.seed, start=run.step)
    while run.step < run.config.steps:
        losses.append(run.train_step(*next(stream))["loss"])
        each_step()
    stream.close()
    return losses


def draw(record: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), dpi=120, layout="constrained")
    points, window = record["points"], record["window"]
    for name, colour in (("uniform", "tab:orange"), ("loss-aware", "tab:blue")):
        left.errorbar(
            [p["step"] for p in points],
            [p[name]["variance"] for p in points],
            [1.96 * p[name]["standard_error"] for p in points],
            color=colour,
            marker="o",
            capsize=3,
            label=f"t {name}",
        )
        means = record["losses"][name]
        steps = [(i + 0.5) * window for i in range(len(means))]
        right.plot(steps, means, color=colour, label=f"t {name}")
    for p in points:
        where = (p["step"], p["loss-aware"]["variance"])
        shift = {"textcoords": "offset points", "xytext": (0, -16), "ha": "center"}
        left.annotate(
            f"÷ {p['ratio']:.0f} ± {1.96 * p['ratio_standard_error']:.0f}",
            where,
            fontsize=8,
            **shift,
        )
    left.margins(x=0.15, y=0.2)
    left.set(
        xlabel="optimiser step of the loss-aware run",
        ylabel="E|ĝ − g|² of one picture",
        title=f"noise of the VLB's gradient at the same weights, {record['draws']} draws",
        yscale="log",
    )
    right.set(
        xlabel="optimiser step",
        ylabel="L_t, bits/dim",
        title=f"training loss, means over {window} steps",
        yscale="log",
    )
    for axes in (left, right):
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    figure.savefig(path, format="png")
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON and PNG")
    parser.add_argument("--data-dir", type=Path, help="folder with Fashion-MNIST's IDX files")
    parser.add_argument("--steps", type=int, default=1600, help="optimiser steps of both runs")
    parser.add_argument("--draws", type=int, default=600, help="pictures per point")
    options = parser.parse_args(arguments)
    images = data.open_dataset("fashion-mnist", size=SIZE, data_dir=options.data_dir)
    start, points, window, steps = time.perf_counter(), [], 50, options.steps
    at, losses = [steps * k // 8 for k in (5, 6, 7, 8)], {}
    with tempfile.TemporaryDirectory() as folder:
        run = trainer("loss-aware", steps, images, Path(folder))
        file = run.folder / checkpoint.FILE

        def each_step() -> None:
            if run.t_sampler.warm and not file.exists():
                run.save()
            if run.step in at:
                points.append(measure(run, images, options.draws))
                print(json.dumps(points[-1]), flush=True)

        losses["loss-aware"] = train(run, images, each_step)
        # In the warm-up both draw t uniformly: the other run parts from this one at its end.
        if not file.exists():
            raise SystemExit(f"{steps} steps are not enough for the warm-up: give more --steps")
        tensors, info = checkpoint.read(file)
        run = trainer("uniform", steps, images, Path(folder))
        run.model.load_state_dict(checkpoint.part(tensors, "model."))
        run.restore(tensors, info)
        common = losses["loss-aware"][: run.step]
        losses["uniform"] = common + train(run, images, lambda: None)
    for name, each in losses.items():
        parts = torch.tensor(each[: len(each) // window * window]).view(-1, window)
        losses[name] = [float(f"{v:.5g}") for v in parts.mean(1).tolist()]
    record = {
        "what": "trace of the covariance of the VLB's gradient, t uniform and loss-aware",
        "data": f"Fashion-MNIST at {SIZE}×{SIZE}",
        "model": NET,
        "parameters": sum(p.numel() for p in run.parameters.values()),
        "T": run.diffusion.T,
        "schedule": run.config.schedule,
        "loss": run.config.loss,
        "variance": run.config.variance,
        "batch": BATCH,
        "steps": steps,
        "draws": options.draws,
        "warm_up": info["step"],
        "seed": run.config.seed,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - start, 1),
        "points": points,
        "window": window,
        "losses": losses,
    }
    options.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (options.results / "importance-variance.json").write_text(text + "\n")
    draw(record, options.results / "importance-variance.png")
    return record


if __name__ == "__main__":
    main()

"""One Fashion-MNIST model within an hour on two CPU cores: trained, scored, guided.

    python benchmarks/fashion_mnist.py [--out runs/hour]

Improved DDPM (Nichol & Dhariwal 2021: cosine schedule, learned variance, hybrid loss), conditional
with label dropout: so one model has a likelihood, draws without and with classifier-free guidance.
Every figure is of a command that anybody can type; log.txt has each one with what it printed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

STEPS = 10_800
TRAIN = (
    *("--dataset", "fashion-mnist", "--classes", "--label-dropout", "0.1"),
    *("--variance", "learned_range", "--loss", "hybrid", "--lr", "0.001", "--ema", "0.999"),
    *("--log-every", "100", "--sample-every", "0", "--no-tensorboard"),
)
STAGES = (1 / 12, 1 / 4, 1 / 2, 1)  # of the steps: where bits/dim is taken
STAGE_NLL, FINAL_NLL = 48, 128  # test pictures
SAMPLES, GUIDED = 2000, 256
SCALES = (0.0, 1.0, 2.0, 3.0, 4.0)


class Log:
    """Runs the engine's commands; keeps what they print, and their seconds."""

    def __init__(self, path: Path):
        self.path, self.seconds = path, 0.0
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def run(self, module: str, *args: object) -> None:
        command = ["-m", f"engine.{module}", *map(str, args)]
        print("$ python", *command, flush=True)
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TQDM_DISABLE": "1"},
        )
        taken = time.perf_counter() - start
        self.seconds += taken
        with self.path.open("a") as file:
            file.write(f"$ python {' '.join(command)}\n{done.stdout.strip()}\n[{taken:.0f} s]\n\n")
        if done.returncode:
            sys.exit(f"{done.stdout}\npython {' '.join(command)} failed")


def study(out: Path, results: Path, steps: int, cache: list[str]) -> dict:
    log = Log(results / "log.txt")
    keep = steps // 12
    log.run("train", *TRAIN, "--steps", steps, "--keep-every", keep, "--out", out)
    bits = []
    for share in STAGES:
        step, last = round(share * 12) * keep, share == 1
        run = out if last else out / "checkpoints" / f"step_{step:06d}.safetensors"
        counts = (STAGE_NLL, FINAL_NLL) if last else (STAGE_NLL,)
        for n in counts:
            log.run("evaluate", run, "--metrics", "nll", "--nll-n", n)
            bits.append(last_record(run))
    figures = ("--n", SAMPLES, *cache)
    log.run("evaluate", out, "--metrics", "fid,kid,is,prc,agreement", *figures)
    scored = last_record(out)
    guided = []
    for scale in SCALES:
        options = ("--metrics", "agreement,is", "--guidance", scale, "--n", GUIDED, "--no-baseline")
        log.run("evaluate", out, *options, *cache)
        guided.append(last_record(out))
    seconds = log.seconds
    log.run(
        *("sample", out, "--guidance", 3, "--n", 64, "--out", results / "guided.png"),
        *("--strip", results / "strip.png", "--sampler", "ddpm", "--steps", 250),
    )
    cores = len(os.sched_getaffinity(0))
    return {
        "minutes": seconds / 60,
        "cores": cores,
        "bits": bits,
        "scored": scored,
        "guided": guided,
    }


def last_record(run: Path) -> dict:
    folder = run if run.is_dir() else run.parent
    return json.loads((folder / "evaluation.json").read_text())[-1]


def table(found: dict) -> str:
    """The study as Markdown."""
    scored = found["scored"]
    sets, real = scored["results"], scored["real"]
    lines = [
        f"{found['minutes']:.0f} minutes on {found['cores']} CPU cores, training and all scoring. "
        "Class-conditional: samples have all labels in turn, bits/dim is given the label. No "
        "guidance but in the last table.",
        "",
        f"{scored['features']}; n = {scored['n']}, seed {scored['seed']}, "
        f"{scored['settings']['sampler']} with {scored['settings']['steps']} steps; FID and KID "
        f"against {real['count']} training pictures, IS of {scored['splits']} splits.",
        "",
        "| | FID ↓ | KID ↓ | IS ↑ | precision ↑ | recall ↑ | agreement ↑ |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, s in sets.items():
        lines.append(
            f"| {name}, n = {s['n']} | {s['fid']:.2f} | {s['kid']:.4f} ± {s['kid_std']:.4f} "
            f"| {s['is']:.2f} ± {s['is_std']:.2f} | {s['precision']:.3f} | {s['recall']:.3f} "
            f"| {s['agreement']:.1%} |"
        )
    lines += [
        "",
        "| training steps | bits/dim ↓ (± standard error) | test pictures |",
        "|---|---|---|",
    ]
    for record in found["bits"]:
        nll = record["nll"]
        lines.append(
            f"| {record['trained_steps']} | {nll['bits_per_dim']:.3f} ± "
            f"{nll['standard_error']:.3f} | {nll['n']} |"
        )
    lines += [
        "",
        "| guidance scale | agreement of the classifier with the label ↑ | IS ↑ | samples |",
        "|---|---|---|---|",
    ]
    for record in found["guided"]:
        s = record["results"]["samples"]
        lines.append(
            f"| {record['settings']['guidance']:g} | {s['agreement']:.1%} "
            f"| {s['is']:.2f} ± {s['is_std']:.2f} | {s['n']} |"
        )
    return "\n".join(lines) + "\n"


def plot(found: dict, path: Path) -> None:
    """Bits/dim over training; agreement over the guidance scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    some = [r for r in found["bits"] if r["nll"]["n"] == STAGE_NLL]
    steps, bits = zip(*((r["trained_steps"], r["nll"]["bits_per_dim"]) for r in some), strict=True)
    left.plot(steps, bits, "o-")
    left.set(xlabel="training steps", ylabel=f"bits/dim, the same {STAGE_NLL} test pictures")
    scales = [r["settings"]["guidance"] for r in found["guided"]]
    agreement = [100 * r["results"]["samples"]["agreement"] for r in found["guided"]]
    right.plot(scales, agreement, "o-")
    right.axhline(90, color="grey", linewidth=0.8)
    right.set(xlabel="guidance scale", ylabel=f"% of {GUIDED} samples: classifier = label")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/hour"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/fashion-mnist"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--cache", help="folder of the classifier, as for engine.evaluate")
    config = parser.parse_args()
    if config.steps < 12 or config.steps % 12:
        parser.error(f"--steps {config.steps} must be a multiple of 12: its twelfths are scored")
    cache = ["--cache", config.cache] if config.cache else []
    found = study(config.out, config.results, config.steps, cache)
    (config.results / "study.json").write_text(json.dumps(found, indent=1) + "\n")
    (config.results / "study.md").write_text(table(found))
    metrics = (config.out / "metrics.jsonl").read_text()
    (config.results / "metrics.jsonl").write_text(metrics)
    plot(found, config.results / "study.png")
    print(table(found))


if __name__ == "__main__":
    main()

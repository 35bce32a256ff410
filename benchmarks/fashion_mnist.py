"""One Fashion-MNIST model within an hour on two CPU cores: trained, scored, guided.

    python benchmarks/fashion_mnist.py [--out runs/hour]

Improved DDPM (Nichol & Dhariwal 2021: cosine schedule, learned variance, hybrid loss), but
predicting v; conditional with label dropout: so one model has a likelihood, and draws without and
with classifier-free guidance. Every figure is of a command that anybody can type; log.txt has each
one with what it printed. A study that was stopped goes on with the same command.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from engine import cli

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


class Study:
    """Runs the engine's commands; OUT/study.json has of each what it printed, its seconds and its
    record, so that a study that was stopped goes on."""

    def __init__(self, out: Path):
        self.out, self.path = out, out / "study.json"
        self.done = json.loads(self.path.read_text()) if self.path.exists() else {}

    def run(self, module: str, *args: object) -> dict | None:
        line = shlex.join(["python", "-m", f"engine.{module}", *map(str, args)])
        if line not in self.done:
            print("$", line, flush=True)
            start = time.perf_counter()
            if module == "train" and (self.out / "checkpoint.safetensors").exists():
                args = ("--resume", self.out)  # where it was stopped
            command = [sys.executable, "-m", f"engine.{module}", *map(str, args)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                try:
                    printed = process.stdout.read()
                except KeyboardInterrupt:  # Ctrl-C reached the training too: let it save
                    process.wait(60)
                    raise
            if process.returncode:
                raise cli.Failed("the study stopped; the same command goes on", process.returncode)
            print(printed, flush=True)
            record = last_record(Path(args[0])) if module == "evaluate" else None
            seconds = time.perf_counter() - start
            self.done[line] = {"printed": printed, "seconds": seconds, "record": record}
            self.path.write_text(json.dumps(self.done) + "\n")
        return self.done[line]["record"]

    def log(self) -> str:
        return "\n".join(
            f"$ {line}\n{d['printed'].strip()}\n[{d['seconds']:.0f} s]\n"
            for line, d in self.done.items()
        )


def study(out: Path, results: Path, steps: int, cache: list[str]) -> tuple[dict, str]:
    """The figures, and the log."""
    commands = Study(out)
    keep = steps // 12
    commands.run("train", *TRAIN, "--steps", steps, "--keep-every", keep, "--out", out)
    bits = []
    for share in STAGES:
        step, last = round(share * 12) * keep, share == 1
        run = out if last else out / "checkpoints" / f"step_{step:06d}.safetensors"
        for n in (STAGE_NLL, FINAL_NLL) if last else (STAGE_NLL,):
            bits.append(commands.run("evaluate", run, "--metrics", "nll", "--nll-n", n))
    metrics = "fid,kid,is,prc,agreement"
    scored = commands.run("evaluate", out, "--metrics", metrics, "--n", SAMPLES, *cache)
    guided = []
    for scale in SCALES:
        options = ("--metrics", "agreement", "--guidance", scale, "--n", GUIDED, "--no-baseline")
        guided.append(commands.run("evaluate", out, *options, *cache))
    commands.run(
        *("sample", out, "--guidance", 3, "--n", 64, "--out", results / "guided.png"),
        *("--strip", results / "strip.png", "--sampler", "ddpm", "--steps", 250),
    )
    minutes = sum(done["seconds"] for done in commands.done.values()) / 60
    cores = len(os.sched_getaffinity(0))
    return {
        "minutes": minutes,
        "cores": cores,
        "bits": bits,
        "scored": scored,
        "guided": guided,
    }, commands.log()


def last_record(run: Path) -> dict:
    folder = run if run.is_dir() else run.parent
    return json.loads((folder / "evaluation.json").read_text())[-1]


def table(found: dict) -> str:
    """The study as Markdown."""
    scored = found["scored"]
    sets, real = scored["results"], scored["real"]
    lines = [
        f"{found['minutes']:.0f} minutes on {found['cores']} CPU cores, training and all scoring. "
        "Class-conditional, predicting v: samples have all labels in turn, bits/dim is given the "
        "label. No guidance but in the last table. ± of KID and IS is the standard deviation over "
        "subsets and splits.",
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
            f"| {s['is']:.2f} ± {s['is_std']:.2f} | {s['precision']:.4f} | {s['recall']:.4f} "
            f"| {s['agreement']:.2%} |"
        )
    lines += [
        "",
        "Bits/dim through training, each with the same pictures and noise, so that differences are "
        "firmer than the ±, the standard error over pictures. The learning rate falls to 0 over "
        "the last 60 % of the steps.",
        "",
        "| training steps | bits/dim ↓ | test pictures |",
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
        "| guidance scale | agreement of the classifier with the label ↑ | samples |",
        "|---|---|---|",
    ]
    for record in found["guided"]:
        s = record["results"]["samples"]
        lines.append(f"| {record['settings']['guidance']:g} | {s['agreement']:.2%} | {s['n']} |")
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


def command(args: list[str] | None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/hour"), help="folder of the run (%(default)s)"
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=Path("benchmarks/results/fashion-mnist"),
        help="folder of tables, log and pictures (%(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=STEPS,
        help="training steps, a multiple of 12: 1, 3, 6 and 12 twelfths are scored (%(default)s)",
    )
    parser.add_argument("--cache", help="folder of the classifier, as for engine.evaluate")
    config = parser.parse_args(args)
    if config.steps < 12 or config.steps % 12:
        raise ValueError(
            f"--steps {config.steps} must be a multiple of 12: its twelfths are scored"
        )
    cli.make_writable(config.results, "--results")
    cache = ["--cache", config.cache] if config.cache else []
    found, log = study(config.out, config.results, config.steps, cache)
    (config.results / "log.txt").write_text(log)
    (config.results / "study.json").write_text(json.dumps(found, indent=1) + "\n")
    (config.results / "study.md").write_text(table(found))
    shutil.copy(config.out / "metrics.jsonl", config.results / "metrics.jsonl")
    plot(found, config.results / "study.png")
    print(table(found))


if __name__ == "__main__":
    sys.exit(cli.main(command))

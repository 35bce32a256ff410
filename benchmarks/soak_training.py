"""A training that signals end at random moments, resumed until it is done, against one that nobody
disturbed: the same weights, optimiser, EMA, t sampler, gradient scale and logs, bit for bit.

Every run is `python -m engine.train` in a process of its own, on pictures that are made here: plain
ones, and every sixteenth of noise, so that losses have spikes for events.jsonl.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import engine
from engine import checkpoint

BATCH = 8
OPTIONS = (  # whatever has a state that a resume could lose
    *("--image-size", "16", "--channels", "1", "--width", "32", "--batch", str(BATCH)),
    *("--accumulate", "2", "--classes", "--label-dropout", "0.2", "--flip", "--no-cache"),
    *("--variance", "learned_range", "--loss", "vlb", "--t-sampler", "loss-aware"),
    *("--timesteps", "8", "--warmup", "10", "--decay", "0", "--log-every", "1"),
    *("--sample-every", "0", "--samples", "0", "--no-tensorboard"),
)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
PATIENCE = 180  # seconds after which a process counts as stuck


def make_pictures(folder: Path, count: int = 96, size: int = 16) -> Path:
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        plain = np.full((size, size), rng.integers(0, 256))
        pixels = plain if i % 16 else rng.integers(0, 256, (size, size))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def options(pictures: Path, run: Path, steps: int, save_every: int) -> list[str]:
    """Of engine.train, to start the run."""
    given = {"--dataset": pictures, "--out": run, "--steps": steps, "--save-every": save_every}
    return [str(word) for pair in given.items() for word in pair] + list(OPTIONS)


def start(args: Iterable[str], log: Path, code: tuple[str, ...] = ("-m", "engine.train")):
    """The process of a training; what it says is added to `log`."""
    root = str(Path(engine.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])}

    def heed() -> None:  # a background job's children ignore Ctrl-C from their first moment
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with open(log, "a") as file:
        return subprocess.Popen(
            [sys.executable, *code, *args],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            preexec_fn=heed,
        )


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    """Whole rows of a log, without the one figure that no two runs share."""
    try:
        text = (run / name).read_text()
    except FileNotFoundError:
        return []
    found = [json.loads(line) for line in text.split("\n")[:-1]]
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in found]


def undisturbed(args: list[str], log: Path) -> float:
    """Seconds that the training took. Raises RuntimeError if it failed."""
    begin = time.perf_counter()
    code = start(args, log).wait()
    if code:
        raise RuntimeError(f"the training ended with code {code}:\n{log.read_text()[-2000:]}")
    return time.perf_counter() - begin


# --- under signals ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    signals: tuple[int, ...]
    rows: int  # that the process logs before; 0: counted from its start
    seconds: float  # after that
    gap: float = 0.0  # seconds between two signals


def random_kills(rng: random.Random, startup: float, until: float) -> Iterator[Kill]:
    """One in six while the process starts, the others while it trains or saves; every fourth is two
    signals in a row, of which the second finds it saving or at its end."""
    life = max(2.0, startup)
    while time.perf_counter() < until:
        signals = tuple(rng.choice(SIGNALS) for _ in range(1 + (rng.random() < 0.25)))
        if rng.random() < 1 / 6:
            yield Kill(signals, 0, rng.uniform(0, startup), rng.uniform(0, 0.3))
        else:
            yield Kill(signals, 1, rng.uniform(0, 2 * life), rng.uniform(0, 0.3))


def strike(process: subprocess.Popen, kill: Kill, run: Path, saved: int) -> bool:
    """Sends the signals at their moment; False if the process ended before. It goes on from step
    `saved`."""
    log, begin = run / "metrics.jsonl", time.perf_counter()
    before = modified(log)  # rows after `saved` are of before, until it cuts them off
    while kill.rows and process.poll() is None and time.perf_counter() - begin < PATIENCE:
        cut = modified(log) != before
        if cut and sum(row["step"] > saved for row in rows(run)) >= kill.rows:
            break
        time.sleep(0.005)
    try:
        process.wait(kill.seconds)
        return False
    except subprocess.TimeoutExpired:
        pass
    for number in kill.signals:
        process.send_signal(number)
        try:
            process.wait(kill.gap)
            break
        except subprocess.TimeoutExpired:
            continue
    return True


def modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def disturbed(args: list[str], run: Path, log: Path, kills: Iterator[Kill]) -> dict:
    """Trains until done, killed as `kills` says for as long as there are any → the counts."""
    count, faults = Counter(), []
    resumes = anew = redone = 0
    for number in range(10**6):
        there = run.is_dir() and bool(checkpoint.files(run))
        saved = checkpoint.read(run, prefix="none.", quiet=True)[1]["step"] if there else 0
        if number:
            redone += max(0, max((row["step"] for row in rows(run)), default=0) - saved)
            resumes, anew = resumes + there, anew + (not there)
        process = start(["--resume", str(run)] if there else args, log)
        kill = next(kills, None)
        struck = kill is not None and strike(process, kill, run, saved)
        try:
            code = process.wait(None if kill is None else PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
            faults.append(f"process {number + 1} was stuck after {names(kill)}")
        if code == 0:
            break
        if not struck or not expected(code, kill):
            faults.append(f"process {number + 1}: code {code}: {log.read_text()[-300:]}")
            if not struck:
                break
        count[signal.Signals(kill.signals[0]).name] += 1
        count["two_in_a_row"] += len(kill.signals) > 1
        count["while_starting"] += not kill.rows
    return {
        "kills": {signal.Signals(s).name: count[signal.Signals(s).name] for s in SIGNALS},
        "two_in_a_row": count["two_in_a_row"],
        "while_starting": count["while_starting"],
        "resumes": resumes,
        "started_anew": anew,
        "steps_redone": redone,
        "faults": faults,
    }


def expected(code: int, kill: Kill) -> bool:
    """By a signal, or as the shell says it; in the middle of an import, Ctrl-C is any failure."""
    ends = {end for s in kill.signals for end in (-s, 128 + s)}
    return code in ends or (signal.SIGINT in kill.signals and not kill.rows)


def names(kill: Kill) -> str:
    return ", ".join(signal.Signals(number).name for number in kill.signals)


# --- and compared -------------------------------------------------------------------------------


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two runs' last checkpoints and logs."""
    (mine, my_info), (theirs, their_info) = checkpoint.read(one), checkpoint.read(other)
    found = [f"{name} is in one alone" for name in sorted(mine.keys() ^ theirs.keys())]
    common = mine.keys() & theirs.keys()
    found += [name for name in sorted(common) if not torch.equal(mine[name], theirs[name])]
    for info in (my_info, their_info):
        info["train"] = {k: v for k, v in info["train"].items() if k not in ("out", "resume")}
    same = {k for k in my_info if my_info[k] == their_info.get(k)}
    found += [f"{key} of the checkpoint" for key in sorted(my_info.keys() - same)]
    for name in ("metrics.jsonl", "events.jsonl"):
        if rows(one, name) != rows(other, name):
            found.append(name)
    return found


def training(minutes: float, out: Path, seed: int = 0) -> dict:
    """Some `minutes` of it: a quarter undisturbed, the rest under signals → what the JSON has."""
    begin = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    pictures, log = make_pictures(out / "pictures"), out / "log.txt"
    seconds = undisturbed(options(pictures, out / "first", 40, 40), log)
    last = json.loads((out / "first" / "metrics.jsonl").read_text().splitlines()[-1])
    per_step = BATCH / last["images_per_second"]
    startup = max(0.5, seconds - 40 * per_step)
    steps = max(40, round((15 * minutes - startup) / per_step))
    save_every = max(1, round(1.5 / per_step))
    undisturbed(options(pictures, out / "undisturbed", steps, save_every), log)
    kills = random_kills(random.Random(seed), startup, begin + 0.85 * 60 * minutes)
    args = options(pictures, out / "disturbed", steps, save_every)
    found = disturbed(args, out / "disturbed", log, kills)
    different = [] if found["faults"] else differences(out / "disturbed", out / "undisturbed")
    return {
        "minutes": minutes,
        "steps": steps,
        "save_every": save_every,
        **found,
        "events": len(rows(out / "undisturbed", "events.jsonl")),
        "tensors": len(checkpoint.read(out / "undisturbed")[0]),
        "equal": not different and not found["faults"],
        "differences": different,
        "options": " ".join(OPTIONS),
        "seed": seed,
        "seconds": round(time.perf_counter() - begin, 1),
    }

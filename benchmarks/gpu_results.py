"""One JSON file per device, written after every case, and what follows from it.

A process that dies leaves in a small file beside it where it was; the next one goes on from there.
"""

import json
import math
import os
import platform
import re
import subprocess
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from gpu_measure import OURS, UNPROVEN

SCHEMA = "engine-gpu-1"
PARTS = ("reference", "inputs", "timing")  # of a case, beside its contenders
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WRITTEN = (":!engine/evidence.json", ":!benchmarks/results", ":!README.md")  # by `make gpu`


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict:
    def installed(package):
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
        **{package: installed(package) for package in ("triton", "diffusers", "numpy")},
    }


def git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout.strip()


def commit() -> str | None:
    """The commit, "-dirty" where a tracked file differs beyond those that `make gpu` writes."""
    if not (ROOT / ".git").exists():  # a folder around this one may be a repository
        return None
    found = git("describe", "--always", "--abbrev=12")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *WRITTEN)
    if not found or changed is None:
        return None
    return f"{found}-dirty" if changed else found


def proofs(evidence: Path, gpu: str) -> dict[str, dict[str, int]]:
    """op → back end → cases that passed on GPUs of this name, as the evidence has it."""
    known = json.loads(evidence.read_text()) if evidence.exists() else {}
    return {
        op: {backend: entry["cases"] for backend, entry in entries.items()}
        for op, entries in known.get(gpu, {}).items()
    }


class Results:
    """The file of one device in a folder. `begin` throws an earlier run's away."""

    def __init__(self, path: Path):
        self.path = path
        self.at = path.with_suffix(".running")
        self.data = json.loads(path.read_text()) if path.exists() else {}

    def begin(self, device, mode: str) -> None:
        self.data = {
            "schema": SCHEMA,
            "stand_in": device.stand_in,
            "mode": mode,
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "device": {
                "name": device.name,
                "l2_mb": round(device.l2_bytes / 2**20, 1),
                "memory_gb": round(device.memory_bytes / 2**30, 1),
                "multiprocessors": device.multiprocessors,
                "before": device.state(),
            },
            "versions": versions(),
            "crashed": {},
            "cases": {},
        }
        self.at.unlink(missing_ok=True)
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(self.data, indent=1, ensure_ascii=False) + "\n")
        partial.replace(self.path)

    def note(self, case: str, contender: str) -> None:
        self.at.write_text(json.dumps([case, contender]))

    def running(self) -> list[str] | None:
        """[case, contender] that an earlier process did not get past."""
        try:
            return json.loads(self.at.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def crash(self, reason: str) -> None:
        """What was running ended its process: it is not tried again."""
        if running := self.running():
            case, contender = running
            crashed = self.data["crashed"].setdefault(case, {})
            crashed[contender] = reason
            if contender in PARTS or len(crashed) > 3:
                self.add(case, {"error": reason, "contenders": {}})
        self.at.unlink(missing_ok=True)
        self.save()

    def crashed(self, case: str) -> dict[str, str]:
        """Contenders to leave out: those that ended a process here, or two processes in this op."""
        op, ends = case.split(" ")[0], Counter()
        for other, contenders in self.data["crashed"].items():
            ends.update(list(contenders) if other.split(" ")[0] == op else ())
        found = {
            name: f"not tried: it ended {count} processes in other cases"
            for name, count in ends.items()
            if count >= 2 and name not in PARTS
        }
        return found | self.data["crashed"].get(case, {})

    def add(self, case: str, record: dict) -> None:
        if self.data.get("anchors"):
            conclude(record, self.data["anchors"])
        self.data["cases"][case] = record
        self.at.unlink(missing_ok=True)
        self.save()

    def finish(self) -> None:
        self.data["unmeasured"] = unmeasured(self.data)
        self.data["dispatch"] = dispatch_rows(self.data)
        self.save()


def unmeasured(data: dict) -> list[str]:
    return [name for name in data.get("planned", ()) if name not in data["cases"]]


def measured(data: dict) -> tuple[int, int]:
    """Cases with at least one time, and cases that were planned."""
    cases = data.get("cases", {})
    return sum(bool(timed(r)) for r in cases.values()), len(data.get("planned") or cases)


def copy_rate(anchors: dict) -> float:
    """GB/s of the largest copy that was measured; NaN without one."""
    copies = anchors.get("copy_gb_per_s") or {}
    return list(copies.values())[-1] if copies else math.nan


def noise_share(row: dict) -> float:
    """How far two measurements of the same thing are apart: the spread of turns and of rounds."""
    cold = row["cold"]
    rounds = cold["rounds_us"]
    spread = (cold["p80"] - cold["p20"]) / 2 / cold["us"]
    return max(spread, abs(rounds[0] - rounds[-1]) / min(rounds)) if min(rounds) > 0 else math.inf


def timed(record: dict) -> dict[str, dict]:
    return {n: r for n, r in record["contenders"].items() if r.get("cold") and r["cold"]["us"] > 0}


def conclude(record: dict, anchors: dict) -> None:
    """Adds rates, the best of ours and of the baselines, and whether we win, tie or lose."""
    rows, copy = timed(record), copy_rate(anchors)
    for row in rows.values():
        seconds = row["cold"]["us"] / 1e6
        row["gb_per_s"] = round(record["useful_bytes"] / seconds / 1e9, 2)
        if copy > 0:
            row["share_of_copy"] = round(row["gb_per_s"] / copy, 4)
        if record.get("flop"):
            row["tflops"] = round(record["flop"] / seconds / 1e12, 1)

    def best(names):
        return min(names, key=lambda n: rows[n]["cold"]["us"], default=None)

    ours = best([n for n in rows if n in OURS])
    baseline = best([n for n in rows if n not in OURS + UNPROVEN])
    record.update(best_ours=ours, best_baseline=baseline, verdict=None, speedup=None)
    if ours and baseline:
        speedup = rows[baseline]["cold"]["us"] / rows[ours]["cold"]["us"]
        margin = noise_share(rows[ours]) + noise_share(rows[baseline])
        record["speedup"] = round(speedup, 3)
        record["noise"] = round(margin, 4)
        tie = abs(math.log(speedup)) <= math.log1p(margin)
        record["verdict"] = "tie" if tie else "win" if speedup > 1 else "loss"


def dispatch_rows(data: dict) -> list[dict]:
    """Per op and shape the fastest of what `auto` may serve, and the fastest of all, as data.

    Eager is PyTorch in one call, SDPA's own choice for attention; torch.compile, a forced SDPA back
    end and the like are somebody else's to choose.
    """
    keys = ("op", "direction", "variant", "shape", "groups", "layout", "dtype")
    found = []
    for name, record in data["cases"].items():
        rows = timed(record)
        us = {n: rows[n]["cold"]["us"] for n in rows}
        may = {n: v for n, v in us.items() if n in (*OURS, "eager", "sdpa")}
        if not may:
            continue
        serve = min(may, key=may.get)
        found.append(
            {
                "case": name,
                **{k: record[k] for k in keys if k in record},
                "serve": "eager" if serve == "sdpa" else serve,
                "fastest": min(us, key=us.get),
                "verdict": record.get("verdict"),
                "us": us,
            }
        )
    return found

"""The resident memory of a training, step after step: flat once it is warm.

Warm is a training that has drawn and saved twice: what libraries load and allocate at first use is
there by then. The process is `python -m engine.train`, watched from outside through /proc.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from soak_training import OPTIONS, make_pictures, rows, start

STEPS, WARMUP, EVERY = 2000, 500, 10  # steps watched, steps before, steps between two readings
WITHIN = 0.02  # of the median
CHANGED = {  # all that grows if anything does: drawing, saving, the logs
    "--log-every": EVERY,
    "--sample-every": WARMUP // 2,
    "--save-every": WARMUP // 2,
    "--samples": 16,
    "--sample-steps": 8,
    "--accumulate": 1,
}


def resident(pid: int) -> dict[str, float]:
    """Megabytes: all that is resident, and of it what is no file's."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return {key: int(status[key].split()[0]) * 1024 / 1e6 for key in ("VmRSS", "RssAnon")}


def memory(out: Path, steps: int = STEPS, warmup: int = WARMUP) -> dict:
    """What the JSON has: megabytes by step, and how far they are from their median."""
    out.mkdir(parents=True, exist_ok=True)
    pictures, run, log = make_pictures(out / "pictures"), out / "run", out / "log.txt"
    given = {"--dataset": pictures, "--out": run, "--steps": warmup + steps, **CHANGED}
    words = [word for word in OPTIONS if word != "--no-tensorboard"]
    args = [*words, *(str(word) for pair in given.items() for word in pair)]
    begin, process, found = time.perf_counter(), start(args, log), {}
    while process.poll() is None:
        logged = rows(run)
        if logged and logged[-1]["step"] not in found:
            try:
                found[logged[-1]["step"]] = resident(process.pid)
            except (OSError, KeyError):  # it has just ended
                break
        time.sleep(0.02)
    if process.wait():
        raise RuntimeError(f"the training failed:\n{log.read_text()[-2000:]}")
    warm = {step: values for step, values in found.items() if step > warmup}
    judged = {key: judge([values[key] for values in warm.values()]) for key in ("VmRSS", "RssAnon")}
    shown = {step: round(v["VmRSS"], 1) for step, v in found.items() if step % 100 == 0}
    return {
        "steps": steps,
        "warmup": warmup,
        "readings": len(warm),
        **judged,
        "flat": judged["VmRSS"]["off_median"] <= WITHIN,
        "within": WITHIN,
        "VmRSS_by_step": shown,
        "options": " ".join(args[: -2 * len(given)] + [f"{k} {v}" for k, v in CHANGED.items()]),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def judge(megabytes: list[float]) -> dict[str, float]:
    """Least, greatest and last of them, and the greatest distance from the median, relative."""
    median = statistics.median(megabytes)
    off = max(abs(value - median) for value in megabytes) / median
    found = {"least": min(megabytes), "greatest": max(megabytes), "last": megabytes[-1]}
    return {key: round(value, 1) for key, value in found.items()} | {"off_median": round(off, 4)}

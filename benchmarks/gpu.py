"""`make gpu`, after the build: parity on the device, benchmarks, tables and plots, in nine minutes.

Each part is a process of its own, so that none can take the others with it. The benchmarks' process
is started again, a few times, when an error of the GPU or a hang ends it.

Exit status 0: nothing that ran was wrong. Cases that no time was left for are no failure: the last
line says how many of how many were measured.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_results import RESULTS, ROOT, Results, measured, proofs, slug, unmeasured

HERE = Path(__file__).resolve().parent
EVIDENCE = ROOT / "engine" / "evidence.json"

NO_GPU = "make gpu needs a CUDA GPU and a CUDA build of torch; torch finds none"
PROBE = (
    "import torch; assert torch.cuda.is_available(); torch.ones(1, device='cuda').sum().item();"
    "print(*torch.cuda.get_device_capability(), torch.cuda.get_device_name())"
)
WARMERS, WARM_S = 8, 60  # processes that compile our kernels before the benchmarks, and how long
WORKERS = 14  # of the parity tests
PARITY_SHARE, REPORT_S, STALL_S, RESTARTS = 0.45, 30, 180, 8
LAST_CASE_S = 25  # what a case that has begun may still take; then its process is stopped
FAILED, LOST = 1, 75  # exit status of pytest, and of bench_gpu.py


def find_gpu() -> tuple[str, str]:
    """The GPU's architecture, as ENGINE_CUDA_ARCH wants it, and its name.

    From another process, which also runs a kernel there: this one never touches the GPU.
    """
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else ""
        detail = f" ({reason})" if reason and not reason.startswith("AssertionError") else ""
        raise SystemExit(f"{NO_GPU}{detail}")
    major, minor, name = done.stdout.strip().splitlines()[-1].split(" ", 2)
    return major + minor, name


def stop(process: subprocess.Popen) -> None:
    """The process and the compilers that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        process.kill()
    process.wait()


def run(command: list[str], until: float, alive=None, **kwargs) -> int | None:
    """→ exit status, or None when it was stopped: past `until`, or when `alive` stood still.

    alive: a file that a process at work writes again and again.
    """
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **kwargs)
    last = time.time()  # that a sign of life was seen
    try:
        while process.poll() is None:
            now = time.time()
            if alive is not None:
                with contextlib.suppress(FileNotFoundError):  # between two cases there is none
                    last = max(last, alive.stat().st_mtime)
            if now > until or (alive is not None and now - last > STALL_S):
                stop(process)
                return None
            time.sleep(0.2)
    except BaseException:
        stop(process)
        raise
    return process.returncode


def warm(options, until: float) -> None:
    """Fills Triton's cache with the benchmarks' kernels, side by side; times nothing."""
    parts = min(max((os.cpu_count() or 1) - 2, 1), WARMERS)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(python_path())}
    processes = []
    try:
        for part in range(parts):
            command = [sys.executable, str(HERE / "gpu_warm.py"), str(part), str(parts)]
            command += ["--full"] if options.full else []
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, start_new_session=True, env=environment, **quiet
                )
            )
        while time.time() < until and any(process.poll() is None for process in processes):
            time.sleep(0.2)
    finally:
        for process in processes:
            stop(process)


def python_path() -> list[str]:
    """This tree's packages before any installed ones, for scripts, which do not see the folder."""
    return [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]


def parity(until: float) -> dict:
    """The op tests on the device, all of them: they write engine/evidence.json.

    In parallel where pytest-xdist is, which compiles in parallel too. Where such a run proves
    nothing (tests/proof.py), they run again one by one, in what is left of the time.
    """
    begin, status, written = time.time(), None, False
    command = [sys.executable, "-m", "pytest", "--on-device", "-q", "--tb=short", "-p"]
    workers = min((os.cpu_count() or 1) - 2, WORKERS)
    ways = [[*command, "no:xdist"]]
    if importlib.util.find_spec("xdist") and workers > 1:
        ways.insert(0, [*command, "no:cacheprovider", "-n", str(workers)])
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder, "counts.json")
        # A worker of its own per core compiles already: no pool of Inductor's beside each.
        environment = {"ENGINE_TEST_COUNTS": str(counts), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        for way in ways:
            if time.time() > until:
                break
            counts.unlink(missing_ok=True)  # an earlier run's are not this one's
            before = last_write(EVIDENCE)
            status = run(way, until, env={**os.environ, **environment})
            written = last_write(EVIDENCE) != before
            if written:
                break
        passed = json.loads(counts.read_text()) if counts.exists() else {}
    outcome = {0: "passed", FAILED: "failed", None: "not finished"}
    outcome = outcome.get(status, f"ended with status {status}")
    return {
        "outcome": outcome if written else f"{outcome}: nothing is proved",
        "passed": passed,
        "seconds": round(time.time() - begin, 1),
    }


def last_write(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def benchmarks(options, path: Path, until: float) -> str:
    """→ what became of them. What was measured is in the file, whatever that is."""
    begin = time.time()
    mode = "quick" if options.quick else "full" if options.full else "default"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--gpu", "-q"]
    command += ["-p", "no:cacheprovider", "--no-header", "--tb=line"]
    command += ["-W", "ignore:Benchmark fixture was not used"]
    command += ["--mode", mode, "--results", str(path.parent)]
    command += ["--stand-in"] if options.stand_in else []
    status = None
    for attempt in range(RESTARTS + 1):
        last_case = until - (5 if options.quick else LAST_CASE_S)
        if attempt and last_case - time.time() < 10:
            break
        again = ["--go-on"] if attempt else []
        limit = ["--until", str(last_case)]
        status = run([*command, *again, *limit], until, Results(path).at)
        if status in (0, FAILED):
            break
        print(f"the benchmarks' process ended (status {status}); another one goes on", flush=True)
    if path.exists():
        results = Results(path)
        results.crash("the process ended, or was stopped, here")
        results.data["seconds"] = round(time.time() - begin, 1)
        results.finish()
        bits = (results.data.get("anchors") or {}).get("noise_bits") or {}
        if False in bits.values():
            return f"the noise has other bits than the CPU's: {bits}"
        sampled = (results.data.get("anchors") or {}).get("graph_sampling") or {}
        differ = [
            name
            for name, row in sampled.items()
            if isinstance(row, dict) and row.get("same_images") is False
        ]
        if differ:
            return f"sampling as a CUDA graph draws other images: {', '.join(differ)}"
    if status == 0:
        return "done"
    return "some cases failed" if status == FAILED else f"not finished (status {status})"


def summary(path: Path) -> list[str]:
    data = json.loads(path.read_text()) if path.exists() else {}
    verdicts = [record.get("verdict") for record in data.get("cases", {}).values()]
    counted = ", ".join(f"{verdicts.count(v)} {v}" for v in ("win", "tie", "loss"))
    bad = [
        f"  {case}, {name}: {row['reason']}"
        for case, record in data.get("cases", {}).items()
        for name, row in record["contenders"].items()
        if row["status"] in ("wrong", "failed")
    ]
    bad += [f"  {c}: {r['error']}" for c, r in data.get("cases", {}).items() if "error" in r]
    lines = [f"{len(verdicts)} cases against the best baseline: {counted}"]
    if missing := unmeasured(data):
        lines.append(f"{len(missing)} cases not measured: the time was over")
    return [*lines, f"{len(bad)} contenders failed or were wrong", *bad[:40]]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of JSON and tables")
    parser.add_argument("--minutes", type=float, help="for all of it: 9; quick 1; full 60")
    parser.add_argument("--started", type=float, default=time.time(), help="the build's start")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="headline cases, no parity run")
    size.add_argument("--full", action="store_true", help="every baseline of every case")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--no-parity", action="store_true", help="benchmarks only")
    part.add_argument(
        "--parity-only", action="store_true", help="no benchmarks: it has all the time"
    )
    parser.add_argument("--arch", action="store_true", help="print the architecture, no more")
    parser.add_argument("--stand-in", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick and options.parity_only:
        parser.error("--quick runs no parity tests: use --parity-only without it")
    if options.minutes is None:
        options.minutes = 1 if options.quick else 60 if options.full else 9
    return options


def prove(name: str, until: float, folder: Path) -> dict:
    """The parity run, told; `folder` gets the evidence too, so that it travels with the rest."""
    print(f"parity on {name}, {max(until - time.time(), 0):.0f} s", flush=True)
    proved = parity(until)
    if folder != RESULTS and EVIDENCE.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(EVIDENCE, folder / EVIDENCE.name)
    print(f"parity: {proved['outcome']} in {proved['seconds']} s", flush=True)
    return proved


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    arch, name = ("", "stand-in") if options.stand_in else find_gpu()
    if options.arch:
        print(arch)
        return 0
    started = time.time() if options.quick else options.started
    end = started + 60 * options.minutes - min(REPORT_S, 10 * options.minutes)
    folder = options.results.resolve()
    path = folder / f"{slug(name)}.json"
    if options.parity_only:
        return 0 if prove(name, end, folder)["outcome"] == "passed" else 1
    proved = {"outcome": "not run", "known": proofs(EVIDENCE, name)}
    if not (options.quick or options.no_parity or options.stand_in):
        proved = prove(name, time.time() + (end - time.time()) * PARITY_SHARE, folder)
    if not (options.quick or options.stand_in):
        warm(options, time.time() + min(WARM_S, (end - time.time()) / 5))
    print(f"benchmarks on {name}, {max(end - time.time(), 0):.0f} s", flush=True)
    outcome = benchmarks(options, path, end)
    count = (0, 0)
    if path.exists():
        results = Results(path)
        results.data["parity"] = proved
        results.save()
        count = measured(results.data)
    report = [sys.executable, str(HERE / "report.py"), "--results", str(folder)]
    reported = run(report, time.time() + 120)
    print("\n".join([*summary(path), f"results in {folder}"]))
    print("benchmarks: {}; {} of {} cases measured".format(outcome, *count))
    fine = outcome == "done" and proved["outcome"] in ("passed", "not run") and reported == 0
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

"""What a training run survives: kill -9 while it saves, signals at random moments, many steps.

    python benchmarks/soak.py --kills 100 --out FOLDER        # a minute
    python benchmarks/soak.py --minutes 20 --out FOLDER       # soak_training.py
    python benchmarks/soak.py --memory --out FOLDER           # two minutes; soak_memory.py

--kills: a process does nothing but save checkpoints one after the other, of random sizes, and is
killed at a random moment. Then the folder's newest checkpoint must load whole, with matching
checksums, the very numbers that were saved, and a step not older than the last one that the process
reported as saved. So --kills times in one folder, whatever the kill before has left in it.

Each writes its figures to --results, under "kills", "training" or "memory", and exits with 1 where
what must hold does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
from conftest import cpu_name
from soak_memory import memory
from soak_training import training

from engine import checkpoint

RESULTS = Path(__file__).parent / "results" / "soak.json"
BIGGEST = 2**21  # float32 elements of a checkpoint


def content(step: int) -> tuple[dict, dict]:
    """Tensors and info of a step: sizes and numbers follow from it, so that they can be checked."""
    generator = torch.Generator().manual_seed(step)
    sizes = torch.randint(1, BIGGEST // 4, (4,), generator=generator).tolist()
    tensors = {f"model.{i}": torch.rand(n, generator=generator) for i, n in enumerate(sizes)}
    info = {"model": {}, "diffusion": {}, "train": {}, "step": step, "skipped": 0}
    return tensors, info


def save_on_and_on(folder: Path, step: int, keep_last: int, pipe: int) -> None:
    """Says "begin" and "end" of every save, with its step, in one write each."""
    while True:
        step += 1
        tensors, info = content(step)
        os.write(pipe, f"begin {step}\n".encode())
        checkpoint.save(folder / checkpoint.FILE, tensors, info, keep_last)
        os.write(pipe, f"end {step}\n".encode())


def killed(folder: Path, step: int, keep_last: int, seconds: float) -> tuple[int, bool]:
    """Runs save_on_and_on for some seconds and kills it → last step reported as saved (`step` if
    none), and whether it died inside a save."""
    reader, writer = os.pipe()
    child = os.fork()  # the imports are done
    if child == 0:
        try:
            os.close(reader)
            save_on_and_on(folder, step, keep_last, writer)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(writer)
    said = os.read(reader, 100)  # the first save has begun
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    while more := os.read(reader, 2**16):
        said += more
    os.close(reader)
    if not os.WIFSIGNALED(status):
        raise SystemExit("the process that saves has ended by itself")
    lines = [line.split() for line in said.decode().splitlines()]
    saved = [int(number) for word, number in lines if word == "end"]
    return max(saved, default=step), lines[-1][0] == "begin"


def intact(folder: Path, reported: int) -> str:
    """Why the folder's newest checkpoint is not what it must be; nothing if it is."""
    try:
        tensors, info = checkpoint.read(folder / checkpoint.FILE)
    except ValueError as error:
        return str(error)
    step = info["step"]
    if not reported <= step <= reported + 1:
        return f"step {step} is there, and {reported} was reported as saved"
    expected = content(step)[0]
    if tensors.keys() != expected.keys():
        return f"step {step} has the tensors {sorted(tensors)}"
    wrong = [name for name in tensors if not torch.equal(tensors[name], expected[name])]
    return f"step {step} has other numbers in {', '.join(wrong)}" if wrong else ""


def kills(count: int, folder: Path, seed: int = 0, keep_last: int = 2, longest: float = 0.2):
    """`count` kills at moments uniform over `longest` seconds → what the JSON has of them."""
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    folder.mkdir(parents=True, exist_ok=True)
    rng, start, faults, inside, step = random.Random(seed), time.perf_counter(), [], 0, 0
    checkpoint.save(folder / checkpoint.FILE, *content(0), keep_last)
    for number in range(count):
        step, within = killed(folder, step, keep_last, rng.uniform(0, longest))
        inside += within
        fault = intact(folder, step)
        if fault:
            faults.append(f"kill {number + 1}: {fault}")
            continue
        step = checkpoint.read(folder, prefix="none.")[1]["step"]
    # The next save after the last kill takes away all that the kills have left.
    checkpoint.save(folder / checkpoint.FILE, *content(step + 1), keep_last)
    left = sorted(path.name for path in folder.iterdir())
    if len(left) > keep_last:
        faults.append(f"the folder has {', '.join(left)}")
    return {
        "kills": count,
        "inside_a_save": inside,
        "loadable": count - sum(fault.startswith("kill") for fault in faults),
        "saves": step,
        "largest_checkpoint_mb": round(4 * BIGGEST / 1e6, 1),
        "longest_wait_s": longest,
        "keep_last": keep_last,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "faults": faults,
    }


def circumstances() -> dict:
    command = ["git", "-C", str(RESULTS.parent), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        "cpu": cpu_name(),
        "threads": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit or None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0, help="kill -9 while saving, so many times")
    parser.add_argument("--minutes", type=float, default=0, help="train/kill/resume for so long")
    parser.add_argument("--memory", action="store_true", help="resident memory of 2,000 steps")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON to write")
    args = parser.parse_args()
    if (args.kills >= 1) + (args.minutes > 0) + args.memory != 1:
        parser.error("give one of --kills (at least 1), --minutes (above 0) and --memory")
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out {args.out} is not empty: give another folder")
    if args.minutes:
        name, found = "training", training(args.minutes, args.out, args.seed)
        held = found["equal"]
        sentence = (
            f"{sum(found['kills'].values())} kills, {found['resumes']} resumes, {found['steps']} "
            f"steps ({found['steps_redone']} more of them done twice): the end is "
            f"{'the same' if held else 'another'} as undisturbed"
        )
    elif args.memory:
        name, found = "memory", memory(args.out)
        held, rss = found["flat"], found["VmRSS"]
        sentence = (
            f"{found['steps']} steps after {found['warmup']}: {rss['least']} … {rss['greatest']} "
            f"MB resident, at most {100 * rss['off_median']:.2f} % from the median"
        )
    else:
        name, found = "kills", kills(args.kills, args.out, args.seed)
        held = not found["faults"]
        sentence = (
            f"{found['loadable']} of {found['kills']} kills left a checkpoint that loads whole; "
            f"{found['inside_a_save']} landed inside a save"
        )
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    results[name] = {**found, "machine": circumstances()}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{sentence}; {found['seconds']} s → {args.results}")
    for fault in (*found.get("faults", []), *found.get("differences", [])):
        print(fault)
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())

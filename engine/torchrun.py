"""What torchrun has told this process of its job, and which process of it says why it fails.

torchrun's environment: RANK of WORLD_SIZE processes, LOCAL_RANK among this machine's, the place of
a key-value store, the job's name and how often it was started again.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import socket

import torch.distributed as dist

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launched() -> int:
    """How many processes do the job; 1 without torchrun.

    Raises ValueError, one sentence, where its environment is incomplete.
    """
    if not any(name in os.environ for name in NAMES[:3]):
        return 1
    numbers = {}
    for name in NAMES:
        value = os.environ.get(name, "")
        if not value:
            given = " and ".join(n for n in NAMES if os.environ.get(n))
            raise ValueError(
                f"the environment has {given}, but no {name}: start with torchrun "
                "--nproc-per-node=N -m engine.…, which sets them all, or unset them for one process"
            )
        if name in NAMES[:3]:
            numbers[name] = int(value) if value.isascii() and value.isdigit() else -1
    if not 0 <= numbers["RANK"] < numbers["WORLD_SIZE"] or numbers["LOCAL_RANK"] < 0:
        told = ", ".join(f"{name}={os.environ[name]}" for name in NAMES[:3])
        raise ValueError(
            f"the environment has {told}: expected 0 <= RANK < WORLD_SIZE and LOCAL_RANK, whole "
            "numbers, as torchrun sets them"
        )
    if numbers["WORLD_SIZE"] > 1 and not dist.is_available():
        raise ValueError("this torch is built without torch.distributed: train in one process")
    return numbers["WORLD_SIZE"]


def restarts() -> int:
    """How often torchrun has started this job again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def job() -> str | None:
    """What names this job for as long as torchrun keeps it alive; None without torchrun.

    It is torchrun's --rdzv-id, or where that was not given, the torchrun process that started this
    one, which only the processes of one machine have in common.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return None
    if name != "none":
        return name
    parent = os.getppid()
    try:  # the time of its start, since its number will be another's some day
        with open(f"/proc/{parent}/stat") as file:
            started = file.read().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        started = ""
    return f"{socket.gethostname()}:{parent}:{started}"


# --- which process speaks -----------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def speaks() -> bool:
    """Whether this process is the first of the job to fail, and so the one to say why.

    When one process fails, the others' messages to it fail too, and torchrun ends them; when all
    fail alike, one sentence is enough. The answer is for good: ask when this process has failed.
    """
    try:
        if launched() == 1:
            return True
        first = store().add("failed", 1) == 1
    except Exception:  # nobody there to ask: better twice than not at all
        return True
    if not first:
        wait_for_told()
    return first


def told() -> None:
    """To be called by the process that `speaks`, when it has."""
    with contextlib.suppress(Exception):
        if launched() > 1:
            store().set("told", "1")


def wait_for_told(seconds: float = 5) -> None:
    """torchrun ends all processes as soon as one ends: first let the one that failed speak."""
    with contextlib.suppress(Exception):
        store().wait(["told"], datetime.timedelta(seconds=seconds))


@functools.lru_cache(maxsize=1)
def store(seconds: float = 300):
    """The key-value store of this job's present start, which outlives each of its processes where
    torchrun keeps it."""
    found, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=seconds)))
    return dist.PrefixStore(f"engine/{restarts()}", found)

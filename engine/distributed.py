"""Several processes that do one job: torchrun's environment, and the few messages they need.

    with distributed.joined(device) as processes:
        …                                # processes.rank, .world, .device, .first
        everything = processes.gather(mine)

Without torchrun there is one process: the same code runs, and no message is sent. What the
processes tell each other is tensors and JSON, never pickle.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .device import choose_device, usable_device

TIMEOUT = 30 * 60  # seconds that one process waits for another: decoding a folder may take long
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Elsewhere(SystemExit):
    """Another process of the job failed, and says why; this one ends with code 1 and no word."""

    def __init__(self) -> None:
        super().__init__(1)


@dataclass(frozen=True)
class Processes:
    """This process among those that do the job together; alone, unless `joined` says otherwise.

    rank        number of this process, 0 … world − 1; rank 0 prints and writes
    world       number of processes
    local_rank  number among those of this machine, which is its GPU's
    device      where this process computes, and where its messages lie
    restarts    how often torchrun has started the job again after a process died
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    restarts: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that prints, draws progress and writes files."""
        return self.rank == 0

    # -- who does what

    def share(self, n: int) -> range:
        """The numbers among 0 … n − 1 that are this process's: shares in order of rank, and as
        equal as n allows."""
        return range(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """While the block runs, what any but the first process prints goes nowhere."""
        if self.first:
            yield
            return
        with (
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            yield

    # -- messages; every process must call them, in the same order

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same bits on each. Any shape, equal on all."""
        if self.world == 1:
            return values
        total = values.detach().to(self.device, copy=True).contiguous()
        with _peers():
            dist.all_reduce(total)
        return total.to(values.device)

    def gather(self, values: Tensor) -> Tensor:
        """(n_rank, *) of every process → (Σ n_rank, *), in order of rank, on each of them.

        Any dtype; the first size may differ and be 0, the others may not.
        """
        if self.world == 1:
            return values
        flat = values.detach().contiguous().reshape(-1).view(torch.uint8)
        whole = torch.cat(self._gather_bytes(flat))
        return whole.to(values.device).view(values.dtype).reshape(-1, *values.shape[1:])

    def to_first(self, tensors: Sequence[Tensor]) -> list[list[Tensor]] | None:
        """The tensors of every process, in order of rank, on rank 0; None on the others.

        Each has its own number of them, their shapes and dtypes; they arrive on the CPU.
        """
        if self.world == 1:
            return [list(tensors)]
        mine = [(str(t.dtype).removeprefix("torch."), list(t.shape)) for t in tensors]
        theirs = self.gather_objects(mine)
        if not self.first:
            for t in filter(Tensor.numel, tensors):
                flat = t.detach().contiguous().reshape(-1).view(torch.uint8).to(self.device)
                with _peers():
                    dist.send(flat, 0)
            return None
        everyone = [list(tensors)]
        for rank in range(1, self.world):
            everyone.append([])
            for dtype, shape in theirs[rank]:
                t = torch.empty(shape, dtype=getattr(torch, dtype))
                flat = t.reshape(-1).view(torch.uint8).to(self.device)
                if len(flat):
                    with _peers():
                        dist.recv(flat, rank)
                everyone[-1].append(flat.cpu().view(t.dtype).reshape(shape))
        return everyone

    def gather_objects(self, thing) -> list:
        """What JSON can hold, of every process, in order of rank."""
        if self.world == 1:
            return [thing]
        return [_from_bytes(part) for part in self._gather_bytes(_to_bytes(thing))]

    def broadcast(self, thing=None):
        """Rank 0's `thing`, which JSON can hold, on every process."""
        if self.world == 1:
            return thing
        data = _to_bytes(thing if self.first else None).to(self.device)
        size = torch.tensor([len(data)], device=self.device)
        with _peers():
            dist.broadcast(size, 0)
            if not self.first:
                data = torch.empty(int(size), dtype=torch.uint8, device=self.device)
            dist.broadcast(data, 0)
        return _from_bytes(data)

    def barrier(self) -> None:
        """Returns when every process has come here."""
        self.sum(torch.zeros(1))

    def on_first(self, work: Callable[[], None]) -> None:
        """Rank 0 does the work while the others wait; its failure ends them all."""
        error = None
        if self.first:
            try:
                work()
            except Exception as caught:
                error = caught
        failed = self.broadcast(error is not None)
        if error is not None:
            raise error
        if failed:
            raise Elsewhere

    def check_same(self, values: dict) -> None:
        """Raises ValueError, one sentence, on every process where `values` differ between them."""
        for rank, others in enumerate(self.gather_objects(values)):
            for name, value in values.items():
                if others.get(name) != value and self.world > 1:
                    raise ValueError(
                        f"the processes differ in their {name}: process {self.rank} has {value}, "
                        f"process {rank} {others.get(name)}; start all of them with the same "
                        "command on the same files"
                    )

    def _gather_bytes(self, flat: Tensor) -> list[Tensor]:  # (n_rank,) uint8 each
        flat = flat.to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        with _peers():
            dist.all_gather(sizes, torch.tensor([len(flat)], device=self.device))
            longest = max(int(size) for size in sizes)
            padded = torch.nn.functional.pad(flat, (0, longest - len(flat)))
            parts = [torch.empty_like(padded) for _ in sizes]
            if longest:
                dist.all_gather(parts, padded)
        return [part[: int(size)] for part, size in zip(parts, sizes, strict=True)]


ALONE = Processes()


def _to_bytes(thing) -> Tensor:  # (n,) uint8
    return torch.frombuffer(bytearray(json.dumps(thing).encode()), dtype=torch.uint8)


def _from_bytes(data: Tensor):
    return json.loads(bytes(data.cpu().tolist()))


# --- joining and leaving ------------------------------------------------------------------------


@contextlib.contextmanager
def joined(device: str | None = None, *, timeout: float = TIMEOUT) -> Iterator[Processes]:
    """The processes that torchrun has started for this job, joined while the block runs.

    device   None, cpu or cuda: with several processes each takes cuda:LOCAL_RANK
    timeout  seconds after which a process gives up waiting for another

    Raises ValueError, one sentence, for an incomplete environment and a device that is not there.
    When the block fails, `speaks` is true on the first process that failed alone, and stays so.
    """
    processes = join(device, timeout=timeout)
    try:
        yield processes
    except Elsewhere:
        _wait_for_told()
        raise
    except BaseException as error:
        if lost_peer(error):
            raise _peer_failed(error) from error
        speaks()  # before the others notice that this process is gone
        raise  # the group is left when Python ends: the message comes first
    leave()


_groups = itertools.count()  # a second group must not find what the first has left in the store


def join(device: str | None = None, *, timeout: float = TIMEOUT) -> Processes:
    """As `joined`, until `leave` or the end of Python."""
    if launched() == 1:
        return Processes(device=choose_device(device), restarts=restarts())
    rank, world, local_rank = (int(os.environ[name]) for name in NAMES[:3])
    if dist.is_initialized():
        raise ValueError("this process has joined a process group already: leave it first")
    where = own_device(device, local_rank)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    bound = {"device_id": where} if where.type == "cuda" else {}
    with _peers():
        dist.init_process_group(
            "nccl" if where.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"job/{next(_groups)}", _store()),
            rank=rank,
            world_size=world,
            timeout=datetime.timedelta(seconds=timeout),
            **bound,
        )
    atexit.register(leave)
    processes = Processes(rank, world, local_rank, where, restarts())
    processes.barrier()  # the first message opens the connections: here, where a failure has a name
    return processes


def leave() -> None:
    """Leaves the group, if this process is in one."""
    atexit.unregister(leave)
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


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


def own_device(name: str | None, local_rank: int) -> torch.device:
    """The device of process `local_rank` of a machine. Raises ValueError, one sentence."""
    device = choose_device(name)
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise ValueError(
            f"--device {name} is one GPU for all processes: give --device cuda, and each takes its "
            "own, cuda:LOCAL_RANK"
        )
    try:
        return usable_device(f"cuda:{local_rank}")
    except ValueError as error:
        raise ValueError(f"{error}; give --nproc-per-node at most that many") from None


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
        first = _store().add("failed", 1) == 1
    except Exception:  # nobody there to ask: better twice than not at all
        return True
    if not first:
        _wait_for_told()
    return first


def told() -> None:
    """To be called by the process that `speaks`, when it has."""
    with contextlib.suppress(Exception):
        if launched() > 1:
            _store().set("told", "1")


def _wait_for_told(seconds: float = 5) -> None:
    """torchrun ends all processes as soon as one ends: first let the one that failed speak."""
    with contextlib.suppress(Exception):
        _store().wait(["told"], datetime.timedelta(seconds=seconds))


@functools.lru_cache(maxsize=1)
def _store(seconds: float = 300):
    """The key-value store of this job's present start, which outlives each of its processes where
    torchrun keeps it."""
    store, _, _ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=seconds)))
    return dist.PrefixStore(f"engine/{restarts()}", store)


def lost_peer(error: BaseException) -> bool:
    """Whether this is what a message to a process that is gone ends with."""
    if not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, dist.DistError) or any(n in str(error) for n in ("gloo", "NCCL"))


def _peer_failed(error: BaseException) -> BaseException:
    """What the others end with: nothing to say where the one that is gone has said why."""
    if not speaks():
        return Elsewhere()
    reason = str(error).splitlines()[0][:200]
    return ConnectionError(
        f"another process of this job has ended or does not answer, and gave no reason ({reason})"
    )


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        raise _peer_failed(error) from error

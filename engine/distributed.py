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
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .device import choose_device, usable_device
from .torchrun import NAMES, launched, restarts, speaks, store, wait_for_told

TIMEOUT = 30 * 60  # seconds that one process waits for another: decoding a folder may take long


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

    def stack(self, values: Tensor) -> Tensor:
        """(*) of every process → (world, *) in order of rank, on each of them; equal shapes."""
        if self.world == 1:
            return values[None]
        values = values.detach().contiguous()
        parts = [torch.empty_like(values) for _ in range(self.world)]
        with _peers():
            dist.all_gather(parts, values)
        return torch.stack(parts)

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

    def machine_by_machine(self, work: Callable[[], object]):
        """work() of every process: first of one per machine, then, when these have done, of the
        others, which find what the first ones put into files. A failure ends all processes."""
        for turn in (True, False):
            error = None
            if (self.local_rank == 0) == turn:
                try:
                    result = work()
                except Exception as caught:
                    error = caught
            done = self.gather_objects(error is None)
            if error is not None:
                raise error
            if not all(done):
                raise Elsewhere
        return result

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
        wait_for_told()
        raise
    except BaseException as error:
        if processes.world > 1 and lost_peer(error):
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
            store=dist.PrefixStore(f"job/{next(_groups)}", store()),
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

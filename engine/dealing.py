"""Work in pieces, dealt out to the processes of a job: sampling, features, bits/dim.

Piece i belongs to process i mod world and is computed as one process would compute it: the same
batch, the noise of the same sample numbers. Rank 0 puts the results together in order.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from .device import choose_device
from .distributed import Processes, joined, own_device

PATIENCE = 24 * 3600  # seconds that one process waits for another's share; a dead one is noticed


@contextlib.contextmanager
def together(device: str | None) -> Iterator[tuple[Processes, torch.device]]:
    """The processes of this job and the device of this one, which is its own GPU where it has one.

    Their messages are the CPU's: who waits for one sleeps, and what is gathered takes no room on a
    GPU. Only rank 0 is heard: what the others print is dropped, but not what a failure says.
    """
    with joined("cpu", timeout=PATIENCE) as processes, processes.quiet():
        if processes.world == 1:
            yield processes, choose_device(device)
        else:
            yield processes, own_device(device, processes.local_rank)


def deal(
    processes: Processes, count: int, work: Callable[[range], Iterable[tuple[Tensor, ...]]]
) -> tuple[Tensor, ...] | None:
    """Has `count` ≥ 1 pieces done; their results, in order of pieces, on rank 0, None elsewhere.

    work  takes the numbers of this process's pieces, perhaps none, and gives for each a tuple of
          CPU tensors (n_i, *); what is returned is (Σ n_i, *) each
    """
    done = list(work(range(processes.rank, count, processes.world)))
    columns = [torch.cat(column) for column in zip(*done, strict=True)]
    lengths = torch.tensor([len(result[0]) for result in done], dtype=torch.int64)
    del done  # twice as much memory otherwise
    everyone = processes.to_first([lengths, *columns])
    if everyone is None:
        return None
    if processes.world == 1:
        return tuple(columns)
    hands = [
        [column.split(lengths.tolist()) for column in columns] for lengths, *columns in everyone
    ]
    world = processes.world
    return tuple(
        torch.cat([hands[i % world][k][i // world] for i in range(count)])
        for k in range(len(columns))
    )


def check_alike(processes: Processes, modules: Iterable[nn.Module], **others) -> None:
    """Raises ValueError, one sentence, unless all processes have the same weights and `others`.

    A run that is still being trained replaces its checkpoint; machines may hold different files.
    """
    if processes.world > 1:
        processes.check_same({"weights": digest(modules), **others})


def digest(modules: Iterable[nn.Module]) -> str:
    """16 hexadecimal digits of SHA-256 over all parameters and buffers."""
    total = hashlib.sha256()
    for module in modules:
        for name, t in module.state_dict().items():
            total.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
            total.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def copy_weights(processes: Processes, module: nn.Module) -> None:
    """Gives every process's module, on the CPU, the weights of rank 0's."""
    if processes.world == 1:
        return
    with torch.no_grad():
        for t in module.state_dict().values():
            mine = t.reshape(-1)
            t.copy_(processes.gather(mine if processes.first else mine[:0]).reshape(t.shape))

"""How several processes train one model: each on its slice of every micro-batch.

DDP keeps whole weights on each process and sums the gradients; sharded (FSDP2), each keeps a part
of every weight, of its moments and of its average, and a U-Net block's weights are whole only
while it computes. What a checkpoint holds is whole in any case, so a run may go on with another
number of processes, sharded or not.
"""

from __future__ import annotations

import contextlib
import warnings
import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .blocks import AttentionBlock, ResBlock
from .distributed import Processes
from .execution import Execution


class Parallel:
    """The part that one process has in the training of `model`; of one process alone, all of it.

    network   what is called in the model's place
    share     images of a micro-batch that this process computes
    first     number of the first of them in the micro-batch
    part      (n,) int64, positions in a whole batch of this process's pictures, piece by piece

    Raises ValueError, one sentence, for a batch that cannot be cut equally.
    """

    def __init__(
        self,
        processes: Processes,
        execution: Execution,
        model: nn.Module,
        batch: int,
        accumulate: int,
        sharded: bool = False,
    ) -> None:
        check_equal(batch, accumulate, processes.world)
        self.processes, self.accumulate = processes, accumulate
        self.sharded = sharded and processes.world > 1
        self.share = batch // accumulate // processes.world
        self.first = processes.rank * self.share
        positions = torch.arange(batch).view(accumulate, processes.world, self.share)
        self.part = None if processes.world == 1 else positions[:, processes.rank].reshape(-1)
        if self.sharded:
            shard(model, execution.device, processes.world)
        elif processes.world > 1:
            on_gpu = execution.device.type == "cuda"
            self.ddp = nn.parallel.DistributedDataParallel(
                model,
                device_ids=[execution.device] if on_gpu else None,
                gradient_as_bucket_view=True,
            )
            self.network = execution.network(self.ddp)
            return
        self.model = model
        self.network = execution.network(model)

    def synchronised(self, piece: int):
        """The context of a piece's forward and backward pass: gradients are summed in the last."""
        last = piece == self.accumulate - 1
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
        elif self.processes.world > 1 and not last:
            return self.ddp.no_sync()
        return contextlib.nullcontext()

    def in_order(self, rows: list[list[float]]) -> list[float]:
        """What each process has for its images, piece by piece → the batch's, in its order."""
        pieces = range(self.accumulate)
        return [v for k in pieces for row in rows for v in row[k * self.share :][: self.share]]

    def whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sharded tensors put together, on the first process and on the CPU; {} on the others.

        Every process must call it.
        """
        found = {}
        for name, value in tensors.items():
            full = whole(value.detach())
            if self.processes.first:
                found[name] = full.cpu() if is_sharded(value) else full
        return found

    def settle(self, backward: Callable[[], None]) -> None:
        """Lets DDP choose its buckets in a pass that changes nothing.

        It orders them after its first pass, and with them the sums over more than two processes: a
        run that goes on would else begin with other sums than the run that was not interrupted.
        """
        if self.processes.world > 1 and not self.sharded:
            backward()
            self.ddp.zero_grad(set_to_none=True)


def check_equal(batch: int, accumulate: int, world: int) -> None:
    if batch // accumulate % world:
        pieces = f", in {accumulate} pieces," if accumulate > 1 else ""
        raise ValueError(
            f"--batch {batch}{pieces} cannot be cut equally for {world} processes: give a --batch "
            f"that is a multiple of {accumulate * world}"
        )


def checksum(model: nn.Module) -> str:
    """Of all weights, to compare those of several processes."""
    found = 0
    for p in model.parameters():
        found = zlib.crc32(p.detach().cpu().contiguous().numpy(), found)
    return f"{found:08x}"


def shard(model: nn.Module, device: torch.device, world: int) -> None:
    """Cuts every weight along its first axis over the processes, block by block (FSDP2)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Nothing here writes into a block's output, which is what it warns of.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    model.to(memory_format=torch.contiguous_format)  # it takes no other; images keep their layout
    mesh = init_device_mesh(device.type, (world,))
    for block in list(model.modules()):
        if isinstance(block, (ResBlock, AttentionBlock)):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, which every process must ask for; any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; any other as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def like(whole: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor as `parameter` has its own: dtype, layout, device; sharded if that is."""
    if not is_sharded(parameter):
        return torch.empty_like(parameter).copy_(whole)
    from torch.distributed.tensor import distribute_tensor

    whole = whole.to(parameter.device, parameter.dtype).contiguous()
    # src_data_rank=None: each process has the whole and takes its part, without a message
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)

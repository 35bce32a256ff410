"""Trains the runs that a JSON file names, one after the other, with a tiny U-Net: what a test of
several processes starts, once for many runs. Beside a run's folder RUN it leaves RUN.gradients, of
the first step, and RUN.json, with the number of messages that DDP sent.

A run's options are TrainConfig's; "copy": "NAME" goes on in a copy of the run beside it;
"signal": [rank, step, number] sends a process that signal before
that step, in the first start of the job; "nan": [rank, step] makes its pictures NaN in that step.
"""

import json
import math
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from small_unet import alive
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from engine import cli, distributed, parallel, unet
from engine import train as command
from engine.train import TrainConfig, train
from engine.trainer import Trainer

TINY = {
    "image_size": 8,
    "in_channels": 1,
    "model_channels": 8,
    "channel_mult": (1,),
    "num_res_blocks": 1,
    "num_groups": 4,
    "dropout": 0.0,
}


class Counted(torch.nn.parallel.DistributedDataParallel):
    """Counts the buckets of gradients that it sends."""

    sent = 0

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        Counted.sent = 0
        self.register_comm_hook(None, Counted.send)

    @staticmethod
    def send(state, bucket):
        Counted.sent += 1
        return allreduce_hook(state, bucket)


class Watched(Trainer):
    """Trainer, which keeps the first gradients and sends itself a signal."""

    signal: tuple | None = None
    nan: tuple | None = None

    def train_step(self, x, y):
        rank = self.processes.rank
        if self.nan and [rank, self.step] == list(self.nan):
            x = x * math.nan
        first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if self.signal and first_start and [rank, self.step] == list(self.signal[:2]):
            os.kill(os.getpid(), self.signal[2])
        if self.step == 0 and "train_step" not in vars(self):
            real = self.update.norm

            def kept():
                gradients = {
                    name: parallel.whole(p.grad).clone().contiguous()
                    for name, p in self.parameters.items()
                }
                if self.processes.first:
                    save_file(gradients, self.folder.with_suffix(".gradients"))
                self.update.norm = real
                return real()

            self.update.norm = kept
        return super().train_step(x, y)


def copied(run: str, name: str) -> str:
    new = Path(run).with_name(name)
    with distributed.joined("cpu") as processes:
        processes.on_first(lambda: shutil.copytree(run, new))
    return str(new)


def main(args: list[str]) -> None:
    unet.PRESETS["cifar10"] = TINY
    fresh = command.new_model
    command.new_model = lambda *options: alive(fresh(*options))
    torch.nn.parallel.DistributedDataParallel = Counted
    sys.modules["engine.trainer"].Trainer = Watched
    for options in json.loads(Path(args[0]).read_text()):
        Watched.signal, Watched.nan = options.pop("signal", None), options.pop("nan", None)
        if "copy" in options:  # go on in a copy of this run
            options["resume"] = options["out"] = copied(options["out"], options.pop("copy"))
        paths = {k: Path(options[k]) for k in ("out", "resume") if options.get(k)}
        config = TrainConfig(**{**options, **paths})
        folder = train(config)
        if os.environ.get("RANK", "0") == "0":
            folder.with_suffix(".json").write_text(json.dumps({"sent": Counted.sent}))


if __name__ == "__main__":
    sys.exit(cli.main(main, sys.argv[1:]))

"""The training loop: precision, EMA, guard against NaN, log, checkpoints, resume.

Every random number of step s (pictures, mirror images, t, noise, dropout) is a function of
(seed, s), and t also of the losses so far where they guide it, which the checkpoint has: so a run
that was interrupted and resumed ends with the weights of one that was not.
"""

from __future__ import annotations

import math
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import cache, checkpoint, data, drawing
from .distributed import Processes
from .execution import Execution, choose
from .guard import STREAK, Diverged, Guard, event_row, not_finite
from .importance import LossAwareSampler
from .metrics import Log
from .optimizer import AdamW
from .parallel import Parallel, like, local, whole
from .signals import Signals, Stopped
from .torchrun import job
from .update import choose_update

if TYPE_CHECKING:
    from .train_config import TrainConfig


# --- the loop -----------------------------------------------------------------------------------


class Trainer:
    """The state of a run and what moves it: `run()` trains up to config.steps."""

    def __init__(
        self,
        config: TrainConfig,
        model,
        diffusion,
        images: data.Images,
        folder: Path,
        execution: Execution | None = None,  # as the configuration says, unless given
        processes: Processes | None = None,  # that train together; this one alone, unless given
    ):
        """`model` is float32, in any layout; `restore` puts a checkpoint's state in."""
        self.config, self.diffusion, self.images, self.folder = config, diffusion, images, folder
        self.execution = execution or choose(
            config.device, config.precision, config.layout, config.compile
        )
        self.device = self.execution.device
        self.model = self.execution.prepared(model)
        self.processes = processes or Processes()
        self.parallel = Parallel(
            self.processes, self.execution, self.model, config.batch, config.accumulate, config.fsdp
        )
        self.parameters = dict(self.model.named_parameters())
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = AdamW(
            self.parameters.values(),
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        # As autocast would cast them, and where gradients need no sum in more than bfloat16.
        alone = self.processes.world == 1 and config.accumulate == 1
        low = alone and self.execution.precision == torch.bfloat16 and not self.execution.compiled
        self.update = choose_update(
            self.optimizer, self.ema, config.clip, self.model if low else None
        )
        loss_aware = config.t_sampler == "loss-aware"
        self.t_sampler = LossAwareSampler(diffusion.T) if loss_aware else None
        self.drawn: list[tuple[Tensor, Tensor]] = []  # t and loss of this step's images, for it
        self.guard = Guard(self.device, self.execution.precision, self.say)
        self.pictures = cache.identity(images)  # for --resume to know them again
        self.signals: Signals | None = None
        self.stop = 0  # the signal that ends the run after this step, on whichever process it came
        self.step = 0  # optimiser steps done, those that the guard left out included

    # -- one step

    def learning_rate(self, step: int) -> float:
        c = self.config
        rate = c.lr * min(1.0, (step + 1) / max(1, c.warmup))
        last = c.decay * c.steps
        if last and step > c.steps - last:
            rate *= 0.5 * (1 + math.cos(math.pi * (step - (c.steps - last)) / last))
        return rate

    def loss(self, x0: Tensor, y: Tensor | None, index: int) -> Tensor:
        """The loss of micro-batch `index`; t, noise and dropout follow from (seed, index).

        Of several processes each gives its slice. What is random is drawn for the whole of it, and
        is the same for any number of processes; dropout within the network is each one's own.
        """
        seed, n = self.config.seed, self.config.batch // self.config.accumulate
        first = self.parallel.first
        mine = slice(first, first + self.parallel.share)
        generator = data.generator(seed, 2, index)
        if self.t_sampler is None:
            t, reduction = torch.randint(self.diffusion.T, (n,), generator=generator), "mean"
        else:
            (t, weights), reduction = self.t_sampler.sample(n, generator), "none"
        torch.manual_seed(data.generator(seed, 3, index).initial_seed())
        y = None if y is None else self.model.drop_labels(y, first, n)
        if self.processes.rank:
            purpose = 3 + 100 * self.processes.rank
            torch.manual_seed(data.generator(seed, purpose, index).initial_seed())
        draw = {"t": t[mine].to(self.device), "key": seed, "step": index, "offset": first}
        dropping, self.model.drops_labels = self.model.drops_labels, False  # they are, just above
        try:
            with self.execution.autocast():
                loss = self.diffusion.loss(
                    self.parallel.network, x0, y=y, reduction=reduction, **draw
                )
        finally:
            self.model.drops_labels = dropping
        if self.t_sampler is None:
            return loss
        self.drawn.append((t, loss.detach()))
        return (weights[mine].to(self.device) * loss).mean()

    def train_step(self, x: Tensor, y: Tensor | None) -> dict[str, float]:
        """One optimiser step on a batch x (B, C, H, W) float32 → the row for the log.

        Of several processes each gives its part of the batch, as Parallel cuts it.
        """
        c = self.config
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        x = x.to(self.device, memory_format=self.model.memory_format, non_blocking=True)
        y = y.to(self.device) if y is not None and c.classes else None
        total = torch.zeros((), device=self.device)
        for k in range(c.accumulate):
            total += self.backward(x, y, k)
        scale = self.guard.scale(self.device)
        self.guard.scaler.unscale_(self.optimizer)
        norm = whole(self.update.norm())
        caught = torch.full_like(total, self.signals.caught if self.signals else 0)
        numbers = torch.stack([total, norm, scale, caught])
        # The step's one wait for the device, and the one message beside the gradients'.
        rows = self.processes.stack(torch.cat([numbers, *(losses for _, losses in self.drawn)]))
        rows = rows.tolist()
        loss_value = sum(row[0] for row in rows) / len(rows)
        _, norm_value, scale_value, _ = rows[0][:4]
        self.stop = int(max(row[3] for row in rows))
        losses = self.parallel.in_order([row[4:] for row in rows])
        if self.guard.judge(self.step + 1, loss_value, norm_value, scale_value):
            self.update.step(1 - self.decay())
            self.update_t_sampler(losses)
        self.drawn.clear()
        self.update.zero_grad()
        self.step += 1
        row = {"loss": loss_value, "grad_norm": norm_value, "lr": rate}
        return row | {"skipped": self.guard.skipped}

    def backward(self, x: Tensor, y: Tensor | None, k: int) -> Tensor:
        """Gradients of the batch's piece k of config.accumulate → its part of the loss, ()."""
        piece = slice(k * self.parallel.share, (k + 1) * self.parallel.share)
        labels = None if y is None else y[piece]
        index = self.step * self.config.accumulate + k
        with self.parallel.synchronised(k), self.update.weights():
            loss = self.loss(x[piece], labels, index) / self.config.accumulate
            self.guard.scaler.scale(loss).backward()
        return loss.detach()

    def give_up(self) -> None:
        """Raises Diverged after a streak of skipped steps, and at its first for broken weights."""
        saved = f"the last weights saved are in {self.folder / checkpoint.FILE}"
        advice = (  # --resume changes no --lr
            f"start a new run with a lower --lr (now {self.config.lr:g}) or a longer --warmup "
            f"(now {self.config.warmup})"
        )
        if self.execution.precision != torch.float32:
            advice += f", or try --resume {self.folder} --precision fp32"
        if self.guard.streak == 1:
            mine = not_finite((name, local(p)) for name, p in self.parameters.items())
            found = max(self.processes.gather_objects(mine))
            if found:
                raise Diverged(f"{found} is not finite at step {self.step}: {advice}; {saved}")
        if self.guard.streak >= STREAK:
            raise Diverged(
                f"{STREAK} steps in a row (up to step {self.step}) had a non-finite loss or "
                f"gradient; {advice}; {saved}"
            )

    def decay(self) -> float:
        """Of the average of the weights, in this step."""
        done = self.step - self.guard.skipped
        # Early on a shorter memory, so that the first weights are forgotten in short runs too.
        return min(self.config.ema, (1 + done) / (10 + done))

    def update_t_sampler(self, losses: list[float]) -> None:
        if self.t_sampler is None:
            return
        warm = self.t_sampler.warm
        self.t_sampler.update(torch.cat([t for t, _ in self.drawn]), torch.tensor(losses))
        if self.t_sampler.warm and not warm:
            self.say(f"step {self.step + 1}: from here on t is drawn in proportion to its loss")

    def warmup_left(self) -> str:
        """For the progress bar: how far the t sampler's warm-up is; nothing once it is over."""
        sampler = self.t_sampler
        if sampler is None or sampler.warm:
            return ""
        return f", uniform t: {sampler.filled}/{sampler.T} have {sampler.history} losses"

    # -- checkpoints

    def save(self) -> None:
        """The checkpoint to go on from; every keep_every steps also one that stays.

        All processes must call it; the first writes, and its failure ends all.
        """
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        tensors["diffusion.betas"] = self.diffusion.betas
        if self.t_sampler is not None:
            tensors |= {f"t_sampler.{k}": v for k, v in self.t_sampler.state_dict().items()}
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        tensors |= {f"guard.{k}": v for k, v in self.guard.state_dict().items()}
        tensors = self.parallel.whole(tensors)
        self.processes.on_first(lambda: self.write(tensors))

    def write(self, tensors: dict[str, Tensor]) -> None:
        found = not_finite(tensors.items())
        if found:  # the file is as good as it was: it stays
            raise Diverged(
                f"{found} is not finite after step {self.step}, which is not saved: start a new "
                f"run with a lower --lr (now {self.config.lr:g}); the last weights saved are in "
                f"{self.folder / checkpoint.FILE}"
            )
        c = self.config
        info = {
            "model": self.model.config,
            "diffusion": {"prediction": c.prediction, "variance": c.variance, "loss": c.loss},
            "train": {k: str(v) if isinstance(v, Path) else v for k, v in vars(c).items()},
            "classes": list(self.images.classes) if c.classes else [],
            "step": self.step,
            "skipped": self.guard.skipped,
            "unit": self.images.unit,
            "pictures": self.pictures,
        }
        if job() is not None:
            info["job"] = job()  # torchrun's: should it start again, the run goes on
        failed = None
        if c.keep_every and self.step and self.step % c.keep_every == 0:
            # Before the one to go on from: a run that is killed in between comes here again.
            kept = self.folder / "checkpoints" / f"step_{self.step:06d}.safetensors"
            try:
                kept.parent.mkdir(exist_ok=True)
                checkpoint.save(kept, tensors, info)
            except OSError as error:
                failed = error
        checkpoint.save(self.folder / checkpoint.FILE, tensors, info, c.keep_last)
        if failed is not None:
            raise failed
        self.execution.tidy()

    def restore(self, tensors: dict[str, Tensor], info: dict) -> None:
        """Puts in a checkpoint's EMA, optimiser, t sampler and counters; the model is there.

        Raises ValueError, one sentence, for numbers that no training goes on from.
        """
        found = not_finite(tensors.items())
        if found:
            raise ValueError(
                f"the checkpoint in {self.folder} has {found} that is not finite: go on from an "
                "earlier one, copied to a new folder as checkpoint.safetensors, or train again "
                "with a lower --lr"
            )
        averages = checkpoint.part(tensors, "ema.")
        for name, p in self.parameters.items():
            self.ema[name] = like(averages[name], p)
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                saved = tensors.get(f"optimizer.{key}.{name}")
                if saved is not None:  # "step" is a scalar, the moments have p's layout
                    state[key] = saved.to(self.device) if key == "step" else like(saved, p)
            if state:
                self.optimizer.state[p] = state
        if self.t_sampler is not None:
            self.t_sampler.load_state_dict(checkpoint.part(tensors, "t_sampler."))
        self.guard.load_state_dict(checkpoint.part(tensors, "guard."))
        self.step, self.guard.skipped = info["step"], info["skipped"]

    # -- the run

    def try_out(self) -> None:
        """A forward and backward pass whose gradients are thrown away."""
        c, n = self.model.config, self.parallel.share
        x = torch.zeros(n, c["in_channels"], c["image_size"], c["image_size"], device=self.device)
        x = x.to(memory_format=self.model.memory_format)
        y = None
        if self.config.classes:
            y = torch.zeros(n, dtype=torch.int64, device=self.device)
        self.model.train()
        with self.parallel.synchronised(self.config.accumulate - 1):
            self.loss(x, y, 0).backward()
        self.drawn.clear()

    def say(self, text: str) -> None:
        from tqdm import tqdm

        if self.processes.first:
            tqdm.write(text, file=sys.stderr)

    def run(self) -> None:
        """Trains up to config.steps; logs, draws and saves. Raises Stopped on SIGINT or SIGTERM."""
        from tqdm import tqdm

        c, first = self.config, self.processes.first
        # Before any other file: from here on the folder is taken, --resume works. And where the
        # newest checkpoint is damaged, the older one that this run goes on from takes its name.
        saved = checkpoint.step_of(self.folder / checkpoint.FILE) if first else None
        if self.processes.broadcast(saved) != self.step:
            self.save()
        if (
            self.warmup_left()
        ):  # 24 T draws at T = 1000, 25 T at 4000, until the last t has its tenth
            self.say(
                f"t is drawn uniformly until each of the {self.diffusion.T} has "
                f"{self.t_sampler.history} losses: some {25 * self.diffusion.T // c.batch} steps"
            )
        self.parallel.settle(self.try_out)
        with (
            Signals(patient=self.processes.world > 1) as self.signals,
            Log(self.folder, self.step, c.tensorboard) if first else nullcontext() as log,
        ):
            order = {"seed": c.seed, "flip": c.flip, "part": self.parallel.part}
            stream = data.batches(self.images, c.batch, start=self.step, **order)
            progress = tqdm(
                total=c.steps, initial=self.step, unit="step", dynamic_ncols=True, disable=not first
            )
            smooth, start, seen = 0.0, time.perf_counter(), 0
            try:
                while self.step < c.steps:
                    row = self.train_step(*next(stream))
                    seen += c.batch
                    rate = seen / (time.perf_counter() - start)
                    if math.isfinite(row["loss"]):
                        smooth += (row["loss"] - smooth) * (0.02 if smooth else 1)
                    progress.update()
                    state = f"loss {smooth:.4f}, {rate:.0f} images/s{self.warmup_left()}"
                    progress.set_postfix_str(state, False)
                    event = self.guard.event
                    due = self.step % c.log_every == 0 or self.step == c.steps or event
                    if log and due:
                        log.write(self.step, row | {"images_per_second": round(rate, 1)})
                    if log and event:
                        before = self.step - 1
                        log.event(self.step, event_row(event, self.images, c.seed, before, c.batch))
                    self.give_up()
                    alone = self.processes.world == 1
                    stop = self.signals.caught if alone else self.stop
                    if stop:
                        self.save()
                        name = signal.Signals(stop).name
                        raise Stopped(
                            f"{name}: stopped and saved at step {self.step} of {c.steps}; "
                            "go on with: python -m engine.train --resume "
                            f"{shlex.quote(str(self.folder))}",
                            128 + stop,
                        )
                    due = self.step % c.save_every == 0 or self.step == c.steps
                    if due or (c.keep_every and self.step % c.keep_every == 0):
                        self.save()
                    if c.sample_every and self.step % c.sample_every == 0 and self.step < c.steps:
                        drawing.grid(self, log)
                        self.execution.tidy()
            finally:
                progress.close()
                stream.close()

"""The training loop: precision, EMA, guard against NaN, log, checkpoints, resume.

Every random number of step s (pictures, mirror images, t, noise, dropout) is a function of
(seed, s), and t also of the losses so far where they guide it, which the checkpoint has: so a run
that was interrupted and resumed ends with the weights of one that was not.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import checkpoint, data
from .cli import Failed
from .execution import Execution, choose
from .guard import STREAK, Diverged, Guard, event_row, not_finite
from .importance import LossAwareSampler
from .metrics import Log

if TYPE_CHECKING:
    from .train import TrainConfig


class Stopped(Failed):
    """A signal ended the training; the checkpoint is written. `code` is the shell's for it."""


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
    ):
        """`model` is float32, in any layout; `restore` puts a checkpoint's state in."""
        self.config, self.diffusion, self.images, self.folder = config, diffusion, images, folder
        self.execution = execution or choose(
            config.device, config.precision, config.layout, config.compile
        )
        self.device = self.execution.device
        self.model = self.execution.prepared(model)
        self.network = self.execution.network(self.model)
        self.parameters = dict(self.model.named_parameters())
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        loss_aware = config.t_sampler == "loss-aware"
        self.t_sampler = LossAwareSampler(diffusion.T) if loss_aware else None
        self.drawn: list[tuple[Tensor, Tensor]] = []  # t and loss of this step's images, for it
        self.guard = Guard(self.device, self.execution.precision, self.say)
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
        """The loss of micro-batch `index`; t, noise and dropout follow from (seed, index)."""
        seed, n = self.config.seed, len(x0)
        generator = data.generator(seed, 2, index)
        if self.t_sampler is None:
            t, reduction = torch.randint(self.diffusion.T, (n,), generator=generator), "mean"
        else:
            (t, weights), reduction = self.t_sampler.sample(n, generator), "none"
        torch.manual_seed(data.generator(seed, 3, index).initial_seed())  # dropout
        draw = {"t": t.to(self.device), "key": seed, "step": index}
        with self.execution.autocast():
            loss = self.diffusion.loss(self.network, x0, y=y, reduction=reduction, **draw)
        if self.t_sampler is None:
            return loss
        self.drawn.append((t, loss.detach()))
        return (weights.to(self.device) * loss).mean()

    def train_step(self, x: Tensor, y: Tensor | None) -> dict[str, float]:
        """One optimiser step on a batch x (B, C, H, W) float32 → the row for the log."""
        c = self.config
        rate = self.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        x = x.to(self.device, memory_format=self.model.memory_format, non_blocking=True)
        y = y.to(self.device) if y is not None and c.classes else None
        total = torch.zeros((), device=self.device)
        micro = c.batch // c.accumulate
        for k in range(c.accumulate):
            piece = slice(k * micro, (k + 1) * micro)
            labels = None if y is None else y[piece]
            loss = self.loss(x[piece], labels, self.step * c.accumulate + k) / c.accumulate
            self.guard.scaler.scale(loss).backward()
            total += loss.detach()
        scale = self.guard.scale(self.device)
        self.guard.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), c.clip)
        # The step's one wait for the device.
        numbers = torch.stack([total, norm, scale])
        values = torch.cat([numbers, *(losses for _, losses in self.drawn)])
        loss_value, norm_value, scale_value, *losses = values.tolist()
        if self.guard.judge(self.step + 1, loss_value, norm_value, scale_value):
            self.optimizer.step()
            self.update_ema()
            self.update_t_sampler(losses)
        self.drawn.clear()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        row = {"loss": loss_value, "grad_norm": norm_value, "lr": rate}
        return row | {"skipped": self.guard.skipped}

    def give_up(self) -> None:
        """Raises Diverged after a streak of skipped steps, and at its first for broken weights."""
        saved = f"the last weights saved are in {self.folder / checkpoint.FILE}"
        advice = (
            f"try a lower --lr (now {self.config.lr:g}), a longer --warmup (now "
            f"{self.config.warmup}) or --precision fp32"
        )
        if self.guard.streak == 1:
            found = not_finite(self.parameters.items())
            if found:
                raise Diverged(f"{found} is not finite at step {self.step}: {advice}; {saved}")
        if self.guard.streak >= STREAK:
            raise Diverged(
                f"{STREAK} steps in a row (up to step {self.step}) had a non-finite loss or "
                f"gradient; {advice}; {saved}"
            )

    @torch.no_grad()
    def update_ema(self) -> None:
        done = self.step - self.guard.skipped
        # Early on a shorter memory, so that the first weights are forgotten in short runs too.
        decay = min(self.config.ema, (1 + done) / (10 + done))
        torch._foreach_lerp_(list(self.ema.values()), list(self.parameters.values()), 1 - decay)

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
        """The checkpoint to go on from; every keep_every steps also one that stays."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        tensors["diffusion.betas"] = self.diffusion.betas
        if self.t_sampler is not None:
            tensors |= {f"t_sampler.{k}": v for k, v in self.t_sampler.state_dict().items()}
        for name, p in self.parameters.items():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        tensors |= {f"guard.{k}": v for k, v in self.guard.state_dict().items()}
        found = not_finite(tensors.items())
        if found:  # the file is as good as it was: it stays
            raise Diverged(
                f"{found} is not finite after step {self.step}, which is not saved: try a lower "
                f"--lr (now {self.config.lr:g}); the last weights saved are in "
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
        }
        checkpoint.save(self.folder / checkpoint.FILE, tensors, info, c.keep_last)
        if c.keep_every and self.step and self.step % c.keep_every == 0:
            kept = self.folder / "checkpoints" / f"step_{self.step:06d}.safetensors"
            kept.parent.mkdir(exist_ok=True)
            checkpoint.save(kept, tensors, info)
        del tensors
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
            self.ema[name].copy_(averages[name])
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                saved = tensors.get(f"optimizer.{key}.{name}")
                if saved is not None:  # "step" is a scalar, the moments have p's layout
                    like = saved if key == "step" else torch.empty_like(p).copy_(saved)
                    state[key] = like.to(self.device)
            if state:
                self.optimizer.state[p] = state
        if self.t_sampler is not None:
            self.t_sampler.load_state_dict(checkpoint.part(tensors, "t_sampler."))
        self.guard.load_state_dict(checkpoint.part(tensors, "guard."))
        self.step, self.guard.skipped = info["step"], info["skipped"]

    # -- pictures

    def sample(self, n: int, **options):
        """n samples of the EMA weights."""
        from .samplers import sample

        config = self.model.config
        shape = (n, config["in_channels"], config["image_size"], config["image_size"])
        classes = config.get("num_classes")
        y = torch.arange(n, device=self.device) % classes if classes else None
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.model.eval()
        self.copy_weights(self.ema)
        try:
            with self.execution.autocast():
                return sample(
                    self.model,
                    self.diffusion,
                    shape,
                    # Few training steps: ddpm's fresh noise mends what ddim would carry along.
                    sampler="ddpm",
                    steps=min(self.config.sample_steps, self.diffusion.T),
                    seed=self.config.seed,
                    y=y,
                    **options,
                )
        finally:
            self.copy_weights(trained)

    @torch.no_grad()
    def copy_weights(self, source: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(source[name])

    def draw(self) -> None:
        """The final pictures: samples.png, strip.png, loss.png."""
        from . import plots

        if self.config.samples:
            self.say(f"drawing {self.config.samples} samples …")
            images, states = self.sample(self.config.samples, trajectory=10)
            plots.grid(images, self.folder / "samples.png")
            plots.strip([state[:8] for state in states], self.folder / "strip.png")
        plots.loss_curve(self.folder)

    # -- the run

    def say(self, text: str) -> None:
        from tqdm import tqdm

        tqdm.write(text, file=sys.stderr)

    def run(self) -> None:
        """Trains up to config.steps; logs, draws and saves. Raises Stopped on SIGINT or SIGTERM."""
        from tqdm import tqdm

        from . import plots

        c = self.config
        # Before any other file: from here on the folder is taken, --resume works. And where the
        # newest checkpoint is damaged, the older one that this run goes on from takes its name.
        if checkpoint.step_of(self.folder / checkpoint.FILE) != self.step:
            self.save()
        if (
            self.warmup_left()
        ):  # 24 T draws at T = 1000, 25 T at 4000, until the last t has its tenth
            self.say(
                f"t is drawn uniformly until each of the {self.diffusion.T} has "
                f"{self.t_sampler.history} losses: some {25 * self.diffusion.T // c.batch} steps"
            )
        with Signals() as signals, Log(self.folder, self.step, c.tensorboard) as log:
            stream = data.batches(self.images, c.batch, seed=c.seed, flip=c.flip, start=self.step)
            progress = tqdm(total=c.steps, initial=self.step, unit="step", dynamic_ncols=True)
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
                    if self.step % c.log_every == 0 or self.step == c.steps or event:
                        log.write(self.step, row | {"images_per_second": round(rate, 1)})
                    if event:
                        before = self.step - 1
                        log.event(self.step, event_row(event, self.images, c.seed, before, c.batch))
                    self.give_up()
                    if signals.caught:
                        self.save()
                        name = signal.Signals(signals.caught).name
                        raise Stopped(
                            f"{name}: stopped and saved at step {self.step} of {c.steps}; "
                            f"go on with: python -m engine.train --resume {self.folder}",
                            128 + signals.caught,
                        )
                    due = self.step % c.save_every == 0 or self.step == c.steps
                    if due or (c.keep_every and self.step % c.keep_every == 0):
                        self.save()
                    if c.sample_every and self.step % c.sample_every == 0 and self.step < c.steps:
                        path = self.folder / "samples" / f"step_{self.step:06d}.png"
                        plots.grid(self.sample(16), path)
                        log.image(self.step, path)
                        self.execution.tidy()
            finally:
                progress.close()
                stream.close()


class Signals:
    """Notes SIGINT and SIGTERM, so that a step is never cut in two; a second one ends at once."""

    caught = 0

    def __enter__(self) -> Signals:
        self.before = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, self.note)
            except ValueError:  # not the main thread: its owner handles signals
                return self
        return self

    def note(self, number, frame) -> None:
        self.caught = number
        for each, handler in self.before.items():
            signal.signal(each, handler)

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

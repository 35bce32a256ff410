"""`python -m engine.train_classifier`: train the noisy classifier of classifier guidance."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from . import cli, run_lock
from .resume import check_changed, check_free, check_pictures, is_folder, saved_options

if TYPE_CHECKING:
    import torch

PROG = "python -m engine.train_classifier"
WARMUP = 100  # steps over which the learning rate rises


@dataclass(frozen=True)
class ClassifierConfig:
    """Train a classifier of noisy pictures x_t, which guides a diffusion model's samples.

    Its schedule must be the model's. The folder gets checkpoint.safetensors and metrics.jsonl;
    Ctrl-C saves and stops, --resume goes on.
    """

    dataset: str = "fashion-mnist"
    """What to train on, with labels: fashion-mnist, a folder of class folders, or a Hugging Face
    data set's name."""
    out: Path = Path("runs/classifier")
    """Folder of the run. It is made if need be; one that holds files of a run is refused."""
    resume: Annotated[Path | None, cli.left_out("start a new run", "RUN")] = None
    """Folder of a run to go on with, under its saved options; --steps may be raised."""
    changed_pictures: bool = False
    """With --resume: go on although the data set has more, fewer or other pictures than before."""
    data_dir: Annotated[
        Path | None, cli.left_out("Debian's dataset-fashion-mnist, or download")
    ] = None
    """Folder with Fashion-MNIST's four IDX files."""
    image_size: Annotated[int | None, cli.left_out("28 for fashion-mnist, else 32")] = None
    """Height and width in pixels to which pictures are centre-cropped and resized."""
    channels: Annotated[int | None, cli.left_out("1 for fashion-mnist, else 3")] = None
    """Colours of the pictures: 1 grey, 3 RGB."""
    width: int = 32
    """Base channels of the encoder."""
    pool: Literal["attention", "adaptive"] = "attention"
    """How the positions become logits: attention of their mean to all, or their mean."""
    flip: bool = False
    """Mirror half of the pictures, left to right."""

    schedule: Literal["linear", "linear_unscaled", "cosine", "quadratic", "sigmoid"] = "cosine"
    """Noise schedule β_t."""
    timesteps: int = 1000
    """Diffusion steps T."""

    steps: int = 2000
    """Optimiser steps in all, those before a --resume included."""
    batch: int = 64
    """Pictures per optimiser step, each with a t of its own, uniform over 0 … T−1."""
    lr: float = 1e-3
    """Learning rate of AdamW after the warm-up, from where it falls linearly to 0."""
    weight_decay: float = 0.05
    """AdamW's decoupled weight decay, per step and unit of learning rate."""
    seed: int = 0
    """Seed of the initial weights, the order of the pictures, t and the noise."""
    device: Annotated[str | None, cli.left_out("cuda where there is one, else cpu", "NAME")] = None
    """Device to train on: cpu, cuda, cuda:1 …"""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the classifier; auto is bf16 where the device has it."""
    log_every: int = 50
    """Steps between rows of metrics.jsonl."""
    save_every: int = 500
    """Steps between checkpoints."""


# What --resume may change: how the run is carried out, not what it computes.
RESUMABLE = {
    *("out", "resume", "changed_pictures", "data_dir", "steps", "device", "precision"),
    *("log_every", "save_every"),
}
KEEP_LAST = 2  # newest checkpoints kept


def validate(config: ClassifierConfig) -> None:
    """Raises ValueError, one sentence, for a number that makes no sense."""
    for name in ("timesteps", "width", "steps", "batch", "log_every", "save_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{cli.option(name)} must be at least 1, not {getattr(config, name)}")
    if not 0 < config.lr < float("inf"):
        raise ValueError(f"--lr must be positive, not {config.lr}")
    if not 0 <= config.weight_decay < float("inf"):
        raise ValueError(f"--weight-decay must be 0 or more, not {config.weight_decay}")
    if not -(2**63) <= config.seed < 2**63:
        raise ValueError(f"--seed must fit 64 bits, not {config.seed}")


class Run:
    """The state of a run: classifier, process, optimiser, step; `train_step` moves it."""

    def __init__(self, config: ClassifierConfig, model, diffusion, images) -> None:
        import torch

        from . import cache
        from .device import choose_device, choose_precision

        self.config, self.diffusion, self.images = config, diffusion, images
        self.device = choose_device(config.device)
        self.precision = choose_precision(config.precision, self.device)
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.rows = diffusion.forward_rows().float().to(self.device)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        self.pictures = cache.identity(images)  # for --resume to know them again
        self.step = 0

    def logits(self, x0: torch.Tensor, t: torch.Tensor, **noise) -> torch.Tensor:
        """(N, num_classes) float32, of x_t made from x0 and `noise`: a key and step, or a noise."""
        from . import ops
        from .device import autocast

        x_t = ops.forward_noise(x0, self.rows, t, **noise)
        with autocast(self.device, self.precision):
            return self.model(x_t, t).float()

    def train_step(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        """One optimiser step of cross-entropy, all of whose chance follows from (seed, step)."""
        import torch

        from .data import generator

        c = self.config
        rate = c.lr * min(1.0, (self.step + 1) / WARMUP) * (1 - self.step / c.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        t = torch.randint(self.diffusion.T, (len(x),), generator=generator(c.seed, 2, self.step))
        x = x.to(self.device, memory_format=torch.channels_last)
        y = y.to(self.device)
        torch.manual_seed(generator(c.seed, 3, self.step).initial_seed())  # dropout
        self.model.train()
        logits = self.logits(x, t.to(self.device), key=c.seed, step=self.step)
        loss = torch.nn.functional.cross_entropy(logits, y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        accuracy = (logits.argmax(1) == y).float().mean()
        value, accuracy = torch.stack([loss.detach(), accuracy]).tolist()
        if value != value or value == float("inf"):
            raise cli.Failed(
                f"step {self.step + 1}: the loss is {value}; try a lower --lr (now {c.lr:g}); the "
                f"last weights saved are in {c.out}"
            )
        self.optimizer.step()
        self.step += 1
        return {"loss": value, "accuracy": accuracy, "lr": rate}

    def accuracy(self, images, n: int = 1000, levels: int = 6) -> dict[int, float]:
        """Share of the first n pictures that are classified rightly at each of some t."""
        import torch

        from .data import batch, generator

        self.model.eval()
        n, last, found = min(n, len(images)), self.diffusion.T - 1, {}
        x, y = batch(images, 0, n, seed=self.config.seed)
        for t in sorted({round(i * last / max(1, levels - 1)) for i in range(levels)}):
            noise = torch.randn(x.shape, generator=generator(self.config.seed, 4, t))
            right = 0
            with torch.no_grad():
                for part, eps, labels in zip(
                    x.split(256), noise.split(256), y.split(256), strict=True
                ):
                    steps = torch.full((len(part),), t, device=self.device)
                    out = self.logits(part.to(self.device), steps, noise=eps.to(self.device))
                    right += (out.argmax(1).cpu() == labels).sum().item()
            found[t] = right / n
        return found

    def save(self) -> None:
        from . import checkpoint

        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors["diffusion.betas"] = self.diffusion.betas
        for name, p in self.model.named_parameters():
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        c = vars(self.config)
        info = {
            "kind": "classifier",
            "model": self.model.config,
            "diffusion": {},
            "train": {k: str(v) if isinstance(v, Path) else v for k, v in c.items()},
            "classes": list(self.images.classes),
            "step": self.step,
            "skipped": 0,
            "pictures": self.pictures,
        }
        checkpoint.save(self.config.out / checkpoint.FILE, tensors, info, KEEP_LAST)

    def restore(self, tensors: dict, info: dict) -> None:
        """Puts a checkpoint's weights, optimiser and step in."""
        import torch

        from .checkpoint import part

        self.model.load_state_dict(part(tensors, "model."))
        for name, p in self.model.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                saved = tensors.get(f"optimizer.{key}.{name}")
                if saved is not None:  # "step" is a scalar, the moments have p's layout
                    like = saved if key == "step" else torch.empty_like(p).copy_(saved)
                    self.optimizer.state[p][key] = like
        self.step = info["step"]

    def train(self) -> None:
        """Trains up to config.steps, logs and saves. Raises cli.Failed on a signal."""
        from tqdm import tqdm

        from . import data
        from .metrics import Log
        from .signals import Signals

        c = self.config
        stream = data.batches(self.images, c.batch, seed=c.seed, flip=c.flip, start=self.step)
        progress = tqdm(total=c.steps, initial=self.step, unit="step", dynamic_ncols=True)
        with Signals() as signals, Log(c.out, self.step, False) as log, progress:
            self.save()  # from here on the folder is taken, --resume works
            while self.step < c.steps:
                row = self.train_step(*next(stream))
                progress.update()
                progress.set_postfix_str(f"loss {row['loss']:.3f}", False)
                if self.step % c.log_every == 0 or self.step == c.steps:
                    log.write(self.step, row)
                if signals.caught or self.step % c.save_every == 0 or self.step == c.steps:
                    self.save()
                if signals.caught:
                    raise cli.Failed(
                        f"stopped and saved at step {self.step} of {c.steps}; go on with: {PROG} "
                        f"--resume {shlex.quote(str(c.out))}",
                        128 + signals.caught,
                    )
        stream.close()


def train(config: ClassifierConfig) -> Run:
    """Trains or resumes. Raises ValueError or OSError, one sentence, before anything is written."""
    with contextlib.ExitStack() as stack:
        return carry_out(config, stack)


def carry_out(config: ClassifierConfig, stack: contextlib.ExitStack) -> Run:
    """`train`; the run's lock is put on `stack`."""
    validate(config)
    check_changed(config)
    import torch

    from . import checkpoint, data, schedules
    from .classifier import Classifier
    from .device import choose_device
    from .diffusion import Diffusion

    choose_device(config.device)
    locked = config.out.is_dir()
    if locked:
        stack.enter_context(run_lock.held(config.out))
    if config.resume is None:
        check_free(config.out)
    else:
        tensors, info = checkpoint.read(config.out)
        if config.steps < info["step"]:
            raise ValueError(
                f"--steps {config.steps} is less than the {info['step']} steps that {config.out} "
                f"has done: give more than {info['step']} to train on, or leave --steps out"
            )
    grey = config.dataset == "fashion-mnist"
    size = (28 if grey else 32) if config.image_size is None else config.image_size
    channels = (1 if grey else 3) if config.channels is None else config.channels
    images = data.open_dataset(
        config.dataset, size=size, channels=channels, data_dir=config.data_dir, labels=True
    )
    if images.labels is None:
        raise ValueError(f"--dataset {config.dataset} has no labels: a classifier needs them")
    if is_folder(config.dataset):  # by its whole path, so that --resume works from any folder
        whole = str(Path(config.dataset).expanduser().resolve())
        config = dataclasses.replace(config, dataset=whole)
    torch.manual_seed(config.seed)
    shape = {"image_size": size, "in_channels": channels, "num_classes": len(images.classes)}
    try:
        model = Classifier.from_preset(
            "fashion-mnist",
            **shape,
            model_channels=config.width,
            head_channels=None,  # one head, whatever the width
            pool=config.pool,
        )
    except ValueError as error:
        sentence = str(error).replace("model_channels", "--width")
        raise ValueError(sentence.replace("image_size", "--image-size")) from None
    diffusion = Diffusion(schedules.betas(config.schedule, config.timesteps))
    run = Run(config, model, diffusion, images)
    if config.resume is not None:
        if list(images.classes) != info["classes"]:
            raise ValueError(
                f"{config.dataset} has the classes {', '.join(images.classes)}, but {config.out} "
                f"was trained with {', '.join(info['classes'])}"
            )
        if changed := check_pictures(config, images, info):
            print(changed, file=sys.stderr)
        run.restore(tensors, info)
    cli.make_writable(config.out, "--out")
    if not locked:
        stack.enter_context(run_lock.held(config.out))
        check_free(config.out)  # another run may have begun there while the pictures were read
    run.train()
    return run


def resumed(config: ClassifierConfig, args: Sequence[str] | None) -> ClassifierConfig:
    """The saved run's options with what was typed. Raises ValueError for what cannot change."""
    from . import checkpoint

    _, info = checkpoint.read(config.resume, prefix="none.", quiet=True)
    if info.get("kind") != "classifier":
        raise ValueError(f"--resume {config.resume} is no classifier's run: use engine.train")
    known = {field.name for field in dataclasses.fields(ClassifierConfig)}
    saved = ClassifierConfig(**saved_options(config.resume, ClassifierConfig))
    # Read again with the run's own options as defaults: what differs now was typed.
    config = cli.parse(ClassifierConfig, PROG, args, default=saved)
    for name in sorted(known - RESUMABLE):
        old, new = getattr(saved, name), getattr(config, name)
        if old != new and not (name == "dataset" and is_folder(new)):
            raise ValueError(
                f"{cli.option(name)} cannot change on --resume: the run was started with "
                f"{'its default' if old is None else old}, not {new}"
            )
    if config.out.resolve() != saved.out.resolve():
        raise ValueError(f"--resume goes on in {saved.out}: leave out --out {config.out}")
    return config


def command(args: Sequence[str] | None) -> None:
    config = cli.parse(ClassifierConfig, PROG, args)
    cli.alone(PROG)
    if config.resume is not None:
        config = resumed(config, args)
    run = train(config)
    images, which = run.images, "training"
    if config.dataset == "fashion-mnist":
        from . import data

        size, channels = run.model.config["image_size"], run.model.config["in_channels"]
        images, which = (
            data.open_dataset(
                "fashion-mnist",
                size=size,
                channels=channels,
                data_dir=config.data_dir,
                split="test",
            ),
            "test",
        )
    print(f"accuracy on {min(1000, len(images))} {which} pictures x_t, by t:")
    for t, share in run.accuracy(images).items():
        print(f"  t = {t:<5}  {share:7.1%}")
    print(f"classifier   {config.out}")


def main(args: Sequence[str] | None = None) -> int:
    return cli.main(command, args)


if __name__ == "__main__":
    sys.exit(main())

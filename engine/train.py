"""`python -m engine.train`: train a diffusion model, or go on with one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from . import cli, run_lock
from .resume import (
    check_branch,
    check_changed,
    check_free,
    check_pictures,
    check_resume,
    is_folder,
    restarted,
    saved_options,
)
from .train_config import (
    TrainConfig,
    complete,
    new_diffusion,
    new_model,
    picture_shape,
    validate,
)

PROG = "python -m engine.train"


def train(config: TrainConfig) -> Path:
    """Trains or resumes, draws the final pictures, and returns the run's folder.

    Raises ValueError or OSError, one sentence, for bad input, before anything is written; Stopped
    after a signal and Diverged when the loss stays NaN.
    """
    config = complete(config)
    validate(config)
    check_changed(config)
    # Late, so that --help and a wrong option are answered without waiting for torch.
    from .distributed import joined

    with joined(config.device) as processes, contextlib.ExitStack() as stack:
        return carry_out(config, processes, stack)


def carry_out(config: TrainConfig, processes, stack: contextlib.ExitStack) -> Path:
    """`train`, as one of the processes that do it; the run's lock is put on `stack`."""
    from . import checkpoint, drawing
    from .dispatch import cases_on
    from .execution import choose, describe
    from .parallel import check_equal, checksum
    from .trainer import Trainer

    check_equal(config.batch, config.accumulate, processes.world)
    tensors, info = {}, None
    if config.resume is None:
        folder = config.out or Path("runs") / Path(config.dataset).resolve().name
        config = dataclasses.replace(config, out=folder)
        if processes.broadcast(processes.first and goes_on(config)):
            config = dataclasses.replace(config, resume=folder)
    if config.resume is not None:
        folder = checkpoint.find(config.resume).parent
        processes.on_first(lambda: stack.enter_context(run_lock.held(folder)))
        file, tensors, info = checkpoint.newest(config.resume, quiet=not processes.first)
        if config.steps < info["step"]:
            raise ValueError(
                f"--steps {config.steps} is less than the {info['step']} steps that {folder} has "
                f"done: give more than {info['step']} to train on, or leave --steps out"
            )
        model, diffusion = checkpoint.build(tensors, info, "model", file)
        check_branch(config.resume, info)
        size, channels = model.config["image_size"], model.config["in_channels"]
    else:
        locked = []

        def take() -> None:
            if folder.is_dir():
                locked.append(stack.enter_context(run_lock.held(folder)))
            check_free(folder)

        processes.on_first(take)
        size, channels = picture_shape(config)
    if config.keep_every:
        kept = folder / "checkpoints"
        processes.on_first(
            # It is not made before the run is: what ends until then would leave files of one.
            lambda: cli.make_writable(kept, "--keep-every") if kept.exists() else None
        )
    config, images = open_pictures(config, processes, size, channels)
    if info is None:
        if config.classes and images.labels is None:
            raise ValueError(f"--classes: {config.dataset} has no labels")
        model = new_model(config, size, channels, len(images.classes) if config.classes else None)
        diffusion = new_diffusion(config)
    elif config.classes and list(images.classes) != info.get("classes"):
        raise ValueError(
            f"{config.dataset} has the classes {', '.join(images.classes)}, but {folder} was "
            f"trained with {', '.join(info.get('classes', []))}: give --dataset with these folders"
        )
    changed = check_pictures(config, images, info) if info is not None else ""
    device = str(processes.device)
    execution = choose(device, config.precision, config.layout, config.compile)
    device, chosen = execution.device, describe(model, execution)

    def settle_in() -> None:
        cli.make_writable(folder, "--out")
        if info is None and not locked:
            stack.enter_context(run_lock.held(folder))
            check_free(folder)  # another run may have begun there while the pictures were read

    processes.on_first(settle_in)
    if processes.world > 1:
        check_alike(
            config,
            processes,
            number_of_pictures=len(images),
            names_of_pictures=images.digest,
            weights_to_start_with=checksum(model),
            step_to_start_from=info and info["step"],
        )
        chosen += f"; {processes.world} processes" + ", weights shared out" * config.fsdp
    trainer = Trainer(config, model, diffusion, images, folder, execution, processes)
    if info is not None:
        trainer.restore(tensors, info)
    tensors.clear()
    if trainer.update.lows is not None:
        chosen += "; weights of convolutions and projections in bfloat16 beside their float32"
    if changed:
        trainer.say(changed)
    trainer.say(
        f"{chosen}; {config.steps} steps of {config.batch} images, "
        f"from {len(images)} of {channels}×{size}×{size}"
    )
    if device.type == "cuda" and not cases_on(device, "group_norm_silu", "triton"):
        trainer.say(
            "our kernels have not yet been proved on this kind of GPU, so PyTorch computes: "
            "`make test` here proves them (ENGINE_BACKEND=triton takes them all the same)"
        )
    if trainer.step < config.steps:
        trainer.run()
    else:
        trainer.say(f"{folder} has its {trainer.step} steps; raise --steps to train on")
    drawing.final(trainer)
    return folder


def open_pictures(config: TrainConfig, processes, size: int, channels: int):
    """The pictures to train on; and the configuration, with a folder of them by its whole path, so
    that --resume works from any folder."""
    from . import data, decoded

    with processes.quiet():
        images = processes.machine_by_machine(
            lambda: data.open_dataset(
                config.dataset,
                size=size,
                channels=channels,
                data_dir=config.data_dir,
                labels=config.classes,
                cache=decoded.place() if config.cache else None,
            )
        )
    if is_folder(config.dataset):
        whole = str(Path(config.dataset).expanduser().resolve())
        config = dataclasses.replace(config, dataset=whole)
    return config, images


def check_alike(config: TrainConfig, processes, **more) -> None:
    """Raises ValueError where the processes were not started alike."""
    given = {f"option {cli.option(k)}": str(v) for k, v in vars(config).items()}
    processes.check_same(given | {name.replace("_", " "): value for name, value in more.items()})


def goes_on(config: TrainConfig) -> bool:
    """Whether torchrun repeats the command of a run that has its checkpoint already."""
    from . import checkpoint
    from .torchrun import job

    if job() is None or not (config.out.is_dir() and checkpoint.files(config.out)):
        return False
    saved = complete(saved_config(config.out))
    _, info = checkpoint.read(config.out, prefix="none.", quiet=True)
    return restarted(config, saved, info, job())


def saved_config(path: str | os.PathLike) -> TrainConfig:
    """The configuration that a run was trained with, set to resume it."""
    return TrainConfig(**saved_options(path, TrainConfig))


def interpreter() -> str:
    """The running Python, as one would type it here."""
    path = Path(sys.executable)
    return shlex.quote(os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path))


def command(args: Sequence[str] | None) -> None:
    config = cli.parse(TrainConfig, PROG, args)
    if config.fsdp and "WORLD_SIZE" not in os.environ:  # a run that had it may go on without
        raise ValueError(
            "--fsdp shares out the weights between several processes, and this is one alone: start "
            f"with torchrun --nproc-per-node=N -m {PROG.split()[-1]} …, or leave --fsdp out"
        )
    if config.resume is not None:
        # Read again with the run's own configuration as defaults: what differs now was typed.
        saved = saved_config(config.resume)
        config = cli.parse(TrainConfig, PROG, args, default=saved)
        check_resume(config, saved)
    folder = train(config)
    if os.environ.get("RANK", "0") != "0":  # torchrun's other processes
        return
    if config.samples:
        print(f"samples      {folder / 'samples.png'}")
        print(f"x_T … x_0    {folder / 'strip.png'}")
    print(f"loss         {folder / 'loss.png'}")
    python = "python" if shutil.which("python") == sys.executable else interpreter()
    print("try next:")
    config, run = complete(config), shlex.quote(str(folder))
    steps = min(50, config.timesteps)
    print(
        f"  {python} -m engine.sample {run} --sampler ddim --steps {steps} --seed 7 --out grid.png"
    )
    print(f"  {python} -m engine.train --resume {run} --steps {2 * config.steps}")


def main(args: Sequence[str] | None = None) -> int:
    return cli.main(command, args)


if __name__ == "__main__":
    sys.exit(main())

"""The loop: it learns, survives NaN, and leaves its files."""

import itertools
import math
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from training import config, resumed, rows_of, weights

import engine
from engine import checkpoint, data, diffusion
from engine import train as command
from engine.train import TrainConfig, train
from engine.trainer import STREAK, Diverged, Trainer

LEARNED = {"preset": "cifar10", "variance": "learned_range", "loss": "hybrid"}
LOSS_AWARE = {"t_sampler": "loss-aware", "timesteps": 4, "batch": 8}


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_history_gets_the_unweighted_losses_of_the_step(work, accumulate):
    images = data.open_dataset(str(work / "pictures"), size=8)
    c = config(work, **LOSS_AWARE, accumulate=accumulate, lr=1e-9)
    torch.manual_seed(0)
    model = engine.UNet.from_preset("cifar10", dropout=0.0)
    trainer = Trainer(c, model, command.new_diffusion(c), images, work)
    for t in range(4):  # warm, with losses unlike those to come
        trainer.t_sampler.update(torch.full((10,), t), torch.full((10,), 10.0**-t))
    trainer.t_sampler.counts.fill_(10)
    x, y = data.batch(images, 0, 8, seed=0)
    seen, real = [], trainer.diffusion.loss

    def loss(model, x0, **options):
        found = real(model, x0, **options)
        seen.append((options["t"], found.detach()))
        return found

    trainer.diffusion.loss = loss
    p = trainer.t_sampler.probabilities()
    row = trainer.train_step(x, y)
    t, losses = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert len(seen) == accumulate and len(t) == 8
    assert (trainer.t_sampler.counts - 10).tolist() == torch.bincount(t, minlength=4).tolist()
    for step in t.unique().tolist():
        mine = losses[t == step].double()
        kept = trainer.t_sampler.losses[step]
        assert torch.equal(kept[: len(mine)], mine[-10:])
    assert row["loss"] == pytest.approx((losses / (4 * p[t])).mean().item(), rel=1e-5)
    assert trainer.drawn == []


def test_a_skipped_step_leaves_the_history(work):
    images = data.open_dataset(str(work / "pictures"), size=8)
    c = config(work, **LOSS_AWARE)
    trainer = Trainer(c, engine.UNet.from_preset("cifar10"), command.new_diffusion(c), images, work)
    x, y = data.batch(images, 0, 8, seed=0)
    trainer.train_step(x * math.nan, y)
    assert not trainer.t_sampler.counts.any() and trainer.drawn == []
    trainer.train_step(x, y)
    assert trainer.t_sampler.counts.sum() == 8


@pytest.mark.parametrize("loss", ["hybrid", "l2_vlb", "vlb", "rescaled_vlb"])
def test_a_learned_variance_trains_and_draws(work, loss):
    run = train(config(work, **LEARNED | {"loss": loss}, samples=4, timesteps=4000, steps=3))
    assert (run / "samples.png").is_file()
    model, diffusion, _ = engine.load(run)
    assert model.config["out_channels"] == 2 * model.config["in_channels"]
    assert (diffusion.variance, diffusion.loss_type, diffusion.T) == ("learned_range", loss, 4000)
    assert engine.sample(model, diffusion, (1, 1, 8, 8), steps="2,2").isfinite().all()
    x0 = torch.rand(1, 1, 8, 8) * 2 - 1
    assert diffusion.respaced(4).bits_per_dim(model, x0).total.isfinite().all()


def test_the_bound_falls_while_training(work):
    """Towards the 8 bits that the random pictures have."""
    options = {**LEARNED, "loss": "vlb", "batch": 16, "lr": 2e-3, "steps": 60}
    trained = engine.load(train(config(work, out=work / "long", **options)))
    fresh = engine.load(train(config(work, out=work / "short", **options | {"steps": 1})))
    images = data.open_dataset(str(work / "pictures"), size=8)
    x0, _ = data.batch(images, 0, 8, seed=0)
    bits = [run[1].bits_per_dim(run[0], x0).total.mean().item() for run in (fresh, trained)]
    assert 7.5 < bits[1] < bits[0] - 0.15


def test_the_command_line_knows_the_losses_of_the_diffusion(work):
    """The same names, and the same pairs of variance and loss that do not go together."""
    names = [get_args(get_type_hints(TrainConfig)[name]) for name in ("variance", "loss")]
    assert names[0] == diffusion.VARIANCES and set(names[1]) == set(diffusion.LOSSES)
    x0 = torch.zeros(1, 1, 4, 4)
    for variance, loss in itertools.product(*names):
        c = config(work, variance=variance, loss=loss, decay=0.0)

        def model(x, t, channels=2 if variance == "learned_range" else 1):
            return torch.zeros_like(x).repeat(1, channels, 1, 1)

        try:
            command.new_diffusion(c).loss(model, x0)
        except ValueError:
            with pytest.raises(ValueError, match="--variance learned_range"):
                train(c)
        else:
            command.validate(c)
    assert not (work / "run").exists()


def test_accumulation_is_the_mean_over_the_batch(work, monkeypatch):
    """With the same t, noise and no dropout, pieces give the gradient of the whole batch."""
    images = data.open_dataset(str(work / "pictures"), size=8)
    gradients = []
    for accumulate in (1, 4):
        torch.manual_seed(0)
        model = engine.UNet.from_preset("cifar10", dropout=0.0)
        c = config(work, accumulate=accumulate, precision="fp32", lr=1e-9)
        trainer = Trainer(c, model, command.new_diffusion(c), images, work)
        fixed = lambda x0, y, index, t=trainer: t.diffusion.loss(  # noqa: E731
            t.model, x0, t=torch.full((len(x0),), 7), noise=x0.flip(3)
        )
        monkeypatch.setattr(trainer, "loss", fixed)
        row = trainer.train_step(*data.batch(images, 0, 4, seed=0))
        gradients.append(row["grad_norm"])
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-5)


def test_learns_and_ema_follows(work):
    run = train(
        config(work, steps=80, batch=16, lr=2e-3, prediction="eps", samples=4, sample_every=50)
    )
    rows = rows_of(run)
    first = np.mean([row["loss"] for row in rows[:10]])
    last = np.mean([row["loss"] for row in rows[-10:]])
    assert last < 0.7 * first
    assert rows[0]["lr"] == pytest.approx(1e-3) and rows[-1]["lr"] == pytest.approx(2e-3)
    tensors = weights(run)
    name = "conv_in.weight"
    assert not torch.equal(tensors[f"ema.{name}"], tensors[f"model.{name}"])
    assert torch.allclose(tensors[f"ema.{name}"], tensors[f"model.{name}"], atol=0.1)
    made = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert made == {
        *("checkpoint.safetensors", "checkpoint.step_000000.safetensors"),
        *("metrics.jsonl", "samples/step_000050.png"),
        *("samples.png", "strip.png", "loss.png"),
    }


def test_ema_is_the_average_that_its_equation_says(work):
    images = data.open_dataset(str(work / "pictures"), size=8)
    c = config(work, ema=0.3)
    trainer = Trainer(c, engine.UNet.from_preset("cifar10"), command.new_diffusion(c), images, work)
    name = "conv_out.weight"
    expected = trainer.parameters[name].detach().clone()
    for step in range(6):
        trainer.train_step(*data.batch(images, step, 4, seed=0))
        decay = min(0.3, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * trainer.parameters[name].detach()
    torch.testing.assert_close(trainer.ema[name], expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_steps_with_nan_are_skipped_and_counted(work, monkeypatch, capsys, bad):
    real = Trainer.loss

    def loss(self, x0, y, index):
        return real(self, x0, y, index) * (bad if index in (2, 3) else 1.0)

    monkeypatch.setattr(Trainer, "loss", loss)
    run = train(config(work, steps=6))
    rows = rows_of(run)
    assert [row["skipped"] for row in rows] == [0, 0, 1, 2, 2, 2]
    assert rows[2]["loss"] is None and rows[5]["loss"] > 0
    assert "step 3: loss" in capsys.readouterr().err
    tensors, info = checkpoint.read(run)
    assert info["skipped"] == 2 and info["step"] == 6
    assert all(bool(t.isfinite().all()) for t in tensors.values())
    steps = {float(t) for k, t in tensors.items() if k.startswith("optimizer.step.")}
    assert steps == {4.0}


def test_a_skipped_step_changes_nothing(work):
    images = data.open_dataset(str(work / "pictures"), size=8)
    c = config(work)
    trainer = Trainer(c, engine.UNet.from_preset("cifar10"), command.new_diffusion(c), images, work)
    x, y = data.batch(images, 0, 4, seed=0)
    trainer.train_step(x, y)
    before = {k: p.detach().clone() for k, p in trainer.parameters.items()}
    averages = {k: p.clone() for k, p in trainer.ema.items()}
    trainer.train_step(x * math.nan, y)
    assert all(torch.equal(before[k], p) for k, p in trainer.parameters.items())
    assert all(torch.equal(averages[k], p) for k, p in trainer.ema.items())
    assert trainer.guard.skipped == 1 and trainer.guard.streak == 1 and trainer.step == 2


def test_a_streak_of_nan_ends_with_advice(work, monkeypatch):
    real = Trainer.loss

    def loss(self, x0, y, index):
        return real(self, x0, y, index) * (math.nan if index >= 4 else 1.0)

    monkeypatch.setattr(Trainer, "loss", loss)
    with pytest.raises(Diverged, match=r"--lr \(now 0.001\)") as error:
        train(config(work, steps=100, save_every=2))
    assert f"{STREAK} steps in a row" in str(error.value) and error.value.code == 1
    tensors, info = checkpoint.read(work / "run")
    assert info["step"] <= 4 + STREAK and all(bool(t.isfinite().all()) for t in tensors.values())


def test_steps_below_those_done_are_refused(work):
    train(config(work))
    before = (work / "run" / checkpoint.FILE).read_bytes()
    with pytest.raises(ValueError, match=r"--steps 5 is less than the 6 steps that .*run has done"):
        train(resumed(work / "run", steps=5))
    assert (work / "run" / checkpoint.FILE).read_bytes() == before
    train(resumed(work / "run", steps=6))  # nothing to do


def test_the_checkpoint_is_the_first_file_of_a_run(work, monkeypatch):
    """What is killed at any moment leaves a run to resume, or no file of one."""
    monkeypatch.setattr("engine.trainer.Log", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(config(work))
    assert [path.name for path in (work / "run").iterdir()] == [checkpoint.FILE]


def test_class_conditional_run(work):
    run = train(config(work, classes=True, label_dropout=0.25, samples=4))
    model, _, info = engine.load(run)
    assert model.config["num_classes"] == 2 and info["classes"] == ["a", "b"]
    assert model.null_label == 2 and model.config["label_dropout"] == 0.25


def test_labels_are_dropped_once_and_by_the_model_itself_afterwards(work, monkeypatch):
    """The trainer does in its steps, for all processes; the model for whoever trains it then."""
    images = data.open_dataset(str(work / "pictures"), size=8, labels=True)
    c = config(work, classes=True, label_dropout=1.0)
    model = command.new_model(c, 8, 1, 2)
    trainer = Trainer(c, model, command.new_diffusion(c), images, work)
    seen, real = [], engine.UNet.drop_labels
    monkeypatch.setattr(
        engine.UNet, "drop_labels", lambda *args: seen.append(model.drops_labels) or real(*args)
    )
    x, y = data.batch(images, 0, 4, seed=0)
    trainer.train_step(x, y)
    assert seen == [True] and model.drops_labels
    with pytest.raises(ValueError, match="multiples of 2"):
        trainer.loss(x[:, :, :7], y, 0)
    assert model.drops_labels
    model(x, torch.zeros(4), y)
    assert len(seen) == 3  # the two by the trainer, this one by the model


def test_learning_rate_warms_up_and_decays(work):
    images = data.open_dataset(str(work / "pictures"), size=8)
    c = config(work, steps=100, warmup=10, lr=1.0, decay=0.5)
    trainer = Trainer(c, engine.UNet.from_preset("cifar10"), command.new_diffusion(c), images, work)
    rates = [trainer.learning_rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert set(rates[10:51]) == {1.0} and rates[75] == pytest.approx(0.5) and rates[99] < 0.01


def test_tensorboard_log(work):
    pytest.importorskip("tensorboard")
    run = train(config(work, tensorboard=True, sample_every=3))
    assert list((run / "tensorboard").glob("events.*"))

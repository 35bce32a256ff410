"""What the guard makes of NaN, overflow, spikes and a gradient's scale, and what it writes."""

import importlib
import json
import math
import random

import pytest
import torch
from training import config, events_of, resumed, rows_of, weights

import engine
from engine import checkpoint, data, device, guard
from engine import train as command
from engine.guard import PAUSE, STREAK, Guard, not_finite
from engine.train import train
from engine.trainer import Diverged, Trainer

CPU = torch.device("cpu")
NAME = "conv_out.weight"


def new(precision=torch.float32, lines=None) -> Guard:
    return Guard(CPU, precision, [].append if lines is None else lines.append)


def new_trainer(work, **changes) -> Trainer:
    c = config(work, **changes)
    images = data.open_dataset(c.dataset, size=8)
    torch.manual_seed(0)
    model = engine.UNet.from_preset("cifar10", dropout=0.0)
    return Trainer(c, model, command.new_diffusion(c), images, work)


# --- spikes -------------------------------------------------------------------------------------


def usual_losses(n: int, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [0.3 * rng.lognormvariate(0, 0.1) for _ in range(n)]


def test_a_spike_is_the_loss_that_its_formula_says():
    judge, losses = new(), usual_losses(230)
    for step, loss in enumerate(losses, 1):
        assert judge.judge(step, loss, 1.0) and judge.event is None
    recent = torch.tensor(losses[-200:], dtype=torch.float64)
    median, q95 = recent.quantile(0.5).item(), recent.quantile(0.95).item()
    limit = median + 4 * (q95 - median)
    assert judge.usual() == pytest.approx((median, limit)) and 1.4 < limit / median < 2
    assert judge.judge(231, limit * 0.999, 1.0) and judge.event is None
    limit = judge.usual()[1]
    assert judge.judge(232, limit * 1.001, 7.0)  # it counts all the same
    assert judge.event == {
        "event": "spike",
        "loss": limit * 1.001,
        "usual": pytest.approx(median, rel=1e-2),
        "grad_norm": 7.0,
    }
    assert judge.skipped == judge.streak == 0


def test_no_spike_among_the_first_losses_nor_for_a_hair():
    judge = new()
    for step in range(1, 50):
        judge.judge(step, 0.3, 1.0)
    assert judge.judge(50, 1e6, 1.0) and judge.event is None  # 49 are too few
    for step in range(51, 100):
        judge.judge(step, 0.3, 1.0)
    assert judge.usual() == pytest.approx((0.3, 0.33))  # all alike: a tenth more is a spike
    judge.judge(100, 0.32, 1.0)
    assert judge.event is None
    judge.judge(101, 0.34, 1.0)
    assert judge.event["event"] == "spike"


def test_a_jump_to_another_level_is_told_some_ten_times():
    judge, lines, told = new(), [], 0
    judge.say = lines.append
    for step, loss in enumerate(usual_losses(400), 1):
        judge.judge(step, loss * (10 if step > 200 else 1), 1.0)
        told += judge.event is not None
    assert 5 <= told <= 15
    assert len(lines) == 1 and lines[0].startswith("step 201: loss 2.") and "usual" in lines[0]


def test_a_long_tail_of_losses_is_no_string_of_spikes():
    """The bound's loss: some t cost a hundred times what others do. Four MADs would be many."""
    rng, judge, found, losses = random.Random(0), new(), 0, []
    for step in range(1, 2001):
        losses.append(sum(rng.lognormvariate(0, 1.5) for _ in range(8)) / 8)
        judge.judge(step, losses[-1], 1.0)
        found += judge.event is not None
    assert 0 < found < 30
    median = torch.tensor(losses).median()
    mad = (torch.tensor(losses) - median).abs().median() * 1.4826
    assert (torch.tensor(losses) > median + 4 * mad).sum() > 90


def test_lines_on_the_screen_have_a_pause():
    lines = []
    judge = new(lines=lines)
    for step in range(1, 101):
        judge.judge(step, math.nan if step % 3 else 0.3, 1.0)
    assert len(lines) == math.ceil(100 / (PAUSE + 1)) and judge.skipped == 67
    assert lines[0] == "step 1: loss nan, gradient norm 1: step skipped"
    assert lines[1].endswith(f"({lines_between(1, 22)} more since step 1: events.jsonl)")


def lines_between(first: int, following: int) -> int:
    return sum(step % 3 > 0 for step in range(first + 1, following))


# --- non-finite ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_skips_and_leaves_what_is_usual(bad):
    judge = new()
    for step, loss in enumerate(usual_losses(60), 1):
        judge.judge(step, loss, 1.0)
    before = judge.usual()
    assert not judge.judge(61, bad, 1.0) and judge.streak == 1
    assert not judge.judge(62, 0.3, abs(bad)) and judge.streak == judge.skipped == 2
    assert judge.event["event"] == "skipped" and judge.event["usual"] == before[0]
    assert judge.usual() == before
    assert judge.judge(63, 0.3, 1.0) and (judge.streak, judge.skipped) == (0, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_one_bad_element_of_a_gradient_makes_the_norm_so(work, value):
    """Of any parameter, at any place; 1e30 is finite, but its square is not: the step is skipped
    like the others, for AdamW's second moment would be infinite and stay so."""
    trainer = new_trainer(work, precision="fp32")
    x, y = data.batch(trainer.images, 0, 4, seed=0)
    names = list(trainer.parameters)
    for name in (names[0], names[len(names) // 2], names[-1]):

        def spoil(gradient):
            gradient = gradient.clone()
            gradient.view(-1)[-1] = value
            return gradient

        hook = trainer.parameters[name].register_hook(spoil)
        row = trainer.train_step(x, y)
        hook.remove()
        assert not math.isfinite(row["grad_norm"]) and math.isfinite(row["loss"])
    assert trainer.guard.skipped == 3 and not trainer.optimizer.state
    trainer.train_step(x, y)
    assert trainer.guard.streak == 0
    assert not_finite(trainer.parameters.items()) == not_finite(trainer.ema.items()) == ""


def test_a_run_with_nan_gradients_finishes_and_says_where(work, monkeypatch, capsys):
    """The skip is in metrics.jsonl, off the beat of log_every too, and its pictures in events."""
    real = Trainer.loss

    def loss(self, x0, y, index):
        value = real(self, x0, y, index)
        if index == 5:  # the loss stays finite, the slope of the square root at 0 does not
            value = value + (0 * self.parameters[NAME].sum()).sqrt()
        return value

    monkeypatch.setattr(Trainer, "loss", loss)
    run = train(config(work, steps=20, log_every=10, precision="fp32", seed=3))
    assert [row["step"] for row in rows_of(run)] == [6, 10, 20]
    assert rows_of(run)[0]["grad_norm"] is None and rows_of(run)[0]["skipped"] == 1
    (event,) = events_of(run)
    pictures = data.order(24, 3, 20, 4).tolist()
    names = sorted(p.relative_to(work / "pictures") for p in (work / "pictures").rglob("*.png"))
    files = [names[number].as_posix() for number in pictures]
    expected = {"step": 6, "event": "skipped", "loss": rows_of(run)[0]["loss"], "usual": None}
    expected |= {"grad_norm": None, "pictures": pictures, "files": files}
    assert event == expected and event["loss"] > 0
    assert "step 6: loss 0." in capsys.readouterr().err
    assert not_finite(weights(run).items()) == "" and checkpoint.read(run)[1]["step"] == 20


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_steps_of_a_streak_are_logged_before_training_gives_up(work, monkeypatch, precision):
    """What is advised can be done: --resume takes another --precision, and no other --lr."""
    monkeypatch.setattr(
        Trainer, "loss", lambda self, x0, y, index: self.parameters[NAME].sum() * math.nan
    )
    with pytest.raises(Diverged, match=f"{STREAK} steps in a row .* new run with a lower") as error:
        train(config(work, steps=50, precision=precision))
    assert ("--resume" in str(error.value)) == (precision != "fp32")
    steps = list(range(1, STREAK + 1))
    assert [e["step"] for e in events_of(work / "run")] == steps
    assert [row["step"] for row in rows_of(work / "run")] == steps


def test_a_streak_goes_on_after_a_resume(work, monkeypatch):
    monkeypatch.setattr(
        Trainer, "loss", lambda self, x0, y, index: self.parameters[NAME].sum() * math.nan
    )
    run = train(config(work, steps=STREAK - 2))
    with pytest.raises(Diverged):
        train(resumed(run, steps=50))
    assert len(events_of(run)) == STREAK


def test_weights_that_are_not_finite_are_not_saved(work, monkeypatch):
    """Neither they nor their average come over the last good ones, whatever asks for a save."""
    run = train(config(work, steps=2))
    good = (run / checkpoint.FILE).read_bytes()
    real = Trainer.decay

    def decay(self):
        if self.step == 3:  # the fourth step's
            self.ema["conv_out.bias"][0] = math.nan
        return real(self)

    monkeypatch.setattr(Trainer, "decay", decay)
    with pytest.raises(Diverged, match=r"ema.conv_out.bias is not finite after step 6, which is n"):
        train(resumed(run, steps=6))
    assert (run / checkpoint.FILE).read_bytes() == good


def test_broken_weights_end_the_run_at_the_first_skip(work):
    """No later step could be finite: nine more would say nothing."""
    run = work / "run"
    with pytest.raises(Diverged, match=r"is not finite at step \d+: .* lower --lr \(now 1e\+38"):
        train(config(work, lr=1e38, warmup=0, steps=50, clip=1e3))
    assert len(events_of(run)) == 1 and checkpoint.read(run)[1]["step"] == 0


# --- float16 ------------------------------------------------------------------------------------


def fp16(work, **changes) -> Trainer:
    return new_trainer(work, precision="fp16", **changes)


def test_auto_is_never_fp16(monkeypatch):
    assert device.choose_precision("fp16", CPU) == torch.float16
    for fast in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, f=fast, **k: f)
        for place in (CPU, torch.device("cuda")):
            assert device.choose_precision("auto", place) != torch.float16


def test_fp16_clips_the_unscaled_gradient(work):
    """Norm and loss are those of float32 to float16's rounding, whatever the scale."""
    norms = []
    for precision, scale in (("fp32", None), ("fp16", 1024.0), ("fp16", 16.0)):
        trainer = new_trainer(work, precision=precision)
        if scale:
            trainer.guard.load_state_dict({"scale": torch.tensor(scale), "growth": torch.tensor(0)})
        row = trainer.train_step(*data.batch(trainer.images, 0, 4, seed=0))
        norms.append(row["grad_norm"])
        assert trainer.guard.scaler.is_enabled() == (precision == "fp16")
        moment = trainer.optimizer.state[trainer.parameters["conv_out.bias"]]["exp_avg"]
        norms[-1] = (row["grad_norm"], moment.norm().item())
    for norm in norms[1:]:
        assert norm == pytest.approx(norms[0], rel=5e-3)


def test_fp16_learns_as_float32_does(work):
    losses = []
    for precision in ("fp32", "fp16"):
        out = work / precision
        run = train(config(work, out=out, precision=precision, steps=20, lr=2e-3, prediction="eps"))
        losses.append([row["loss"] for row in rows_of(run)])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2) and losses[1] != losses[0]
    assert weights(run)["guard.scale"].item() == 2**16


def test_a_scale_that_overflows_is_halved_and_is_no_streak(work):
    """From far too large a scale, more steps than a streak has are skipped, then it trains."""
    trainer = fp16(work)
    trainer.guard.load_state_dict({"scale": torch.tensor(2.0**60), "growth": torch.tensor(5)})
    batch = data.batch(trainer.images, 0, 4, seed=0)
    for _ in range(60):
        trainer.train_step(*batch)
        trainer.give_up()
        if not trainer.guard.event:
            break
        assert trainer.guard.event["event"] == "skipped" and trainer.guard.streak == 0
    assert trainer.guard.skipped > STREAK and trainer.guard.event is None
    scale = trainer.guard.state_dict()["scale"].item()
    assert scale == 2.0 ** (60 - trainer.guard.skipped)
    assert not_finite(trainer.parameters.items()) == ""


def test_at_its_lowest_the_scale_is_no_excuse():
    judge = new(torch.float16)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
    steps = 0
    for steps in range(1, 100):
        optimizer.param_groups[0]["params"][0].grad = torch.tensor([math.inf])
        scale = judge.scale(CPU).item()
        judge.scaler.unscale_(optimizer)
        judge.judge(steps, 0.3, math.inf, scale)
        if judge.streak == STREAK:
            break
    assert steps == 16 + STREAK and judge.scale(CPU).item() == 1.0


@pytest.mark.parametrize("loss, norm, after", [(0.3, 1.0, 8), (math.nan, math.nan, 8),
                                               (0.3, math.inf, 4), (0.3, math.nan, 4)])  # fmt: skip
def test_what_the_scale_does_after_a_step(loss, norm, after):
    """A forward pass that overflows does so at any scale; a norm may overflow alone."""
    p = torch.nn.Parameter(torch.zeros(1))
    for gradient in (1.0, norm):  # the scaler sees the overflow itself, or not
        judge = new(torch.float16)
        judge.load_state_dict({"scale": torch.tensor(8.0), "growth": torch.tensor(1)})
        p.grad = torch.tensor([gradient])
        assert judge.scale(CPU).item() == 8
        judge.scaler.unscale_(torch.optim.SGD([p]))
        judge.judge(1, loss, norm, 8.0)
        assert judge.scale(CPU).item() == after
        assert judge.state_dict()["growth"] == (2 if after == 8 and math.isfinite(loss) else 0)
        assert (judge.streak == 1) == math.isnan(loss)


def test_fp16_samples(work):
    run = train(config(work, precision="fp16", samples=4, steps=2))
    assert (run / "samples.png").is_file()
    out = work / "grid.png"
    command = importlib.import_module("engine.sample").command  # engine.sample is a function
    command([str(run), "--n", "4", "--steps", "3", "--precision", "fp16", "--out", str(out)])
    assert out.is_file()


# --- the log ------------------------------------------------------------------------------------


def test_an_events_row_is_json_whatever_it_holds(work):
    from engine.metrics import Log

    with Log(work, 0, False) as log:
        log.event(1, {"event": "skipped", "loss": math.nan, "grad_norm": math.inf, "pictures": [3]})
    text = (work / "events.jsonl").read_text()
    assert json.loads(text) == {
        "step": 1,
        "event": "skipped",
        "loss": None,
        "grad_norm": None,
        "pictures": [3],
    }
    with open(work / "events.jsonl", "a") as file:
        file.write('{"step": 2, "eve')  # cut short
    with Log(work, 1, False):
        assert (work / "events.jsonl").read_text() == text
    with Log(work, 0, False):
        assert not (work / "events.jsonl").exists()


def test_files_of_an_event_are_those_that_can_be_read(work):
    """In memory, decoded batch by batch, and in a part of the data set."""
    (work / "pictures" / "a" / "12.png").write_bytes(b"no picture")
    whole = data.open_dataset(str(work / "pictures"), size=8)
    names = [whole.file(i) for i in range(len(whole))]
    assert len(names) == 23 and "a/12.png" not in names and names[0] == "a/0.png"
    one_by_one = data.open_dataset(str(work / "pictures"), size=8, memory_limit=0)
    assert len(one_by_one) == 24 and one_by_one.file(1) == "a/10.png"
    assert data.subset(whole, torch.tensor([5, 2])).file(0) == names[5]
    row = guard.event_row({"event": "spike"}, whole, 0, 3, 20)
    assert len(row["pictures"]) == 20 and row["files"] == [names[i] for i in row["pictures"][:8]]

"""Weights in bfloat16 beside their masters: autocast's numbers, and never an old weight."""

import copy
import math
import pickle

import pytest
import torch
from small_unet import SMALL, alive, inputs
from torch import nn
from training import assert_same_run, config, resumed, weights

import engine
from engine import checkpoint, data, dispatch, trainer
from engine import train as command
from engine.blocks import Conv2d, Linear
from engine.low_weights import Low, LowWeights
from engine.optimizer import AdamW
from engine.train import train
from engine.trainer import Trainer
from engine.update import OnePass, Update, choose_update

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(
    bool(dispatch.absence("adamw", "native")), reason="the extension is not built"
)


def pair(**options):
    """Two equal models with their updates: with weights in bfloat16, and without."""
    torch.manual_seed(0)
    model = alive(engine.UNet(**SMALL | options))
    models = [model, copy.deepcopy(model)]
    found = []
    for m, low in zip(models, (True, False), strict=True):
        averages = {name: p.detach().clone() for name, p in m.named_parameters()}
        optimizer = AdamW(m.parameters(), lr=1e-3, fused=True)
        found.append((m, choose_update(optimizer, averages, 1.0, m if low else None)))
    return found


def step(model, update, change=lambda model: None, step=True) -> torch.Tensor:
    """The loss of a step; `change` comes between what makes the weights ready and their use."""
    x, t, y = inputs(model)
    with update.weights(), torch.autocast("cpu", BF16):
        change(model)
        loss = model.train()(x, t, y).float().square().mean()
        loss.backward()
    update.norm()
    if step:
        update.step(0.1)
    update.zero_grad()
    return loss.detach()


def used(model) -> set[torch.dtype]:
    """The dtypes of the weights that convolutions and projections take."""
    return {m.low.of(m)[0].dtype for m in model.modules() if getattr(m, "low", None)}


def equal(one, other) -> None:
    (m, update), (n, plain) = one, other
    for p, q in zip(m.parameters(), n.parameters(), strict=True):
        assert p.dtype == torch.float32 and torch.equal(p, q)
        mine, theirs = update.optimizer.state[p], plain.optimizer.state[q]
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert all(torch.equal(update.averages[k], v) for k, v in plain.averages.items())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conditioning": "scale_shift", "resample": "biggan", "num_classes": 5},
        {"asymmetric_padding": True, "dropout": 0.3},
    ],
)
def test_autocast_s_bits(options):
    found = pair(**options)
    names = [name for name, _ in found[0][0].named_parameters()]
    assert names == [name for name, _ in found[1][0].named_parameters()]
    for k in range(4):
        losses = []
        for model, update in found:
            torch.manual_seed(k)
            losses.append(step(model, update))
        assert torch.equal(*losses)
    equal(*found)
    model, update = found[0]
    layers = [m for m in model.modules() if isinstance(m, (Conv2d, Linear))]
    assert len(update.lows.pairs) == 2 * len(layers) > 20
    for low, master in update.lows.pairs:
        assert torch.equal(low.tensor, master.to(BF16)) and low.tensor.grad is None
        assert low.stands_for(master)
    assert model.state_dict().keys() == found[1][0].state_dict().keys()


def scale(model):
    with torch.no_grad():
        model.conv_in.weight.mul_(1.5)


def load(model):
    model.load_state_dict({k: 0.9 * v for k, v in model.state_dict().items()})


def swap(model):
    for layer in (model.conv_in, model.mid_block_1.temb_proj):
        layer.weight.data = layer.weight.data * 0.5


def swap_again_and_again(model):
    """Freed memory may come again at the same address."""
    for factor in (2.0, 0.25, 3.0):
        model.conv_in.weight.data = model.conv_in.weight.data.clone() * factor


def move(model):
    model.to(torch.float64).to(torch.float32).conv_in.bias.data.add_(1)


def other_layout(model):
    model.conv_in.weight.data = 2 * model.conv_in.weight.data.contiguous()


CHANGES = [scale, load, swap, swap_again_and_again, move, other_layout]


@pytest.mark.parametrize("between", [True, False], ids=["between steps", "before the forward pass"])
@pytest.mark.parametrize("change", CHANGES)
def test_no_old_weight(change, between):
    found = pair()
    losses = []
    for model, update in found:
        step(model, update)
        if between:
            change(model)
        mine = [step(model, update, (lambda m: None) if between else change)]
        mine.append(step(model, update))
        losses.append(torch.stack(mine))
        for low, master in update.lows.pairs if update.lows else ():
            assert torch.equal(low.tensor, master.to(BF16))
    assert torch.equal(*losses)
    equal(*found)


def test_no_other_tensor_gets_the_address():
    """Freed memory comes again at the same address, and `p.data = …` counts no version."""
    p = nn.Parameter(torch.zeros(64))
    low = Low(p)
    p.data = torch.ones(32)
    others = [torch.ones(64) for _ in range(50)]
    assert low.address not in {t.data_ptr() for t in others} and not low.stands_for(p)
    low.refresh(p)
    assert low.stands_for(p) and torch.equal(low.tensor, p.to(BF16))


def test_a_parameter_that_was_exchanged():
    model, update = pair()[0]
    step(model, update)
    model.conv_in.weight = nn.Parameter(torch.zeros_like(model.conv_in.weight))
    model.conv_in.bias = None
    x = torch.ones(1, 2, 8, 8)
    with update.weights(), torch.autocast("cpu", BF16):
        assert not model.conv_in(x).any()
    with update.weights(), torch.autocast("cpu", BF16):
        model.conv_in.weight.data = torch.ones_like(model.conv_in.weight)
        assert model.conv_in(x).any()


def test_where_the_masters_serve():
    """Outside of `with`, while sampling, and where autocast would not cast to bfloat16."""
    model, update = pair()[0]
    x, t, _ = inputs(model)
    assert used(model) == {torch.float32}
    with update.weights():
        assert used(model) == {torch.float32}
        with torch.autocast("cpu", BF16):
            assert used(model) == {BF16}
            with torch.no_grad():
                assert used(model) == {torch.float32}
            assert used(model.eval()) == {torch.float32}
            model.train()
            with torch.autocast("cpu", enabled=False):
                assert used(model) == {torch.float32}
        with torch.autocast("cpu", torch.float16):
            assert used(model) == {torch.float32}
    copied = copy.deepcopy(model)
    assert copied.conv_in.low is None and pickle.loads(pickle.dumps(copied)).conv_in.low is None
    assert pickle.loads(pickle.dumps(model)).conv_in.low is None
    with torch.autocast("cpu", BF16):
        model(x, t).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_gradient_that_somebody_waits_for():
    """A layer whose parameter has a hook computes with the parameter."""
    seen = []
    found = pair()

    def triple(p):
        p.grad.mul_(3)

    for model, update in found:
        hook = model.conv_in.weight.register_hook(lambda g: seen.append(g.dtype) or 2 * g)
        late = model.conv_out.bias.register_post_accumulate_grad_hook(triple)
        step(model, update)
        hook.remove()
        late.remove()
        step(model, update)
    assert seen == [torch.float32] * 2
    equal(*found)


def test_both_have_a_part_of_a_gradient():
    """A weight that is changed between two forward passes of one step."""
    parts = []
    for model, update in pair():
        x, t, _ = inputs(model)
        with update.weights(), torch.autocast("cpu", BF16):
            model.train()(x, t).float().square().mean().backward()
            scale(model)
            torch.clear_autocast_cache()  # it does not ask whether a weight has changed
            model(x, t).float().square().mean().backward()
        update.norm()
        parts.append([g.float() for g in update.grads])
        update.step(0.1)
        update.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        assert all(low.tensor.grad is None for low, _ in (update.lows.pairs if update.lows else ()))
    number = [name for name, _ in model.named_parameters()].index("conv_in.weight")
    assert torch.equal(*(grads[number] for grads in parts))
    for mine, theirs in zip(*parts, strict=True):  # elsewhere bfloat16 was added to bfloat16
        assert (mine - theirs).norm() <= 0.01 * theirs.norm()


def test_layers_that_share_a_weight():
    """Both gradients count; they are summed in bfloat16."""
    norms = []
    for model, update in pair():
        model.mid_block_1.conv2.weight = model.mid_block_2.conv2.weight
        x, t, y = inputs(model)
        with update.weights(), torch.autocast("cpu", BF16):
            model.train()(x, t, y).float().square().mean().backward()
        shared = [p is model.mid_block_2.conv2.weight for p in update.parameters].index(True)
        update.norm()
        norms.append((update.grads if update.lows else [p.grad for p in update.parameters])[shared])
    low, plain = norms
    assert (low - plain).norm() < 0.02 * plain.norm()


def test_a_weight_that_is_computed_from_others():
    """Their gradients pass through it, be it kept for several forward passes or not."""
    found = []
    for model, _ in pair():
        torch.nn.utils.parametrizations.weight_norm(model.mid_block_1.conv1)
        averages = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = AdamW(model.parameters(), lr=1e-3, fused=True)
        update = choose_update(optimizer, averages, 1.0, None if found else model)
        with torch.nn.utils.parametrize.cached():
            step(model, update)
        found.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*map(dict.values, found), strict=True))


def test_a_frozen_layer_stays():
    found = pair()
    for model, update in found:
        model.conv_in.requires_grad_(False)
        step(model, update)
        model.conv_in.requires_grad_(True)
        step(model, update)
    equal(*found)


def test_a_step_that_is_left_out():
    found = pair()
    for model, update in found:
        step(model, update)
        step(model, update, step=False)
        step(model, update)
    equal(*found)


# --- the training loop --------------------------------------------------------------------------


def new_trainer(work, **changes) -> Trainer:
    c = config(work, **{"precision": "bf16"} | changes)
    torch.manual_seed(0)
    model = engine.UNet.from_preset("cifar10")
    images = data.open_dataset(str(work / "pictures"), size=8)
    return Trainer(c, model, command.new_diffusion(c), images, work)


def test_a_run_is_that_of_autocast_s_casts(work, monkeypatch, capsys):
    """Pictures are drawn between, with the average in the place of the weights; and a step with
    NaN is left out."""
    real = Trainer.loss
    options = {"precision": "bf16", "sample_every": 2, "samples": 4, "steps": 6}

    def loss(self, x0, y, index):
        return real(self, x0, y, index) * (math.nan if index == 3 else 1.0)

    monkeypatch.setattr(Trainer, "loss", loss)
    train(config(work, out=work / "low", **options))
    told = "weights of convolutions and projections in bfloat16"
    assert told in capsys.readouterr().err
    monkeypatch.setattr(trainer, "choose_update", lambda o, e, c, m: choose_update(o, e, c, None))
    train(config(work, out=work / "plain", **options))
    assert told not in capsys.readouterr().err
    assert_same_run(work / "low", work / "plain")


def test_a_run_goes_on_where_pytorch_s_update_was(work, monkeypatch):
    """Their checkpoints have the same names, and numbers that are as good as the same."""
    options = {"precision": "bf16", "clip": 1e6}  # not clipped: of the same bits on x86
    train(config(work, out=work / "ours", **options))
    train(config(work, out=work / "half", **options | {"steps": 3}))
    mine = weights(train(resumed(work / "half", steps=6)))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "choose_update", lambda o, e, c, m: Update(o, e, c))
        train(config(work, out=work / "theirs", **options | {"steps": 3}))
    found = weights(train(resumed(work / "theirs", steps=6)))
    whole = weights(work / "ours")
    assert found.keys() == mine.keys() == whole.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, whole[name])
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=0.02, atol=1e-4)
    assert checkpoint.read(work / "theirs")[1]["step"] == 6


def test_who_has_them(work, monkeypatch):
    for changes, expected in (
        ({}, True),
        ({"precision": "fp32"}, False),
        ({"precision": "fp16"}, False),
        ({"accumulate": 2}, False),
        ({"compile": True}, False),
    ):
        made = new_trainer(work, **changes)
        assert type(made.update) is OnePass and (made.update.lows is not None) == expected
    made = new_trainer(work)
    row = made.train_step(*data.batch(made.images, 0, 4, seed=0))
    assert row["grad_norm"] > 0 and used(made.model) == {torch.float32}
    assert all(p.grad is None for p in made.parameters.values())
    assert isinstance(made.update.lows, LowWeights) and not made.update.lows.on
    monkeypatch.setenv("ENGINE_BACKEND", "eager")
    made = new_trainer(work)
    assert type(made.update) is Update and made.update.lows is None

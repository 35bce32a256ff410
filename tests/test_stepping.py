"""The sampling loop's memory: written again where nobody looks, and never under anybody's hands."""

import itertools

import pytest
import torch
from small_unet import SMALL, alive
from test_samplers import curved, diffusion

import engine
from engine import samplers, stepping
from engine.embedded import Embedded

LABELS = torch.tensor([3, 0, 3])
OPTIONS = {
    "plain": {},
    "16 bits": dict(model_dtype=torch.bfloat16),
    "threshold": dict(dynamic_threshold=0.8),
    "free": dict(clip=False),
    "noise": dict(noise=torch.linspace(-2, 2, 5 * 3 * 2 * 64).reshape(5, 3, 2, 8, 8)),
    "guided": dict(y=LABELS, guidance=2.0),
    "classifier": dict(y=LABELS, classifier=lambda x, t: x.sum(3)[:, 0] + t[:, None]),
    "learned": dict(variance="learned_range"),
}


def unet(**options):
    torch.manual_seed(1)
    return alive(engine.UNet(**{**SMALL, **options})).eval()


def draw(model, sampler, steps=4, shape=(3, 2, 8, 8), variance="small", **options):
    process = diffusion(25, variance=variance)
    return engine.sample(model, process, shape, sampler=sampler, steps=steps, seed=2, **options)


@pytest.fixture
def anew(monkeypatch):
    """→ run(function): every step of it through the front door, its results in new memory."""

    def run(function):
        with monkeypatch.context() as patched:
            patched.setattr(stepping.Step, "kernels", lambda *_: None)
            return function()

    return run


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_memory_that_is_used_again_changes_nothing(anew, sampler, options):
    """The same bits in images and trajectory, and the checks made once."""
    options, shape = dict(OPTIONS[options]), {}
    if "guidance" in options:
        shape = dict(num_classes=5, label_dropout=0.5)
    if "variance" in options:
        shape = dict(out_channels=4)
    model = unet(**shape)

    def function(x, t, y=None):
        return model(x.float(), t) if model.label_embed is None else model(x, t, y)

    for net in (model, function):
        if "guidance" in options and net is not model:
            options |= dict(null_label=5)
        images, states = draw(net, sampler, trajectory=5, **options)
        expected, others = anew(lambda: draw(net, sampler, trajectory=5, **options))  # noqa: B023
        assert torch.equal(images, expected) and len(states) == 5
        assert all(torch.equal(a, b) for a, b in zip(states, others, strict=True))
        memory = {t.data_ptr() for t in (images, *states)}
        assert len(memory) == 6 and torch.equal(images, states[-1])


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_our_network_is_given_the_same_memory_in_every_step(monkeypatch, sampler, dtype):
    places, checks = [], []
    plain, checked = Embedded.__call__, stepping.Step.checked
    monkeypatch.setattr(
        Embedded, "__call__", lambda self, x, *a: places.append(x.data_ptr()) or plain(self, x, *a)
    )
    monkeypatch.setattr(stepping.Step, "checked", lambda *args: checks.append(1) or checked(*args))
    draw(unet(), sampler, model_dtype=dtype, prepack=True)
    assert len(places) == 4 and len(set(places[1:])) == 1
    assert len(checks) == 1


@pytest.mark.parametrize("how", ["function", "16 bits", "hook", "hook inside", "hook on all"])
@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_what_somebody_kept_stays_as_it_was(sampler, how):
    kept, options, net = [], {}, unet()

    def keep(module, args, *_):
        kept.extend((t, t.clone()) for t in args if isinstance(t, torch.Tensor))

    def model(x, t):
        keep(None, (x, t))
        return net(x.float(), t)

    handle = None
    if how == "16 bits":
        options = dict(model_dtype=torch.float16)
    elif how == "hook":
        handle = net.register_forward_pre_hook(keep)
    elif how == "hook inside":
        handle = net.conv_in.register_forward_hook(keep)
    elif how == "hook on all":
        handle = torch.nn.modules.module.register_module_forward_hook(keep)
    try:
        draw(net if handle else model, sampler, **options)
    finally:
        if handle:
            handle.remove()
    assert len(kept) >= 4
    assert all(torch.equal(t, copy) for t, copy in kept)


def test_what_a_classifier_kept_stays_as_it_was():
    kept = []

    def classifier(x, t):
        kept.extend((v, v.detach().clone()) for v in (x, t))
        return x.sum(3)[:, 0]

    draw(unet(), "ddpm", y=LABELS, classifier=classifier)
    assert len(kept) == 8 and all(torch.equal(t, copy) for t, copy in kept)


def test_outputs_of_every_kind_in_turns(anew):
    """Each is looked at by itself: layout, dtype, a slice, one that the kernels do not read."""
    kinds = (
        lambda out: out,
        lambda out: out.to(memory_format=torch.channels_last),
        lambda out: out.bfloat16(),
        lambda out: torch.cat([out, out], 1)[:, : out.shape[1]],
        lambda out: out.double(),
        lambda out: out.repeat(1, 1, 1, 2)[..., ::2],
        lambda out: out[:1].expand_as(out),
    )

    def run():
        turns = itertools.cycle(kinds)
        return draw(lambda x, t: next(turns)(curved(x, t)), "dpm++", steps=25)

    assert torch.equal(run(), anew(run))


def test_a_model_that_returns_or_changes_its_input(anew):
    for model in (lambda x, t: x, lambda x, t: x.mul_(0.9), lambda x, t: x[:]):
        for sampler in ("ddim", "dpm++"):
            for dtype in (None, torch.float16):

                def run():
                    return draw(model, sampler, model_dtype=dtype)  # noqa: B023

                assert torch.equal(run(), anew(run))


def test_shapes_that_are_no_images(anew):
    for shape in ((3, 4), (2, 1, 5), (2, 1, 2, 3, 4), (0, 1, 4, 4)):

        def run():
            return draw(lambda x, t: 0.4 * x, "dpm++", shape=shape)  # noqa: B023

        assert torch.equal(run(), anew(run)) and run().shape == shape

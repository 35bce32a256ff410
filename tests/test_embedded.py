"""Embeddings made for many steps at once are those of each step."""

import pytest
import torch
from small_unet import OPTIONS, SMALL, alive, inputs

import engine
from engine import embedded
from engine.embedded import Embedded
from engine.prepacked import for_sampling, prepacked

BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
PRECISIONS = ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(not BF16, reason="no bf16"))]
LABELS = torch.tensor([3, 0, 3])


def unet(**options):
    return alive(engine.UNet(**{**SMALL, **options})).eval()


def draw(model, precision="fp32", steps=7, n=3, **options):
    process = engine.Diffusion(engine.schedules.betas("cosine", 50))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return engine.sample(model, process, (n, 2, 8, 8), steps=steps, prepack=True, **options)


@pytest.fixture
def embeds(monkeypatch):
    """Numbers of rows of the calls that made embeddings."""
    rows, plain = [], engine.UNet.embed
    monkeypatch.setattr(
        engine.UNet, "embed", lambda self, t, y=None: rows.append(len(t)) or plain(self, t, y)
    )
    return rows


CASES = {
    "ddim": ({}, dict(sampler="ddim"), [7]),
    "batch 1": ({}, dict(sampler="ddim", n=1), [7]),
    "heun": ({}, dict(sampler="heun", spacing="karras"), [7]),  # 13 calls, of 7 t
    "two": (OPTIONS["three levels"], dict(sampler="dpm++"), [7]),
    "adaptive": (dict(conditioning="scale_shift"), dict(sampler="ddpm"), [7]),
    "labels": (dict(num_classes=5), dict(sampler="ddim", y=LABELS), [14]),
    "one label": (dict(num_classes=5), dict(sampler="ddim", y=LABELS[::2], n=2), [7]),
    "guided": (
        dict(num_classes=5, label_dropout=0.5),
        dict(sampler="ddpm", y=LABELS, guidance=2.0),
        [21],
    ),
    "classifier": (
        {},
        dict(sampler="ddim", y=LABELS, classifier=lambda x, t: x.sum(3)[:, 0]),
        [7],
    ),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", CASES)
def test_images_are_those_of_single_steps(monkeypatch, embeds, case, precision):
    """However many steps there is room for; nothing is computed twice."""
    options, more, expected = CASES[case]
    model = unet(**options)
    whole = draw(model, precision, **more)
    assert embeds == expected
    per_step = expected[0] // 7
    channels = sum(m.temb_proj.out_features for m in model.modules() if hasattr(m, "temb_proj"))
    monkeypatch.setattr(embedded, "CAP", 4 * channels * per_step * 3 + 1)
    embeds.clear()
    thirds = draw(model, precision, **more)
    assert embeds == [3 * per_step, 3 * per_step, per_step]
    embeds.clear()
    monkeypatch.setattr(Embedded, "expect", lambda *_: None)
    plain = draw(model, precision, **more)
    assert len(embeds) >= 7 and set(embeds) == {more.get("n", 3) * (2 if case == "guided" else 1)}
    for found in (whole, thirds):
        # float32's products of one row are summed in another order than those of many.
        bound = 1e-4 if precision == "fp32" else 0.02
        assert (found - plain).abs().mean() <= bound * plain.abs().mean()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_row_is_of_its_step_and_label(precision):
    model = unet(num_classes=5)
    x, _, _ = inputs(model)
    x = x[:1].expand(3, -1, -1, -1)
    times = torch.tensor([40.0, 7.5, 40.0, 0.0])
    cast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with cast, torch.inference_mode():
        told, plain = for_sampling(model), for_sampling(model)
        told.expect(times, 3, LABELS)
        for t in (0.0, 40.0, 7.5, 40.0):
            t = torch.tensor(t).expand(3)
            found, expected = told(x, t, LABELS), plain(x, t, LABELS)
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
            assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
        assert told.kept == range(3)


def test_other_calls_than_expected_are_right():
    model = unet()
    x, t, _ = inputs(model)
    with torch.inference_mode():
        told = for_sampling(model)
        told.expect(torch.tensor([3, 5]), len(x))
        for n, step in ((len(x), 3), (len(x), 4), (1, 3), (len(x), 5)):
            at = torch.full((n,), step)
            assert torch.allclose(told(x[:n], at), model(x[:n], at), atol=1e-5)
        with pytest.raises(ValueError, match=r"x is .*, expected"):
            told(x[:, :1], torch.full((len(x),), 3))


def test_twins_without_one_product_are_called_as_they_are(embeds):
    """A block whose projection is somebody's own."""
    model = unet()
    model.mid_block_1.temb_proj.register_forward_hook(lambda *_: None)
    draw(model)
    assert embeds == [3] * 7
    twin = Embedded(prepacked(model, torch.float32))
    assert twin.product is None
    twin.expect(torch.tensor([1]), 3)
    assert not twin.row


def test_labels_are_checked_before_the_first_step(embeds):
    model = unet(num_classes=5)
    with pytest.raises(ValueError, match="y reaches from 0 to 5, expected 0 … 4"):
        draw(model, y=torch.tensor([0, 5, 1]))
    with pytest.raises(ValueError, match="needs y"):
        draw(model)
    assert not embeds


def test_no_images():
    assert draw(unet(), n=0).shape == (0, 2, 8, 8)

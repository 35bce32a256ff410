"""`python -m engine.sample`: what its options ask of engine.sample."""

import importlib

import pytest
import torch

import engine
from engine import checkpoint, cli, plots, schedules

SHAPE = dict(image_size=8, in_channels=1)


class Classifier(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.config = dict(SHAPE, num_classes=3) | options
        self.diffusion = engine.Diffusion(schedules.betas("linear", 30))

    def forward(self, x, t):
        return torch.stack([(k * x).sin().sum((1, 2, 3)) for k in (1, 2, 3)], 1)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(*args) → exit status; run.images what was drawn; run.model, run.classifier what by."""
    torch.manual_seed(0)
    options = dict(SHAPE, model_channels=8, channel_mult=(1,), num_groups=4)
    process = engine.Diffusion(schedules.betas("linear", 30))

    def run(*args):
        info = {"classes": ["a", "b", "c"]}
        monkeypatch.setattr(checkpoint, "load", lambda path, device: (run.model, process, info))
        monkeypatch.setattr(
            checkpoint, "load_classifier", lambda path, device: run.classifier, raising=False
        )
        given = ("runs/a", "--n", "3", "--device", "cpu", "--precision", "fp32")
        main = importlib.import_module("engine.sample").command
        return cli.main(main, [*given, "--out", str(tmp_path / "a.png"), *args])

    def unet(classes):
        net = engine.UNet(**options, num_classes=classes and classes + 1)
        torch.nn.init.normal_(net.conv_out.weight)
        net.config["num_classes"], net.null_label = classes, classes
        return net.eval()

    def expected(**options):
        options = dict(sampler="ddim", steps=30) | options
        return engine.sample(run.model, process, (3, 1, 8, 8), **options)

    monkeypatch.setattr(plots, "grid", lambda images, path: setattr(run, "images", images))
    run.unet, run.model, run.classifier, run.expected = unet, unet(3), Classifier(), expected
    return run


def test_options_of_guidance_and_of_heun(run):
    every = torch.arange(3)
    two, classifier = torch.full((3,), 2), run.classifier
    for args, options in (
        ("--guidance 2.5", dict(y=every, guidance=2.5)),
        ("--guidance 0 --label 2", dict(y=two, guidance=0.0)),
        ("--sampler heun", dict(y=every, sampler="heun", steps=18)),
        (
            "--sampler dpm++ --spacing karras --steps 5",
            dict(y=every, sampler="dpm++", spacing="karras", steps=5),
        ),
        ("--classifier runs/c", dict(y=every, classifier=classifier)),
        (
            "--classifier runs/c --classifier-scale 4 --label 2",
            dict(y=two, classifier=classifier, classifier_scale=4.0),
        ),
    ):
        assert run(*args.split()) == 0
        assert torch.equal(run.images, run.expected(**options)), args


def test_a_classifier_guides_an_unconditional_model(run):
    run.model = run.unet(None)
    assert run("--classifier", "runs/c", "--label", "2") == 0
    labels = torch.full((3,), 2)
    assert torch.equal(run.images, run.expected(y=labels, classifier=run.classifier))
    assert not torch.equal(run.images, run.expected())


def test_what_does_not_fit_is_one_sentence(run, capsys):
    def refused(*args):
        assert run(*args) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "--classifier-scale goes with --classifier only" in refused("--classifier-scale", "2")
    assert "--label 3 is none of the 3 classes" in refused("--classifier", "c", "--label", "3")
    run.classifier = Classifier(image_size=16)
    assert "c was trained with image_size 16, the model with 8" in refused("--classifier", "c")
    run.classifier = Classifier(num_classes=9)
    assert "c was trained with num_classes 9, the model with 3" in refused("--classifier", "c")
    run.classifier = Classifier()
    run.classifier.diffusion = engine.Diffusion(schedules.betas("cosine", 30))
    assert "c was trained on another noise schedule" in refused("--classifier", "c")
    assert "--guidance must be a finite number, not nan" in refused("--guidance", "nan")
    run.model.null_label = None
    assert "has no null_label: use one that was trained" in refused("--guidance", "2")
    run.model = run.unet(None)
    assert "--label needs a class-conditional model or a --class" in refused("--label", "1")
    assert "--guidance needs a class-conditional model" in refused("--guidance", "2")
    run.classifier = Classifier()
    assert "--guidance needs a class" in refused("--guidance", "2", "--classifier", "c")

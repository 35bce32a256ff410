"""The noisy classifier: its network, its training command, its checkpoint."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from budget import FORWARD, GRADIENT, assert_within_budget

import engine
from engine import checkpoint, cli, data, schedules, train_classifier
from engine.train_classifier import ClassifierConfig, Run

SMALL = dict(
    image_size=8,
    in_channels=2,
    num_classes=3,
    model_channels=16,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    head_channels=8,
    num_groups=4,
)


def classifier(**options) -> engine.Classifier:
    """Random values in place of zeros, so that every branch is seen."""
    torch.manual_seed(0)
    model = engine.Classifier(**{**SMALL, **options})
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(torch.randn(p.shape) * 0.1)
    return model


@pytest.mark.parametrize("pool", ["attention", "adaptive"])
@pytest.mark.parametrize("options", [{}, dict(conditioning="add", resample="conv")])
def test_fused_and_eager_agree_and_everything_matters(pool, options, monkeypatch):
    model = classifier(pool=pool, **options)
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    t, y = torch.tensor([3, 900]), torch.tensor([0, 2])

    def run(backend, dtype):
        monkeypatch.setenv("ENGINE_BACKEND", backend)
        net = copy.deepcopy(model).to(dtype)
        image = x.clone().to(dtype).requires_grad_()
        logits = net(image, t)
        log_p = logits.log_softmax(1).gather(1, y[:, None]).sum()
        log_p.backward()
        grads = {name: p.grad for name, p in net.named_parameters()}
        return logits.detach(), image.grad, torch.cat([g.flatten() for g in grads.values()]), grads

    truth = run("eager", torch.float64)
    plain, fused = run("eager", torch.float32), run("native", torch.float32)
    for i, factor in enumerate((FORWARD, GRADIENT, GRADIENT)):
        assert_within_budget(fused[i], truth[i], plain[i], factor=factor, what=str(i))
    assert [name for name, g in truth[3].items() if not g.any()] == []
    assert truth[0].shape == (2, 3) and truth[1].abs().amin((1, 2, 3)).min() >= 0
    assert truth[1].flatten(1).any(1).all()  # each image has a gradient of its own


def test_attention_pool_is_multi_head_attention_of_the_mean():
    pool = classifier().pool.double()
    tokens = torch.randn(2, 16, 32, dtype=torch.float64)
    all_tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + pool.position
    sequence = all_tokens.transpose(0, 1)  # (S, N, C)
    want, _ = torch.nn.functional.multi_head_attention_forward(
        sequence[:1], sequence, sequence, 32, pool.num_heads, pool.qkv.weight, pool.qkv.bias,
        None, None, False, 0.0, pool.proj_out.weight, pool.proj_out.bias,
    )  # fmt: skip
    assert pool.num_heads == 4
    assert torch.allclose(pool(tokens), want[0], rtol=1e-12, atol=1e-12)


def test_sizes_pools_and_presets():
    adaptive = classifier(pool="adaptive")
    assert adaptive(torch.zeros(1, 2, 16, 12), torch.zeros(1)).shape == (1, 3)
    fresh = engine.Classifier(**SMALL, pool="adaptive")
    assert not fresh(torch.randn(2, 2, 8, 8), torch.zeros(2)).any()  # every class as likely
    again = engine.Classifier(**adaptive.config)
    assert again.config == adaptive.config
    again.load_state_dict(adaptive.state_dict())
    with torch.device("meta"):
        for name in engine.presets.CLASSIFIERS:
            model = engine.Classifier.from_preset(name)
            x = torch.zeros(1, model.config["in_channels"], *[model.config["image_size"]] * 2)
            assert model.pool.position.shape[0] == (x.shape[2] >> len(model.down) - 1) ** 2 + 1


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: classifier(pool="mean"), "pool is 'mean', expected one of attention, adaptive"),
        (lambda: classifier(num_classes=None), "num_classes is None, expected a whole number"),
        (lambda: classifier(num_groups=5), "cannot be split into num_groups=5"),
        (lambda: engine.Classifier.from_preset("adm"), "choose one of fashion-mnist, adm-64"),
        (lambda: engine.Classifier.from_preset("adm-64", up=1), "classifier preset 'adm-64'"),
        (
            lambda: classifier()(torch.zeros(1, 2, 16, 16), torch.zeros(1)),
            "knows positions of 8×8 images only",
        ),
        (lambda: classifier()(torch.zeros(1, 3, 8, 8), torch.zeros(1)), "x is"),
        (lambda: classifier()(torch.zeros(2, 2, 8, 8), torch.zeros(1)), "one step per image"),
    ],
)
def test_bad_input(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """pictures/dark and /light, 24 in all: two classes that noise hides only slowly."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(24):
        name = ("dark", "light")[i % 2]
        path = tmp_path / "pictures" / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 128, (8, 8)) + (i % 2) * 127
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


COMMAND = ["--dataset", "pictures", "--image-size", "8", "--channels", "1", "--width", "16"]
COMMAND += ["--batch", "8", "--device", "cpu", "--out", "c", "--timesteps", "100"]


def make_run(out, **options) -> Run:
    config = ClassifierConfig(out=out, device="cpu", batch=8, steps=6, seed=4, **options)
    images = data.open_dataset("pictures", size=8, channels=1, labels=True)
    torch.manual_seed(0)
    model = engine.Classifier(**{**SMALL, "in_channels": 1, "num_classes": 2}, dropout=0.2)
    return Run(config, model, engine.Diffusion(schedules.betas("cosine", 50)), images)


def test_a_resumed_run_ends_with_the_same_weights(folder):
    whole, first = make_run(folder / "whole"), make_run(folder / "cut")
    stream = data.batches(whole.images, 8, seed=4)
    batches = [next(stream) for _ in range(6)]
    for x, y in batches:
        whole.train_step(x, y)
    for x, y in batches[:3]:
        first.train_step(x, y)
    (folder / "cut").mkdir()
    first.save()
    second = make_run(folder / "cut")
    second.restore(*checkpoint.read(folder / "cut"))
    assert second.step == 3
    for x, y in batches[3:]:
        second.train_step(x, y)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_command_trains_saves_and_resumes(folder, capsys):
    assert train_classifier.main([*COMMAND, "--steps", "60", "--lr", "0.01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "accuracy on 24 training pictures x_t, by t:"
    shares = [float(line.split()[-1].rstrip("%")) for line in lines[1:-1]]
    assert len(shares) == 6 and shares[0] == 100  # and nothing can be known at t = T − 1
    assert [row["step"] for row in engine.metrics.read_metrics("c")] == [50, 60]

    found = checkpoint.load_classifier("c")
    assert not found.training and found.diffusion.T == 100
    assert found.config["num_classes"] == 2
    x = torch.full((2, 1, 8, 8), 0.5, requires_grad=True)
    x.data[0] = -0.5
    logits = found(x, torch.zeros(2))
    assert logits.argmax(1).tolist() == [0, 1]
    before = logits.log_softmax(1)[:, 1]
    (gradient,) = torch.autograd.grad(before.sum(), x)
    ahead = x + 0.01 * gradient / gradient.flatten(1).norm(dim=1).view(2, 1, 1, 1)
    assert (found(ahead, torch.zeros(2)).log_softmax(1)[:, 1] > before).all()

    assert train_classifier.main(["--resume", "c", "--steps", "61"]) == 0
    assert checkpoint.read("c")[1]["step"] == 61
    for args, sentence in (
        (["--resume", "c", "--lr", "1"], "--lr cannot change on --resume"),
        (["--resume", "c", "--out", "d"], "leave out --out d"),
        (COMMAND, "c already holds a run"),
        (
            ["--resume", "c", "--steps", "10"],
            "--steps 10 is less than the 61 steps that c has done",
        ),
        ([*COMMAND, "--out", "d", "--steps", "0"], "--steps must be at least 1"),
        ([*COMMAND, "--out", "d", "--image-size", "0"], "must be at least 1 pixel, not 0"),
        ([*COMMAND, "--out", "d", "--channels", "0"], "must be 1 (grey) or 3 (RGB), not 0"),
        ([*COMMAND, "--out", "d", "--device", "cuda:99"], "device cuda:99: "),
        ([*COMMAND, "--out", "d", "--width", "17"], "--width is 17, expected an even number"),
    ):
        before = (folder / "c" / checkpoint.FILE).stat().st_mtime_ns
        assert train_classifier.main(args) == 2
        assert sentence in capsys.readouterr().err
        assert (folder / "c" / checkpoint.FILE).stat().st_mtime_ns == before
        assert not (folder / "d").exists()
    with pytest.raises(checkpoint.CheckpointError, match=r"is a classifier's, expected a diffusi"):
        engine.load("c")


def test_resume_knows_the_pictures_again(folder, capsys):
    def resumed(steps, *more):
        code = train_classifier.main(["--resume", "c", "--steps", str(steps), *more])
        return code, capsys.readouterr().err

    assert train_classifier.main([*COMMAND, "--steps", "1"]) == 0
    capsys.readouterr()
    before = (folder / "c" / checkpoint.FILE).read_bytes()
    (folder / "pictures" / "dark" / "0.png").rename(folder / "pictures" / "dark" / "00.png")
    code, said = resumed(2)
    assert code == 2 and "as many pictures as it had, 24, but not the same" in said
    (folder / "pictures" / "dark" / "00.png").unlink()
    code, said = resumed(2)
    assert code == 2 and "has 23 pictures, but the run has seen 24" in said
    assert said.count("\n") == 1 and "--changed-pictures to go on" in said
    assert (folder / "c" / checkpoint.FILE).read_bytes() == before
    code, said = resumed(2, "--changed-pictures")
    assert code == 0 and "from here on the run is another one" in said
    assert resumed(3)[0] == 0  # these are now the run's
    (folder / "pictures" / "dark" / "2.png").unlink()
    assert resumed(4)[0] == 2  # what was allowed once is not for ever
    code = train_classifier.main([*COMMAND, "--out", "d", "--changed-pictures"])
    assert code == 2 and "give --resume RUN too" in capsys.readouterr().err
    assert not (folder / "d").exists()


def test_a_damaged_or_other_checkpoint_is_one_sentence(folder):
    run = make_run(folder / "c")
    (folder / "c").mkdir()
    run.save()
    tensors, info = checkpoint.read(folder / "c")
    for change, sentence in (
        ({"kind": None}, "is a diffusion model's, expected a classifier's: give the folder of a"),
        ({"model": {**info["model"], "pool": "max"}}, "does not describe a classifier.*pool is"),
        ({"model": {**info["model"], "num_classes": 5}}, "does not describe a classifier"),
    ):
        checkpoint.save(folder / "c" / checkpoint.FILE, tensors, {**info, **change})
        with pytest.raises(checkpoint.CheckpointError, match=sentence):
            checkpoint.load_classifier(folder / "c")


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as end:
        train_classifier.main(["--help"])
    shown = capsys.readouterr().out
    fields = dataclasses.fields(ClassifierConfig)
    assert end.value.code == 0 and all(cli.option(f.name) in shown for f in fields)

"""One step on static buffers, replayed by a stand-in for the graph: the plain loop's images."""

import pytest
import torch
from test_samplers import SHAPE, curved, diffusion

import engine
from engine import samplers, stepping


class Replayed:
    """Stands in for a CUDA graph: what was captured, run again on the same memory."""

    def __init__(self, run, rewind, warm_ups=3):
        for _ in range(warm_ups):
            rewind()
            run()
        self.run, self.replays, self.memory = run, 0, None

    def replay(self):
        loop = self.run.__self__
        memory = [t.data_ptr() for t in (*loop.state, loop.counter) if t is not None]
        self.memory = self.memory or memory
        assert memory == self.memory
        self.replays += 1
        self.run()


@pytest.fixture
def graphs(monkeypatch):
    """graph=True on this device; the graphs that were captured."""
    made = []
    monkeypatch.setattr(samplers, "_wants_graph", lambda graph, device: graph is True)
    monkeypatch.setattr(
        stepping, "capture", lambda run, rewind: made.append(Replayed(run, rewind)) or made[-1]
    )
    return made


@pytest.mark.parametrize(
    "options",
    [
        dict(sampler="ddpm"),
        dict(sampler="ddpm", steps=2),
        dict(sampler="ddim", eta=0.7, offset=5),
        dict(sampler="dpm++", steps=9, progress=True),
        dict(sampler="dpm++", steps=1, dynamic_threshold=0.9),
        dict(sampler="ddpm", y=torch.tensor([0, 1, 2]), clip=False),
        dict(sampler="ddpm", variance="learned_range", steps=8),
        dict(sampler="heun", steps=5, progress=True),
        dict(sampler="heun", steps=4, s_churn=3.0, model_dtype=torch.bfloat16),
        dict(sampler="dpm++", steps=4, model_dtype=torch.float16, spacing="karras"),
        dict(sampler="ddim", steps=5, y=torch.tensor([0, 1, 2]), guidance=3.0, null_label=5),
        dict(sampler="ddpm", steps=5, noise=torch.linspace(-2, 2, 6 * 48).reshape(6, *SHAPE)),
        dict(
            sampler="heun",
            steps=3,
            y=torch.tensor([0, 1, 1]),
            classifier=lambda x, t: x.sum(3)[:, 0],
        ),
    ],
    ids=lambda options: "-".join([options["sampler"], *list(options)[1:]]),
)
@pytest.mark.parametrize("impl", ["eager", "native"])
def test_replays_give_the_images_of_the_plain_loop(graphs, impl, options):
    variance = options.get("variance", "small")
    options = {k: v for k, v in options.items() if k != "variance"} | dict(seed=4, impl=impl)

    def model(x, t, y=None):
        out = curved(x, t) if y is None else curved(x, t) * y.reshape(-1, 1, 1, 1)
        return torch.cat([out, out], 1) if variance == "learned_range" else out

    process = diffusion(25, variance=variance)
    plain, states = engine.sample(model, process, SHAPE, trajectory=2, **options)
    assert not graphs
    found, others = engine.sample(model, process, SHAPE, trajectory=2, graph=True, **options)
    calls = options.get("steps", 25)
    calls = 2 * calls - 1 if options["sampler"] == "heun" else calls
    assert torch.equal(found, plain) and graphs[0].replays == calls
    assert all(torch.equal(a, b) for a, b in zip(states, others, strict=True))
    states = engine.sample(model, process, SHAPE, trajectory=9, **options)[1]
    others = engine.sample(model, process, SHAPE, trajectory=9, graph=True, **options)[1]
    assert all(torch.equal(a, b) for a, b in zip(states, others, strict=True))


def test_a_step_that_cannot_be_captured_runs_as_ever(graphs, monkeypatch):
    def refuse(run, rewind):
        run()  # half a warm-up leaves its traces
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(stepping, "capture", refuse)
    plain = engine.sample(curved, diffusion(25), SHAPE)
    with pytest.warns(UserWarning, match="without a CUDA graph: .*when stream is capturing.$"):
        found = engine.sample(curved, diffusion(25), SHAPE, graph=True)
    assert torch.equal(found, plain)

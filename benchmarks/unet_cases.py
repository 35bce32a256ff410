"""What bench_unet.py compares: two U-Nets of the same weights, their inputs, steps of each."""

import copy
import tempfile
import time
from collections.abc import Callable

import diffusers
import torch
from diffusers.pipelines.ddim import pipeline_ddim

import engine
from engine.foreign import load_diffusers
from engine.optimizer import AdamW
from engine.prepacked import for_sampling
from engine.update import Update, choose_update

SMALL = dict(
    sample_size=32,
    in_channels=1,
    out_channels=1,
    block_out_channels=(64, 128, 128),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)
CIFAR10 = dict(
    sample_size=32,
    block_out_channels=(128, 256, 256, 256),
    attention_head_dim=256,  # one head, as published
    freq_shift=1,
    flip_sin_to_cos=False,
    downsample_padding=0,
    norm_eps=1e-6,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)
MODELS = {"small": SMALL, "cifar10": CIFAR10}
BF16 = torch.bfloat16
PAUSE = 0.3  # seconds


def pair(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """diffusers' model and ours of the same weights, float32."""
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(**MODELS[name])
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, load_diffusers(folder)


def inputs(name: str, batch: int, one_step: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and their t; one t for all as in a sampler's step, or each its own as in training."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, MODELS[name].get("in_channels", 3), 32, 32, generator=generator)
    t = torch.randint(0, 1000, (batch,), generator=generator)
    return x, t[:1].expand(batch).contiguous() if one_step else t


def as_sampled(model: torch.nn.Module, dtype: torch.dtype, t: torch.Tensor) -> Callable:
    """(x, t) → what engine.sample calls at each of a hundred steps, t's among them."""
    with torch.autocast("cpu", dtype, enabled=dtype == BF16):
        called = for_sampling(model)
    called.expect(torch.cat([t[:1], torch.arange(0, 1000, 10)]), len(t))
    return called


def seconds(contenders: dict, blocks: int, calls: int) -> dict[str, list[float]]:
    """Seconds of every call; in turns, a block of calls each, the first of a block left out.

    A pause between: each library's threads look for work for a while after their last, on the two
    cores that the next contender is to have.
    """
    taken = {name: [] for name in contenders}
    for _ in range(blocks):
        for name, call in contenders.items():
            time.sleep(PAUSE)
            call()
            for _ in range(calls):
                start = time.perf_counter()
                call()
                taken[name].append(time.perf_counter() - start)
    return taken


def same(found: torch.Tensor, expected: torch.Tensor, whose: str, bound: float = 0.03) -> float:
    """The difference, asserted to be that of bfloat16 networks: the same but for their rounding."""
    difference = (found.float() - expected.float()).norm() / expected.float().norm()
    assert difference <= bound, f"{whose}: differs by {difference:.3f} of the norm"
    return round(difference.item(), 5)


def openvino(model: torch.nn.Module, x: torch.Tensor, t: torch.Tensor):
    """The model in OpenVINO, bfloat16, for this shape alone; None where it is not installed."""
    try:
        import openvino as ov
    except ImportError:
        return None

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x, t):
            return self.model(x, t, return_dict=False)[0]

    shapes = [ov.PartialShape(x.shape), ov.PartialShape(t.shape)]
    converted = ov.convert_model(Plain(), example_input=(x, t), input=shapes)
    options = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.compile_model(converted, "CPU", options)
    arrays = [x.numpy(), t.numpy()]
    return lambda: torch.from_numpy(compiled(arrays)[0])


class Training:
    """Steps of AdamW under autocast: diffusers' model as its examples train it, with PyTorch's
    fused AdamW and no average of the weights; ours as engine.train does, average included, or with
    `plainly` by PyTorch's passes and with autocast's casts. In float32 without `low`, without an
    average where not `averaged`."""

    def __init__(
        self, model: torch.nn.Module, name: str, batch: int, plainly=False, low=True, averaged=True
    ):
        self.model = model.train()
        ours = isinstance(model, engine.UNet)
        optimizer = AdamW if ours else torch.optim.AdamW
        self.optimizer = optimizer(model.parameters(), lr=1e-5, fused=True)
        averaged = dict(model.named_parameters()) if ours and averaged else {}
        self.average = {k: p.detach().clone() for k, p in averaged.items()}
        self.update = Update(self.optimizer, self.average, 1.0)
        if ours and not plainly:
            self.update = choose_update(self.optimizer, self.average, 1.0, model if low else None)
        self.low = low
        self.x, self.t = inputs(name, batch)
        self.target = torch.randn(self.x.shape, generator=torch.Generator().manual_seed(2))

    def __call__(self) -> torch.Tensor:
        with self.update.weights(), torch.autocast("cpu", BF16, enabled=self.low):
            out = self.model(self.x, self.t)
            out = out if isinstance(out, torch.Tensor) else out.sample
            loss = (out.float() - self.target).square().mean()
            loss.backward()
        self.update.norm()
        self.update.step(1e-3)
        self.update.zero_grad()
        return loss.detach()


class Parameters:
    """The parameters of a model with gradients that stay: clipping, AdamW and average alone."""

    def __init__(self, model: torch.nn.Module, make: Callable, **options) -> None:
        self.weights = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
        self.averages = {str(i): p.detach().clone() for i, p in enumerate(self.weights)}
        optimizer = AdamW(self.weights, lr=1e-5, **options)
        self.update = make(optimizer, self.averages, 1.0)
        generator = torch.Generator().manual_seed(3)
        for p in self.weights:  # the whole's norm is 2.6 for 6.8 million: it is clipped
            p.grad = torch.empty_like(p).copy_(1e-3 * torch.randn(p.shape, generator=generator))

    def __call__(self) -> None:
        self.update.norm()
        self.update.step(1e-3)


def sampling(theirs: torch.nn.Module, ours: torch.nn.Module, name: str, batch: int) -> dict:
    """(steps, dtype, x_T or None) → images in [0, 1]: whole samplings by DDIM, a function each.

    Ours packs its weights in each. Not given x_T they draw it.
    """
    scheduler = diffusers.DDIMScheduler()  # 0, i, 2i, … of 1000 steps, x̂_0 clipped
    process = engine.Diffusion(engine.schedules.betas("linear", 1000))
    x, _ = inputs(name, batch)
    pipelines = {}

    def pipeline(steps: int, dtype: torch.dtype, start: torch.Tensor | None) -> torch.Tensor:
        if dtype not in pipelines:
            unet = copy.deepcopy(theirs).to(dtype).eval()
            pipelines[dtype] = diffusers.DDIMPipeline(unet, scheduler)
            pipelines[dtype].set_progress_bar_config(disable=True)
        draw = pipeline_ddim.randn_tensor
        if start is not None:
            pipeline_ddim.randn_tensor = lambda *_, **__: start.to(dtype)
        options = {"num_inference_steps": steps, "output_type": "pt"}
        if start is not None:  # as ours: ε of the clipped x̂_0; as it comes it leaves that out
            options["use_clipped_model_output"] = True
        try:
            images = pipelines[dtype](batch, **options).images
        finally:
            pipeline_ddim.randn_tensor = draw
        return images

    def sample(steps: int, dtype: torch.dtype, start: torch.Tensor | None) -> torch.Tensor:
        noise = None if start is None else lambda k: start
        options = {"sampler": "ddim", "steps": f"ddim{steps}", "noise": noise}
        with torch.autocast("cpu", dtype, enabled=dtype == BF16):
            images = engine.sample(ours, process, tuple(x.shape), **options)
        return (images / 2 + 0.5).clamp(0, 1)

    return {"ours": sample, "diffusers": pipeline}

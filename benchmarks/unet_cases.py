"""What bench_unet.py compares: two U-Nets of the same weights, their inputs, steps of each."""

import copy
import tempfile
import time

import diffusers
import torch
from diffusers.pipelines.ddim import pipeline_ddim
from torch.nn.utils import clip_grad_norm_

import engine
from engine.blocks import Conv2d, Linear
from engine.foreign import load_diffusers
from engine.optimizer import AdamW

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


def inputs(name: str, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, MODELS[name].get("in_channels", 3), 32, 32, generator=generator)
    return x, torch.randint(0, 1000, (batch,), generator=generator)


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
    """Steps of AdamW under autocast, as diffusers' examples and engine.train make them."""

    def __init__(self, model: torch.nn.Module, name: str, batch: int) -> None:
        self.model = model.train()
        ours = isinstance(model, engine.UNet)
        self.optimizer = self.make(AdamW if ours else torch.optim.AdamW)
        self.x, self.t = inputs(name, batch)
        self.target = torch.randn(self.x.shape, generator=torch.Generator().manual_seed(2))

    def make(self, optimizer: type) -> torch.optim.Optimizer:
        return optimizer(self.model.parameters(), lr=1e-5, fused=True)

    def __call__(self) -> torch.Tensor:
        with torch.autocast("cpu", BF16):
            out = self.model(self.x, self.t)
            out = out if isinstance(out, torch.Tensor) else out.sample
            loss = (out.float() - self.target).square().mean()
        loss.backward()
        self.update()
        return loss.detach()

    def update(self) -> None:
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> list[torch.Tensor]:
        return list(self.model.parameters())


class Masters(Training):
    """The same with the weights of convolutions and projections held in bfloat16, which autocast
    then need not cast, and float32 masters of them for the optimiser."""

    def make(self, optimizer: type) -> torch.optim.Optimizer:
        layers = [m for m in self.model.modules() if isinstance(m, Conv2d | Linear)]
        self.low = [p for m in layers for p in m.parameters(recurse=False)]
        masters = {p: torch.nn.Parameter(p.detach().clone()) for p in self.low}
        self.high = list(masters.values())
        self.all = [masters.get(p, p) for p in self.model.parameters()]
        for p in self.low:
            p.data = p.data.to(BF16)
        return optimizer(self.all, lr=1e-5, fused=True)

    def update(self) -> None:
        grads = [torch.empty_like(p) for p in self.high]
        torch._foreach_copy_(grads, [p.grad for p in self.low])
        for low, high, grad in zip(self.low, self.high, grads, strict=True):
            low.grad, high.grad = None, grad
        clip_grad_norm_(self.all, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_copy_(self.low, self.high)

    def weights(self) -> list[torch.Tensor]:
        return self.all


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

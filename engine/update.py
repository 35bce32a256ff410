"""What follows a backward pass: the gradient's norm, clipping, AdamW, the average of the weights.

In PyTorch these are passes over all parameters, one after the other. On the CPU, where memory is
what they wait for, `OnePass` does all but the norm in one, with the bfloat16 weights of
low_weights.py: 9.3 ms in place of 19.5 for 6.8 million parameters on two cores.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import cycle

import torch
from torch import Tensor, nn

from . import dispatch
from .low_weights import DTYPE, Low, LowWeights
from .parallel import is_sharded, local

MOMENTS = ("exp_avg", "exp_avg_sq")  # of the optimiser's state


class Update:
    """PyTorch's way: `norm`, which clips too, then `step`, unless the norm speaks against it.

    averages  of the optimizer's parameters by name, in their order; or {}: there are none
    clip      the norm that the gradient is scaled down to where it is larger
    """

    def __init__(
        self, optimizer: torch.optim.AdamW, averages: dict[str, Tensor], clip: float
    ) -> None:
        self.optimizer, self.averages, self.clip = optimizer, averages, clip
        self.lows: LowWeights | None = None
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def norm(self) -> Tensor:
        """The 2-norm of the whole gradient before clipping, () float32."""
        return torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)

    def step(self, weight: float) -> None:
        """AdamW with the clipped gradient, and average ← average + weight·(parameter − average)."""
        self.optimizer.step()
        with torch.no_grad():
            averages = [local(average) for average in self.averages.values()]
            if averages:
                parameters = [local(p.detach()) for p in self.parameters]
                torch._foreach_lerp_(averages, parameters, weight)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self):
        """The context of forward and backward pass."""
        return nullcontext()


class OnePass(Update):
    """The same by our kernel, for float32 parameters on the CPU.

    The bits are PyTorch's (torch.optim.AdamW(fused=True) on x86) for the same norm. The norm is
    closer to the true one, a float64 sum of sums of 4096 squares, and the same for any number of
    threads; where the gradient is clipped, the last bits of a step may differ for that.
    Gradients are not changed. The optimizer's options and its state, and so a checkpoint, are as
    ever. Raises RuntimeError, one sentence, for tensors that do not fit each other.
    """

    def __init__(
        self,
        optimizer: torch.optim.AdamW,
        averages: dict[str, Tensor],
        clip: float,
        lows: LowWeights | None = None,
    ) -> None:
        super().__init__(optimizer, averages, clip)
        self.lows = lows
        self.none = torch.empty(0, dtype=DTYPE)  # in the place of a bfloat16 tensor
        self.pairs: list[Low | None] = []  # of each parameter, like grads
        self.grads: list[Tensor | None] = []
        self.total = torch.zeros(())
        # Moments and averages of which it is known that they lie as the parameters do, and how.
        self.found: list[Tensor] = []
        self.layouts: list[tuple[int, ...]] = []

    @torch.no_grad()
    def norm(self) -> Tensor:
        pairs = {} if self.lows is None else {id(p): low for low, p in self.lows.pairs}
        self.pairs = [pairs.get(id(p)) for p in self.parameters]
        self.grads = [p.grad for p in self.parameters]
        for i, low in enumerate(self.pairs):
            mine = None if low is None else low.tensor.grad
            if mine is not None and self.grads[i] is None:
                self.grads[i] = mine
            elif mine is not None:  # a forward pass took the master: both have a part
                self.grads[i] += mine
                low.tensor.grad = None
        there = [g for g in self.grads if g is not None]
        self.total = call("norm")(there) if there else torch.zeros(())
        return self.total

    @torch.no_grad()
    def step(self, weight: float) -> None:
        scale = (self.clip / (self.total + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
        averages = list(self.averages.values())
        first = 0
        for group in self.optimizer.param_groups:
            end = first + len(group["params"])
            rows = [i for i in range(first, end) if self.grads[i] is not None]
            options = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            if rows:
                self.kernel(rows, scale, *options, weight)
            left = [i for i in range(first, end) if self.grads[i] is None]
            if left and averages:
                weights = [self.parameters[i] for i in left]
                torch._foreach_lerp_([averages[i] for i in left], weights, weight)
            first = end

    def kernel(self, rows: list[int], scale: Tensor, *options) -> None:
        """The step of the parameters of these numbers."""
        weights, pairs = ([of[i] for i in rows] for of in (self.parameters, self.pairs))
        state = self.optimizer.state
        for p in weights:
            if not state[p]:  # as torch.optim.AdamW begins
                moments = {key: torch.zeros_like(p) for key in MOMENTS}
                state[p] = {"step": torch.zeros(()), **moments}
        names = list(self.averages)
        homes = [(state[p], key) for key in MOMENTS for p in weights]
        homes += [(self.averages, names[i]) for i in rows] if names else []
        found = [home[key] for home, key in homes]
        layouts = [p.stride() for p in weights]
        if layouts != self.layouts or list(map(id, found)) != list(map(id, self.found)):
            for (home, key), p in zip(homes, cycle(weights), strict=False):
                if home[key].stride() != p.stride():  # loaded, it has the layout of its file
                    home[key] = torch.empty_like(p).copy_(home[key])
            for p, low in zip(weights, pairs, strict=True):
                if low is not None and low.tensor.stride() != p.stride():
                    low.refresh(p)
            found = [home[key] for home, key in homes]
            self.found, self.layouts = found, layouts
        n = len(rows)
        exp_avgs, exp_avg_sqs, averages = found[:n], found[n : 2 * n], found[2 * n :]
        lows = [self.none if low is None else low.tensor for low in pairs]
        grads, steps = [self.grads[i] for i in rows], [state[p]["step"] for p in weights]
        tensors = (weights, grads, exp_avgs, exp_avg_sqs, steps, averages, lows)
        call("step")(*tensors, scale, *options)
        # Autograd is told that they were written: it sees no kernel of ours.
        torch.autograd.graph.increment_version([*weights, *lows])
        for p, low in zip(weights, pairs, strict=True):
            if low is not None:
                low.written(p)

    def zero_grad(self) -> None:
        super().zero_grad()
        if self.lows is not None:
            for low, _ in self.lows.pairs:
                low.tensor.grad = None

    def weights(self):
        return nullcontext() if self.lows is None else self.lows


def call(stage: str):
    return dispatch.function("adamw", stage, "native")


def refusal(optimizer: torch.optim.AdamW) -> str:
    """Why OnePass does not serve; "" where it does."""
    if dispatch.requested("auto") == "eager":
        return "ENGINE_BACKEND=eager asks for PyTorch's"
    for group in optimizer.param_groups:
        if group["amsgrad"] or group["maximize"] or isinstance(group["lr"], Tensor):
            return "it knows neither amsgrad nor maximize, nor a learning rate that is a tensor"
        for p in group["params"]:
            if is_sharded(p) or not p.is_cpu or p.dtype != torch.float32:
                return "it needs whole float32 parameters on the CPU"
    return dispatch.absence("adamw", "native")


def choose_update(
    optimizer: torch.optim.AdamW,
    averages: dict[str, Tensor],
    clip: float,
    model: nn.Module | None = None,
) -> Update:
    """OnePass where it serves, and for the layers of `model`, if given, with bfloat16 weights."""
    if refusal(optimizer):
        return Update(optimizer, averages, clip)
    lows = None if model is None else LowWeights(model)
    return OnePass(optimizer, averages, clip, lows)

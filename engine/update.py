"""What follows a backward pass: the gradient's norm, clipping, AdamW, the average of the weights.

In PyTorch these are passes over all parameters, one after the other. On the CPU, where memory is
what they wait for, `OnePass` does all but the norm in one, with the bfloat16 weights of
low_weights.py: 9.3 ms in place of 19.5 for 6.8 million parameters on two cores.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from . import dispatch
from .low_weights import DTYPE, LowWeights
from .parallel import is_sharded, local


class Update:
    """PyTorch's way: `norm`, which clips too, then `step`, unless the norm speaks against it.

    averages  of the optimizer's parameters by name, in their order
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
        self.empty = torch.empty(0, dtype=DTYPE)  # in the place of a bfloat16 tensor
        self.pairs, self.grads, self.total = {}, [], torch.zeros(())

    def norm(self) -> Tensor:
        # Anew at each step: by now a layer may have another parameter.
        self.pairs = {} if self.lows is None else {p: low for low, p in self.lows.pairs()}
        self.grads = [self.gradient(p) for p in self.parameters]
        there = [g for g in self.grads if g is not None]
        self.total = call("norm")(there) if there else torch.zeros(())
        return self.total

    @torch.no_grad()
    def gradient(self, p: Tensor) -> Tensor | None:
        low = self.pairs.get(p)
        if low is None or low.tensor.grad is None:
            return p.grad
        if p.grad is not None:  # of a forward pass that took the master: both have a part
            p.grad += low.tensor.grad
            low.tensor.grad = None
            return p.grad
        return low.tensor.grad

    @torch.no_grad()
    def step(self, weight: float) -> None:
        scale = (self.clip / (self.total + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
        each = zip(self.parameters, self.grads, self.averages.values(), strict=True)
        of = {p: (grad, average) for p, grad, average in each}
        left = []  # without a gradient: only their average moves
        for group in self.optimizer.param_groups:
            lists = [[] for _ in range(7)]
            for p in group["params"]:
                grad, average = of[p]
                if grad is None:
                    left.append((average, p))
                    continue
                state, low = self.state(p), self.pairs.get(p)
                moments = state["exp_avg"], state["exp_avg_sq"]
                low = self.empty if low is None else low.tensor
                entries = (p, grad, *moments, state["step"], average, low)
                for entry, tensors in zip(entries, lists, strict=True):
                    tensors.append(entry)
            options = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            if lists[0]:
                call("step")(*lists, scale, *options, weight)
                written = [t for tensors in (lists[0], *lists[2:]) for t in tensors]
                torch.autograd.graph.increment_version(written)  # it counts no kernel of ours
                for p in lists[0]:
                    if p in self.pairs:
                        self.pairs[p].written(p)
        if left:
            torch._foreach_lerp_(*map(list, zip(*left, strict=True)), weight)

    def state(self, p: Tensor) -> dict[str, Tensor]:
        """The optimizer's, as torch.optim.AdamW makes it."""
        state = self.optimizer.state[p]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        for key in ("exp_avg", "exp_avg_sq"):  # loaded, it keeps the layout that it was saved in
            if state[key].stride() != p.stride():
                state[key] = torch.empty_like(p).copy_(state[key])
        return state

    def zero_grad(self) -> None:
        super().zero_grad()
        for low in self.pairs.values():
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

"""The loop of samplers.py: a network call and a fused step, on memory that is made once.

Every step writes where the one before wrote, as far as nobody else holds that memory: a network of
the user's may keep the tensors that it is given, so that what it sees is made anew for it. What
one step has checked the next one does not: kernels are called without the front door's checks as
long as the network's outputs are of the same kind.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import dispatch, ops
from .embedded import Embedded
from .ops.reverse_step import is_read


@dataclass
class Step:
    """What every step of a run has in common."""

    network: Callable  # (x, t) → output, output without the condition or None
    gradient: Callable | None  # (x, t) → a classifier's; keeps no x
    times: Tensor  # (n,) int64 or float32
    rows: Tensor  # (n, 10) float32
    key: Tensor | None  # () int64
    noise: Tensor | None  # like x, in place of key: the z of this step
    two_step: bool
    options: dict

    def start(self, x: Tensor) -> list[Tensor | None]:
        """The loop's state: x; x as the network takes it, if not as it is; x̂_0 of the call before,
        whose first coefficient is 0."""
        dtype = self.options["model_dtype"]
        return [
            x,
            None if dtype is None else x.to(dtype),
            torch.zeros_like(x) if self.two_step else None,
        ]

    def outputs(self, x: Tensor, model_in: Tensor | None, t: Tensor) -> tuple[Tensor | None, ...]:
        """The network's, that without the condition, the classifier's gradient."""
        out, uncond = self.network(x if model_in is None else model_in, t)
        return out, uncond, None if self.gradient is None else self.gradient(x, t)

    def checked(self, x: Tensor, x0: Tensor | None, outputs: tuple, index: Tensor) -> list:
        """The state after the step of that index, () or (1,) int64; all of it new."""
        out, uncond, grad = outputs
        found = ops.reverse_step(
            x,
            out,
            self.rows,
            index,
            key=self.key,
            noise=self.noise,
            uncond=uncond,
            grad=grad,
            x0_prev=x0,
            return_x0=self.two_step,
            **self.options,
        )
        x, *more = found if isinstance(found, tuple) else (found,)
        x0 = more.pop(0) if self.two_step else None
        return [x, more[0] if more else None, x0]

    def kernels(self, x: Tensor, outputs: tuple, index: Tensor) -> Callable | None:
        """→ run(results, x, x0_prev, outputs, index) without checks, for outputs of this kind;
        None where the front door has more to do than to check."""
        options, out = self.options, outputs[0]
        clip = math.inf if options["clip"] is None else options["clip"]
        args = (x, out, self.rows, index, self.key, self.noise, clip, options["offset"])
        if not x.is_cpu or not x.numel() or not all(t is None or is_read(t) for t in (x, *outputs)):
            return None
        if dispatch.pick("reverse_step", options["impl"], *args, *outputs[1:]) != "native":
            return None
        general = dispatch.function("reverse_step", "general_fwd", "native")
        bound = dispatch.function("reverse_step", "threshold_fwd", "native")
        quantile, guidance = options["dynamic_threshold"], options["guidance"]
        threshold = None if quantile is None else x.new_empty(len(x))
        rows, last = self.rows, (self.key, self.noise, guidance, clip, options["offset"])

        def run(results: tuple, x: Tensor, x0: Tensor | None, outputs: tuple, index: Tensor):
            if threshold is not None:
                bound(threshold, x, *outputs, rows, index, guidance, quantile)
            general(*results, x, *outputs, x0, threshold, rows, index, *last)

        return run


def keeps_nothing(network: Callable) -> bool:
    """Whether it is a network of ours that nobody looks into while it runs."""
    return isinstance(network, Embedded) and not torch.nn.modules.module._has_any_global_hook()


class Plain:
    """The loop as it reads."""

    def __init__(self, step: Step, x: Tensor, ours: bool) -> None:
        """ours: whether the network keeps nothing of what it is given."""
        self.step, self.state, self.done, self.known = step, step.start(x), 0, {}
        self.spare = None if self.state[2] is None else torch.empty_like(x)
        # The network sees x, or what is made of it.
        self.keeps_x, self.keeps_model_in = self.state[1] is None and not ours, not ours
        # Views of the tables, 16 bytes apart: kernels are compiled for aligned pointers.
        n = len(step.times)
        self.t = step.times[:, None].repeat(1, 4)[:, :1].expand(n, len(x)).unbind()
        self.index = torch.arange(n, device=x.device)[:, None].repeat(1, 2)[:, 0].unbind()

    @property
    def x(self) -> Tensor:
        return self.state[0]

    def advance(self) -> None:
        x, model_in, x0 = self.state
        index = self.index[self.done]
        outputs = self.step.outputs(x, model_in, self.t[self.done])
        self.done += 1
        kind = [None if t is None else (type(t), t.shape, t.stride(), t.dtype) for t in outputs]
        kind = tuple(kind)
        kernels = self.known.get(kind)
        if kernels is None:
            self.state = self.step.checked(x, x0, outputs, index)
            if kind not in self.known:
                self.known[kind] = self.step.kernels(x, outputs, index)
            return
        new = torch.empty_like(x) if self.keeps_x else x
        if model_in is not None and self.keeps_model_in:
            model_in = torch.empty_like(model_in)
        kernels((new, self.spare, model_in), x, x0, outputs, index)
        self.state, self.spare = [new, model_in, self.spare], x0


class Static:
    """The same on memory that stays where it is, as a captured step needs it."""

    def __init__(self, step: Step, x: Tensor) -> None:
        self.step, self.begin, self.graph = step, x, None
        self.state = step.start(x.clone())
        # Where the loop stands is on the device: a replay moves it too.
        self.counter = torch.zeros(1, dtype=torch.int64, device=x.device)

    @property
    def x(self) -> Tensor:
        return self.state[0]

    def advance(self) -> None:
        self.graph.replay()

    def run(self) -> None:
        """One step: what is captured."""
        x, model_in, x0 = self.state
        t = self.step.times.index_select(0, self.counter).expand(x.shape[0])
        outputs = self.step.outputs(x, model_in, t)
        news = self.step.checked(x, x0, outputs, self.counter)
        for mine, new in zip(self.state, news, strict=True):
            if mine is not None:
                mine.copy_(new)
        self.counter.add_(1)

    def rewind(self) -> None:
        self.counter.zero_()
        for mine, new in zip(self.state, self.step.start(self.begin), strict=True):
            if mine is not None:
                mine.copy_(new)

    def captured(self) -> "Static | None":
        """self, ready to replay; None, after a warning, where the step cannot be captured."""
        try:
            with torch.cuda.device_of(self.x):
                self.graph = capture(self.run, self.rewind)
        except Exception as error:  # whatever a model may raise: the plain loop will raise it again
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(
                f"sampling without a CUDA graph: the step cannot be captured ({reason[:200]})",
                stacklevel=3,
            )
        self.rewind()
        return self if self.graph is not None else None


def capture(run: Callable, rewind: Callable):
    """→ a CUDA graph of run(), whose replay() does what run() does."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries allocate and choose their kernels before a capture
        for _ in range(3):
            rewind()
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph

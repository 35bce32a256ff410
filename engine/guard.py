"""What a step's loss and gradient norm decide: does it count, is it logged, does training give up.

Two numbers decide, and where several processes share a batch both are of the whole batch, so every
process decides alike. A step whose loss or norm is not finite is skipped: weights, moments, EMA and
the t sampler's history stay. (A norm overflows float32 from 1.8e19 on; a gradient of that size is
as good as infinite, and below it no square of a gradient in AdamW overflows either.)

A loss spike is a finite loss far above the recent ones,

    loss > median + max(4 (q95 − median), 0.1 |median|)

with median and 95 % quantile of the last 200 finite losses, from the 50th on. It is logged, nothing
else. The loss of a batch depends on the t that it drew, and much so for the bound (--loss vlb): the
rule does not know t, but the distance from the median to q95 is what this spread, its long upper
tail included, was lately. So a batch of costly t alone is hardly ever a spike, and a batch of cheap
t may hide one. No more than 5 % of the recent losses are above q95: after some ten spikes in 200
steps they are what is usual, which keeps the log of a run that jumps to another level short.

float16 has gradients in need of a scale: the loss is multiplied by it before the backward pass and
the gradient divided by it after. A gradient that overflows under a scale above 1 is the scale's
fault: the step is skipped, the scale halved, and it counts for no streak.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from . import data
from .cli import Failed

STREAK = 10  # steps in a row with a non-finite loss or gradient after which training gives up
WINDOW, FEWEST = 200, 50  # finite losses that say what is usual: at most, at least
SPREADS, SHARE = 4.0, 0.1  # a spike's distance from the median: in (q95 − median), in |median|
LOWEST_SCALE, GROWTH = 1.0, 2000  # the scale's least value; good steps until it is doubled
PAUSE = 20  # steps between two lines on the screen
NAMED = 8  # files of a folder that an event names


class Diverged(Failed):
    """Training gave up: a streak of non-finite losses or gradients, or weights that are so."""


class Guard:
    """Judges step after step; `state_dict` makes a resumed run judge as one that went on."""

    def __init__(
        self, device: torch.device, precision: torch.dtype, say: Callable[[str], None]
    ) -> None:
        self.scaler = torch.amp.GradScaler(
            device.type, growth_interval=GROWTH, enabled=precision == torch.float16
        )
        self.say = say
        self.recent: deque[float] = deque(maxlen=WINDOW)  # finite losses
        self.skipped = 0  # steps left out
        self.streak = 0  # of them, the last ones in a row that no scale explains
        self.event: dict | None = None  # what was unusual about the last step
        self.quiet = (-PAUSE, 0)  # step of the last line on the screen, events without one since

    def scale(self, device: torch.device) -> Tensor:
        """The scale of this step's loss, 1 but for float16: a scalar on the device."""
        return self.scaler.scale(torch.ones((), device=device))

    def judge(self, step: int, loss: float, norm: float, scale: float = 1.0) -> bool:
        """Whether step number `step` (from 1) counts. Sets `event`, and the next step's scale.

        `norm` is of the unscaled gradient, before clipping. With float16, scaler.unscale_ went
        before, and `scale` is what it divided by.
        """
        usual, limit = self.usual()
        self.event = None
        counts = math.isfinite(loss) and math.isfinite(norm)
        if counts:
            self.streak = 0
            self.recent.append(loss)
            if loss > limit:
                self.event = {"event": "spike"}
        else:
            self.skipped += 1
            self.event = {"event": "skipped"}
        overflow = math.isfinite(loss) and not counts
        if not counts and not (overflow and scale > LOWEST_SCALE):
            self.streak += 1
        self.rescale(counts, overflow, scale)
        if self.event:
            self.event |= {"loss": loss, "usual": usual, "grad_norm": norm}
            if self.scaler.is_enabled():
                self.event["scale"] = scale
            self.tell(step)
        return counts

    def usual(self) -> tuple[float, float]:
        """The median of the recent losses, and the loss above which a spike begins."""
        if len(self.recent) < FEWEST:
            return math.nan, math.inf
        median = statistics.median(self.recent)
        q95 = statistics.quantiles(self.recent, n=20, method="inclusive")[-1]
        return median, median + max(SPREADS * (q95 - median), SHARE * abs(median))

    def rescale(self, counts: bool, overflow: bool, scale: float) -> None:
        """Doubles the scale after GROWTH good steps; halves it where the gradient overflowed.

        The judgement decides, not what this process's scaler has seen of a gradient: a norm may
        overflow alone, and another process may hold the part that did.
        """
        if not self.scaler.is_enabled():
            return
        self.scaler.update()
        if not counts:  # a forward pass that overflows does so at any scale
            lower = max(LOWEST_SCALE, scale / 2) if overflow else scale
            changed = {"scale": lower, "_growth_tracker": 0}
            self.scaler.load_state_dict(self.scaler.state_dict() | changed)

    def tell(self, step: int) -> None:
        """One line on the screen for the event, unless there was one a few steps ago."""
        last, untold = self.quiet
        if step - last < PAUSE:
            self.quiet = (last, untold + 1)
            return
        e = self.event
        text = f"step {step}: loss {e['loss']:g}, gradient norm {e['grad_norm']:g}"
        if e["event"] == "spike":
            text += f": a spike, {e['usual']:g} is usual"
        else:
            text += ": step skipped"
        if "scale" in e:
            text += f", gradient scale {e['scale']:g}"
        if untold:
            text += f" ({untold} more since step {last}: events.jsonl)"
        self.say(text)
        self.quiet = (step, 0)

    # -- state

    def state_dict(self) -> dict[str, Tensor]:
        state = {"losses": torch.tensor(list(self.recent), dtype=torch.float64)}
        state["streak"] = torch.tensor(self.streak)
        if self.scaler.is_enabled():
            saved = self.scaler.state_dict()
            state["scale"] = torch.tensor(saved["scale"], dtype=torch.float64)
            state["growth"] = torch.tensor(saved["_growth_tracker"])
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """A state without a scale, of another precision or of before there was one, begins anew."""
        self.recent.extend(state["losses"].tolist() if "losses" in state else [])
        self.streak = int(state.get("streak", 0))
        if self.scaler.is_enabled() and "scale" in state:
            saved = {"scale": float(state["scale"]), "_growth_tracker": int(state["growth"])}
            self.scaler.load_state_dict(self.scaler.state_dict() | saved)


def event_row(event: dict, images: data.Images, seed: int, step: int, batch: int) -> dict:
    """The event's row for the log, with the numbers of the pictures of step `step` (from 0), and
    of a folder the first files."""
    numbers = data.order(len(images), seed, step * batch, batch).tolist()
    row = event | {"pictures": numbers}
    if images.file is not None:
        row["files"] = [images.file(number) for number in numbers[:NAMED]]
    return row


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The name of the first tensor that has a NaN or an infinity; "" if there is none."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return name
    return ""

"""What our diffusers schedulers share: tables of rows, timesteps as numbers, one launch a step.

Nothing here reads from a GPU while steps are taken: a scheduler's timesteps are known as numbers
from set_timesteps on, an element of them is recognised by where it lies in their memory, and the
rows go to the device once, from pinned memory. Imports nothing of diffusers.
"""

import functools
import inspect
from numbers import Real

import torch
from torch import Tensor

from . import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("a", "b", "c", "d", "s", "e", "g0", "g1", "lo", "hi")  # as ops.reverse_step reads a row
TABLES = 8  # kept by one scheduler


class Rows:
    """(n, 10) float32 on the host, and a copy on each device on which steps were computed."""

    def __init__(self, columns: dict[str, Tensor]) -> None:  # (n,) each
        columns = {name: column.double() for name, column in columns.items()}
        zero = torch.zeros_like(columns["a"])
        self.host = torch.stack([columns.get(name, zero) for name in NAMES], 1).float()
        self.finite = self.host.isfinite().all(1).tolist()
        self.copies = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows, and 0 … n−1 int64, there."""
        if device not in self.copies:
            # Ordinary tensors also for a step under inference mode: the next may want a gradient.
            with torch.inference_mode(False):
                # A copy from pinned memory does not wait for the device.
                host = self.host.pin_memory() if device.type == "cuda" else self.host
                index = torch.arange(len(host), device=device)
                self.copies[device] = host.to(device, non_blocking=True), index
        return self.copies[device]


def host_first(parent):
    """set_timesteps that keeps the timesteps as numbers before they go to the device."""
    signature = inspect.signature(parent)

    @functools.wraps(parent)  # pipelines look at the signature
    def set_timesteps(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs)
        device = given.arguments.pop("device", None)
        parent(*given.args, **given.kwargs)
        values = self.timesteps.tolist()
        self.timesteps = self.timesteps.to(device)
        self._known = (self.timesteps, _version(self.timesteps), values)

    return set_timesteps


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


class Fused:
    """What the three share."""

    impl = "auto"  # as in ops: which back end computes the step
    clips = True  # whether clip_sample means something: from_config keeps other schedulers' options

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_tables", "_known")}

    def _timesteps(self) -> list:
        """self.timesteps as numbers; read back once if somebody else has set them."""
        known = self.__dict__.get("_known")
        if known is None or known[0] is not self.timesteps or known[1] != _version(known[0]):
            known = self.timesteps, _version(self.timesteps), self.timesteps.tolist()
            self._known = known
        return known[2]

    def _number(self, timestep):
        """timestep as a number, without a look at the device if it is an element of self.timesteps;
        None for what is no single one."""
        if not isinstance(timestep, Tensor):
            return timestep if isinstance(timestep, Real) else None
        if timestep.dim() != 0:
            return None
        if timestep.device.type == "cpu":
            return timestep.item()
        values, mine = self._timesteps(), self.timesteps
        if timestep.untyped_storage()._cdata == mine.untyped_storage()._cdata:
            at = timestep.storage_offset() - mine.storage_offset()
            if timestep.dtype == mine.dtype and mine.stride() == (1,) and 0 <= at < len(values):
                return values[at]
        return timestep.item()  # waits for the device, as the original does

    def _table(self, sources: tuple[Tensor, ...], settings: tuple, build) -> Rows:
        """build()'s rows, anew when a tensor that they come from was exchanged or changed."""
        tables = self.__dict__.setdefault("_tables", {})
        key = (settings, *((id(t), _version(t)) for t in sources))
        if key not in tables:
            if len(tables) >= TABLES:
                tables.clear()
            with torch.inference_mode(False), torch.no_grad():
                tables[key] = Rows(build()), sources  # which keeps their ids from being reused
        return tables[key][0]

    def _bound(self) -> dict | None:
        """ops.reverse_step's options for this configuration's bound on x0; None: it has none."""
        config = self.config
        if config.thresholding:
            largest, quantile = config.sample_max_value, config.dynamic_thresholding_ratio
            if largest == 1:  # max(1, quantile) is then 1, whatever the quantile
                return {"clip": 1.0}
            if not largest > 1 or not 0 <= quantile <= 1:
                return None
            return {"dynamic_threshold": quantile, "dynamic_threshold_max": largest}
        if self.clips and config.clip_sample:
            return {"clip": config.clip_sample_range} if config.clip_sample_range > 0 else None
        return {"clip": None}

    def _dtype(self, sample, model_output, channels: int = 1) -> torch.dtype | None:
        """That of the original's result, if the launch can have the same; model_output has
        `channels` times sample's."""
        if torch.compiler.is_compiling():
            return None
        for t in (sample, model_output):
            if type(t) not in (Tensor, torch.nn.Parameter) or t.dim() < 2 or not t.numel():
                return None
            if not t.is_floating_point() or t.device.type not in ("cpu", "cuda"):
                return None
        shape = (sample.shape[0], channels * sample.shape[1], *sample.shape[2:])
        if model_output.shape != shape or model_output.device != sample.device:
            return None
        if self.config.prediction_type == "sample" and sample.dtype != model_output.dtype:
            return None  # x0 then has the model's dtype, and x_next both's
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        return dtype if dtype in DTYPES else None

    def _launch(self, rows: Rows, row: int, x: Tensor, model_output: Tensor, noise, **options):
        """→ x_next, x0"""
        coeffs, index = rows.on(x.device)
        drawn = {"key": index[0]} if noise is None else {"noise": noise}  # without noise s is 0
        return ops.reverse_step(
            x, model_output, coeffs, index[row], **drawn, return_x0=True, impl=self.impl, **options
        )


def like(t, x: Tensor) -> bool:
    return type(t) is Tensor and t.shape == x.shape and t.device == x.device

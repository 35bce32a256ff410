"""The front door to the kernels: one file per op, with its validation and autograd.Function.

Every op takes `impl`: "auto" (ENGINE_BACKEND, else the first back end that does not refuse),
"eager", "native" or "triton". Inputs in contiguous or channels_last layout are read in place; any
other view is copied once to contiguous for native and triton, and `explain` says so.
"""

from .attention import attention, attention_qkv
from .explain import explain
from .forward_noise import forward_noise, forward_noise_loss
from .group_norm_silu import group_norm_silu
from .noise import INITIAL_NOISE, STEP_NOISE, TRAINING_NOISE, noise
from .reverse_step import reverse_step
from .rms_norm_silu import rms_norm_silu

__all__ = [
    "INITIAL_NOISE",
    "STEP_NOISE",
    "TRAINING_NOISE",
    "attention",
    "attention_qkv",
    "explain",
    "forward_noise",
    "forward_noise_loss",
    "group_norm_silu",
    "noise",
    "reverse_step",
    "rms_norm_silu",
]

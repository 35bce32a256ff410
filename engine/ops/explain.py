"""The table of back ends for one call."""

import inspect

from torch import Tensor

from .. import dispatch
from .attention import arguments as attention_arguments
from .attention import arguments_qkv as attention_qkv_arguments
from .forward_noise import arguments as forward_noise_arguments
from .group_norm_silu import arguments as group_norm_silu_arguments
from .layout import is_dense
from .noise import arguments as noise_arguments
from .reverse_step import arguments as reverse_step_arguments
from .rms_norm_silu import arguments as rms_norm_silu_arguments

ARGUMENTS = {  # op → its call's arguments as a back end gets them, checked
    "group_norm_silu": group_norm_silu_arguments,
    "rms_norm_silu": rms_norm_silu_arguments,
    "attention": attention_arguments,
    "attention_qkv": attention_qkv_arguments,  # q, k, v as views: the choice is attention's
    "reverse_step": reverse_step_arguments,
    "forward_noise": forward_noise_arguments,
    "noise": noise_arguments,
}


def explain(op: str, *args, **kwargs) -> None:
    """Prints which back ends would serve ops.<op>(*args, **kwargs), and which one `auto` takes.

    Raises ValueError for an unknown op and for arguments that ops.<op> would refuse too.
    """
    if op == "forward_noise_loss":
        raise ValueError(
            "explain: forward_noise_loss is served as forward_noise is: explain that, with the "
            "same x0, coeffs, t and key"
        )
    if op not in ARGUMENTS:
        raise ValueError(f"explain: unknown op {op!r}, expected one of {', '.join(ARGUMENTS)}")
    kwargs.pop("impl", None)
    signature = inspect.signature(ARGUMENTS[op])
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(f"explain: {error}, expected {op}{signature}") from None
    call = ARGUMENTS[op](*args, **kwargs)
    print(dispatch.table("attention" if op == "attention_qkv" else op, *call))
    if call[0].is_cuda and not dispatch.absence(op, "native"):
        for note in dispatch.module(op, "native").notes(op, call[0].device):
            print(f"  note: {note}")
    copied = [t for t in call if isinstance(t, Tensor) and t.dim() > 2 and not is_dense(t)]
    if op == "attention" and any(t.stride(-1) != 1 for t in call[:3]):
        print("  note: q, k or v has a stride along D; native and triton copy it once")
    if op == "attention_qkv" and (qkv := args[0] if args else kwargs["qkv"]).stride(-1) != 1:
        print(
            f"  note: qkv's channels have stride {qkv.stride(-1)}; native and triton copy it once"
        )
    in_place = ("group_norm_silu", "rms_norm_silu", "reverse_step", "forward_noise")
    if op in in_place and copied:
        print(
            f"  note: {len(copied)} tensor(s) neither contiguous nor channels_last (first: strides "
            f"{copied[0].stride()}); native and triton copy them once"
        )

"""Where a step's time goes, operator by operator: torch.profiler's self times, in groups."""

from collections import Counter
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

# Group → what its operators' names contain; the first that fits has it.
GROUPS = {
    "attention": ("scaled_dot_product", "attention", "Attention"),
    "convolution": ("convolution", "Convolution", "conv2d"),
    "norm and SiLU in one": ("engine::group_norm", "GroupNormSilu"),
    "norm": ("group_norm", "GroupNorm"),
    "SiLU": ("silu", "Silu"),
    "linear": ("addmm", "aten::mm", "bmm", "linear", "Addmm"),
    "concatenation": ("cat", "CatBackward"),
    "copies": ("aten::to", "copy", "clone", "contiguous", "fill_", "zero_", "ToCopy"),
    "additions": ("aten::add", "aten::sum", "AddBackward"),
    "division by 1": ("div", "Div"),
    "optimiser, clipping": ("adam", "Optimizer", "foreach", "norm"),
}


def group_of(operator: str) -> str:
    for group, parts in GROUPS.items():
        if any(part in operator for part in parts):
            return group
    return "everything else"


# Where a copy is made → what an operator is called that it is made for; the first that fits has it.
SITES = {
    "bias of a projection, put where its product is added": ("addmm",),
    "gradients of weights to float32": ("ToCopyBackward",),
    "gradients of weights to channels_last, by convolution_backward": ("onvolution",),
    "weights to bfloat16, by autocast": ("conv2d", "aten::linear"),
    "gradients that AdamW wants contiguous": ("Optimizer",),
    "zeros that upsampling's backward adds to": ("upsample",),
}


def site_of(event) -> str:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for site, parts in SITES.items():
        if any(part in name for name in names for part in parts):
            return site
    return "other"


def copies(call: Callable, calls: int = 3) -> dict[str, float]:
    """Milliseconds of a call's copies, by what they are made for."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(calls):
            call()
    found: Counter[str] = Counter()
    for event in recorded.events():
        if group_of(event.name) == "copies":
            found[site_of(event)] += event.self_cpu_time_total / 1e3 / calls
    return {site: round(ms, 2) for site, ms in found.most_common()}


def times(call: Callable, calls: int = 5) -> dict[str, float]:
    """Milliseconds of each group per call, the largest first."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(calls):
            call()
    found: Counter[str] = Counter()
    for event in recorded.key_averages():
        found[group_of(event.key)] += event.self_cpu_time_total / 1e3 / calls
    return {group: round(ms, 2) for group, ms in found.most_common()}

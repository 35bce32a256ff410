"""Where a step's time goes, operator by operator: torch.profiler's self times, in groups."""

from collections import Counter
from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

# Group → what its operators' names contain; the first that fits has it.
GROUPS = {
    "attention": ("scaled_dot_product", "attention", "Attention"),
    "convolution": ("convolution", "Convolution"),
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

"""group_norm_silu of a pair (a, b), read in place, on every back end."""

import pytest
import torch
from test_group_norm_silu import DTYPES, VARIANTS, as_layout, check, make_inputs

from engine import ops

OP = "group_norm_silu"

# name: (N, C, *S), groups, channels of the first half
PAIRS = {
    "seam in a group": ((2, 24, 5, 7), 2, 16),
    "seam at a border": ((2, 24, 4, 6), 3, 8),
    "one channel first": ((2, 12, 7, 9), 4, 1),
    "one channel last": ((1, 20, 4, 8), 2, 19),
    "one group": ((1, 12, 6, 5), 1, 5),
    "HW=1": ((3, 12, 1, 1), 3, 5),
    "C/G=1": ((2, 6, 4, 4), 6, 2),
    "several tiles": ((1, 6, 64, 66), 2, 4),
    "sequence": ((2, 8, 63), 2, 3),
    "vectors": ((3, 12), 3, 7),
    "volume": ((2, 8, 2, 3, 5), 2, 5),
}


def pair_inputs(name, dtype, variant, layouts):
    """make_inputs with x cut in two, each half in its own layout; → inputs, groups."""
    shape, groups, first = PAIRS[name]
    inputs = make_inputs(shape, dtype, variant)
    x = inputs.pop("x")
    a, b = x.split([first, shape[1] - first], 1)
    a, b = as_layout(a.clone(), layouts[0]), as_layout(b.clone(), layouts[1])
    return {"x": a, "x2": b, **inputs}, groups


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", PAIRS)
def test_pair(impl, name, layout, dtype):
    variant = ("add", "scale", "shift")
    same = (dtype == torch.float32) == (layout == "contiguous")
    dy_layout = "contiguous" if same else "channels_last"
    inputs, groups = pair_inputs(name, dtype, variant, (layout, layout))
    y = check(impl, inputs, groups, variant, dy_layout=dy_layout)
    shape = PAIRS[name][0]
    if len(shape) >= 4 and impl != "eager":
        assert y.stride() == as_layout(torch.empty(shape), layout).stride()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_pair_variants(impl, variant, layout):
    dtype = torch.float32 if layout == "contiguous" else torch.bfloat16
    inputs, groups = pair_inputs("seam in a group", dtype, VARIANTS[variant], (layout, layout))
    check(impl, inputs, groups, VARIANTS[variant], dy_layout=layout)


@pytest.mark.parametrize("name", ["seam in a group", "one channel first"])
@pytest.mark.parametrize("first", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("second", ["contiguous", "channels_last", "sliced"])
def test_pair_of_different_layouts(impl, name, first, second):
    """Read in place or refused in a sentence; a view is copied in the layout of the other half."""
    inputs, groups = pair_inputs(name, torch.float32, ("add",), (first, second))
    if impl != "native" or {first, second} != {"contiguous", "channels_last"}:
        check(impl, inputs, groups, ("add",))
    elif name != "one channel first":  # that channel is in both layouts
        with pytest.raises(RuntimeError, match="needs both halves of x in one layout"):
            ops.group_norm_silu((inputs["x"], inputs["x2"]), None, None, groups, impl=impl)
    check("auto", inputs, groups, ("add",))

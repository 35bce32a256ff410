"""Weights in bfloat16 beside their float32 masters, for the forward and backward pass of training.

Autocast casts every weight of a convolution or projection to bfloat16 in each forward pass, and its
gradient back to float32 in each backward pass. Here the bfloat16 weight is a leaf of the graph that
stays from step to step: its gradient stays bfloat16 until the optimiser reads it, and the optimiser
writes it anew with the master (update.py). The numbers are autocast's, bit for bit.

The parameters stay the float32 masters. What stands for a master notes the master's memory and its
version, which PyTorch counts up at every write in place, and is not taken once one of them has
changed: `with lows:` casts such weights again. A write that PyTorch does not count, through
`p.data.add_()`, NumPy or the step of a fused optimizer of its own, would go unseen until the next
one that it counts; nothing here does that.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DTYPE = torch.bfloat16


class Low:
    """A master's bfloat16 tensor."""

    def __init__(self, master: Tensor) -> None:
        self.tensor: Tensor | None = None
        self.address = None
        self.refresh(master)

    @torch.no_grad()
    def refresh(self, master: Tensor) -> None:
        mine = self.tensor
        if mine is None or mine.shape != master.shape or mine.stride() != master.stride():
            self.tensor = torch.empty_like(master, dtype=DTYPE)
        self.tensor.copy_(master).requires_grad_(master.requires_grad)
        self.written(master)

    def written(self, master: Tensor) -> None:
        """Notes that the two are alike now."""
        self.version = master._version
        if self.address != master.data_ptr():
            self.address = master.data_ptr()
            self.memory = master.detach()  # while it is held, no other tensor gets the address

    def stands_for(self, master: Tensor) -> bool:
        """Whether they are alike, and nobody waits for the master's own gradient."""
        return (
            self.version == master._version
            and self.address == master.data_ptr()
            and self.tensor.requires_grad == master.requires_grad
            and not (master._backward_hooks or master._post_accumulate_grad_hooks)
        )


class LayerLow:
    """What a layer's attribute `low` holds."""

    def __init__(self, owner: LowWeights) -> None:
        self.owner = owner
        self.weight: Low | None = None
        self.bias: Low | None = None

    def of(self, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
        """The layer's weight and bias in bfloat16 where autocast would cast them; else its own."""
        weight, bias = self.weight, self.bias
        if (
            weight is None
            or not (self.owner.on and layer.training and torch.is_grad_enabled())
            or not torch.is_autocast_enabled("cpu")
            or torch.get_autocast_dtype("cpu") != DTYPE
            or not weight.stands_for(layer.weight)
            or (layer.bias is None) != (bias is None)
            or not (bias is None or bias.stands_for(layer.bias))
        ):
            return layer.weight, layer.bias
        return weight.tensor, None if bias is None else bias.tensor

    def __reduce__(self):
        return type(None), ()  # a copy of the layer has its own weights alone


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """What the layer computes with."""
    return (layer.weight, layer.bias) if layer.low is None else layer.low.of(layer)


class LowWeights:
    """Of all layers of a model that have a `low`; theirs alone `with` this, in one thread."""

    def __init__(self, model: nn.Module) -> None:
        self.on = False
        self.found: dict[int, tuple[Low, Tensor]] = {}  # of each master, by its id
        self.layers = [layer for layer in model.modules() if hasattr(layer, "low")]
        for layer in self.layers:
            layer.low = LayerLow(self)

    @property
    def pairs(self) -> list[tuple[Low, Tensor]]:
        """Every bfloat16 tensor with its master."""
        return list(self.found.values())

    def __enter__(self) -> None:
        """Casts what has changed."""
        before, self.found = self.found, {}
        for layer in self.layers:
            layer.low.weight = self.low_of(layer.weight, before)
            layer.low.bias = self.low_of(layer.bias, before)
        self.on = True

    def low_of(self, master: Tensor | None, before: dict) -> Low | None:
        """The same of all layers that share the master, as autocast casts it once for them; none of
        a weight that is computed from others, which wait for its gradient."""
        if master is None or not master.is_leaf:
            return None
        if id(master) not in self.found:
            low, _ = before.get(id(master)) or (Low(master), None)
            if not low.stands_for(master):
                low.refresh(master)
            self.found[id(master)] = low, master
        return self.found[id(master)][0]

    def __exit__(self, *_) -> None:
        self.on = False

"""Sampling calls one network hundreds of times: its weights are brought into oneDNN's own layout
once, not at every call.

`prepacked(model, dtype)` is a twin of the model that shares everything with it except the
convolutions and the projections. Those hold their weights in `dtype`, in the blocks that oneDNN's
kernels read (at batch 1 a call that had to reorder them took 150-210 µs where it now takes 100),
and take a residual as the kernel's last operation, where eager reads and writes the image again. In
bfloat16, on a chip with AMX or AVX512_BF16, a kernel of our own takes oneDNN's place
(conv2d_bf16.py), whose call takes longer than the products of a small image; a pair is
then not concatenated, nor an image enlarged before its convolution. In float32 3×3 convolutions are
Winograd's (winograd.py). Norms go to their kernel without the checks of the front door. The model
itself stays as it is: it may be trained, copied or sampled by another thread meanwhile.
CPU and inference only. A twin is of the model as it was: its convolutions and projections keep the
weights of the moment when it was made or first ran, while norms and embeddings are the model's own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from . import conv2d_bf16, dispatch, winograd
from .blocks import (
    AttentionBlock,
    Conv2d,
    Downsample,
    GroupNormSiLU,
    Level,
    Linear,
    ResBlock,
    TimeEmbedding,
    Upsample,
    upsample_nearest,
)
from .device import PACKED, cannot_pack
from .embedded import Embedded, Product, Slice, share
from .ops.layout import is_dense, rows
from .unet import UNet

# Elements of a pair below which it is quicker to concatenate it than to convolve twice.
SMALL = 2**18


def prepacked(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A twin of `model` for inference on the CPU in `dtype`; takes what the model takes.

    dtype  float32 or bfloat16: what the layers cast to, as autocast does; none is needed around it

    Layers that are not exactly our Conv2d or Linear, or have hooks or parametrizations, stay
    themselves, and so do those that are packed already; what was compiled in place is not, in the
    twin. Raises ValueError for what is no module, another dtype, or a model that is not on the CPU.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"prepacked: model is {type(model).__name__}, expected an nn.Module")
    if dtype not in PACKED:
        raise ValueError(f"prepacked weights are float32 or bfloat16, not {dtype}")
    where = {p.device.type for p in model.parameters()}
    if where - {"cpu"}:
        raise ValueError(f"prepacked weights are for the CPU, the model is on {', '.join(where)}")
    twin = _twin(model, dtype)
    share(twin, _PackedLinear, lambda layer: _PackedLinear(layer, dtype))
    return twin


def for_sampling(model: Callable, prepack: bool | str = "auto") -> Callable:
    """What sampling calls in the model's place: its prepacked twin, or the model itself.

    "auto" takes the twin of a UNet that computes in float32 or bfloat16 on a CPU whose oneDNN has
    kernels for it. Raises ValueError for prepack=True where that does not hold.
    """
    if not isinstance(prepack, bool) and prepack != "auto":
        raise ValueError(f"prepack is {prepack!r}, expected True, False or 'auto'")
    if prepack is False:
        return model
    missing = _missing(model)
    if missing and prepack is True:
        raise ValueError(f"prepack=True needs {missing}: leave prepack out")
    if missing:
        return model
    twin = prepacked(model, _computes_in(model)).eval()
    return Embedded(twin) if _casts_by_itself(twin) else twin


def _casts_by_itself(twin: nn.Module) -> bool:
    """Whether nothing in it needs autocast: layers of others do, and hooks may."""
    ours = (UNet, TimeEmbedding, Level, ResBlock, AttentionBlock, Downsample, Upsample)
    ours += (GroupNormSiLU, nn.Embedding, nn.ModuleList, nn.Identity, nn.Dropout)
    ours += (_PackedConv2d, _PackedLinear, Product, Slice, _Norm)
    ours += (_Bf16Conv2d, _Bf16Linear, _Bf16Upsample, _WinogradConv2d, _WinogradUpsample)
    return all(type(m) in ours and not _changed(m) and not _patched(m) for m in twin.modules())


def _patched(module: nn.Module) -> bool:
    """Whether one of its methods was replaced, in this module alone."""
    return any(callable(getattr(type(module), name, None)) for name in module.__dict__)


def _changed(module: nn.Module) -> bool:
    """Whether its call is more, or another, than its forward."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return bool(hooks) or module._compiled_call_impl is not None


def _computes_in(model: UNet) -> torch.dtype:
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return model.conv_in.weight.dtype


def _missing(model: Callable) -> str:
    """What keeps the model from having a twin; "" for nothing."""
    if not isinstance(model, UNet):
        return f"a UNet, not {type(model).__name__}"
    if any(p.device.type != "cpu" for p in model.parameters()):
        return "a model on the CPU"
    if any(m._compiled_call_impl is not None for m in model.modules()):
        return "a model that is neither accelerated nor compiled"
    return cannot_pack(_computes_in(model))


def _is(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is of exactly this kind, and its call is what the kind's is."""
    return type(module) is kind and not _changed(module) and "forward" not in module.__dict__


def _twin(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A shallow copy of the tree: the same tensors under new modules."""
    by_kernel = dtype == torch.bfloat16 and conv2d_bf16.available()
    if _is(module, Conv2d) and module.padding_mode == "zeros":
        return _convolution(module, dtype)[0](module, dtype)
    if _is(module, Linear):
        return (_Bf16Linear if by_kernel else _PackedLinear)(module, dtype)
    if _is(module, GroupNormSiLU):
        return _Norm(module)
    if _is(module, Upsample) and _is(module.conv, Conv2d):
        _, kind = _convolution(module.conv, dtype)
        if kind is not None:
            return kind(module.conv, dtype)
    if isinstance(module, (_Packed, Slice, _Norm)):
        return module
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__ = dict(module.__dict__)
    twin._compiled_call_impl = None  # it would call the module itself, not the twin
    twin._modules = {
        name: None if child is None else _twin(child, dtype)
        for name, child in module._modules.items()
    }
    return twin


def _convolution(layer: Conv2d, dtype: torch.dtype) -> tuple[type, type | None]:
    """What takes its place, and what takes the place of nearest ×2 and it."""
    exact = dtype == torch.bfloat16 or layer.weight.dtype == torch.float32
    if exact and winograd.serves(layer, dtype):
        return _WinogradConv2d, _WinogradUpsample
    if dtype == torch.bfloat16 and conv2d_bf16.available() and conv2d_bf16.serves(layer):
        return _Bf16Conv2d, _Bf16Upsample
    return _PackedConv2d, None


class _Packed(nn.Module):
    """Packs at its first call, for the size of image that it then sees; others are right too."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer, self.dtype, self.packed = (layer,), dtype, None  # not a submodule

    @property
    def weight(self) -> Tensor:
        """The layer's own, for who asks for its dtype or shape."""
        return self.layer[0].weight

    def bias(self) -> Tensor | None:
        bias = self.layer[0].bias
        return None if bias is None else bias.detach().to(self.dtype, copy=True)


class _PackedConv2d(_Packed):
    def __init__(self, layer: Conv2d, dtype: torch.dtype) -> None:
        super().__init__(layer, dtype)
        self.packed = {}  # how many images are read as one → the weights of each

    def forward(self, x: Tensor | tuple[Tensor, Tensor], add: Tensor | None = None) -> Tensor:
        parts = x if isinstance(x, tuple) else (x,)
        if len(parts) == 2 and parts[0].numel() + parts[1].numel() < SMALL:
            parts = (torch.cat(parts, dim=1),)
        if parts[0].dtype != self.dtype:
            parts = [part.to(self.dtype) for part in parts]
        packed = self.packed.get(len(parts))
        if packed is None:
            packed = self.packed[len(parts)] = self.pack(parts)
        # In float32 oneDNN's 3×3 convolutions with an addition are other, slower ones: on AVX2 15.2
        # against 8.0 ms, 128 channels of 32×16×16.
        apart = self.dtype == torch.float32 and self.layer[0].kernel_size != (1, 1)
        for part, (weight, bias) in zip(parts, packed, strict=True):
            if add is None or apart:
                y = torch.ops.mkldnn._convolution_pointwise(
                    part, weight, bias, *self.geometry, "none", [], ""
                )
                add = y if add is None else y.add_(add)
            else:
                add = torch.ops.mkldnn._convolution_pointwise.binary(
                    part, add, weight, bias, *self.geometry, "add", None, None, [], None
                )
        return add

    def pack(self, parts: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor | None]]:
        """(weight, bias) of each part of the input; the last has the bias."""
        layer = self.layer[0]
        self.geometry = layer.padding, layer.stride, layer.dilation, layer.groups
        weight = layer.weight.detach().to(self.dtype)
        pieces = weight.split([part.shape[1] for part in parts], dim=1)
        biases = [None] * (len(parts) - 1) + [self.bias()]
        return [
            (
                torch._C._nn.mkldnn_reorder_conv2d_weight(
                    piece.contiguous().to_mkldnn(), *self.geometry, part.shape
                ),
                bias,
            )
            for part, piece, bias in zip(parts, pieces, biases, strict=True)
        ]


class _PackedLinear(_Packed):
    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        if self.packed is None:
            self.packed = self.pack(x.shape[:-1].numel())
        weight, bias = self.packed
        if add is None:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, add, weight, bias, "add")

    def pack(self, rows: int) -> tuple[Tensor, Tensor | None]:
        weight = self.layer[0].weight.detach().to(self.dtype).contiguous()
        return torch.ops.mkldnn._reorder_linear_weight(weight, rows), self.bias()


class _Bf16Conv2d(_PackedConv2d):
    """By our own kernel where the pictures lie as it reads them; else by oneDNN."""

    tiles = None

    def forward(self, x: Tensor | tuple[Tensor, Tensor], add: Tensor | None = None) -> Tensor:
        x, x2 = x if isinstance(x, tuple) else (x, None)
        if self.dtype != torch.bfloat16 or not conv2d_bf16.takes(x, x2, add):
            return super().forward(x if x2 is None else (x, x2), add)
        if self.tiles is None:
            self.tiles = conv2d_bf16.Tiles(self.layer[0])
        return self.tiles(x, x2, add)


class _Bf16Linear(_PackedLinear):
    """The same for a projection."""

    tiles = None

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        if not conv2d_bf16.projects(x, add):
            return super().forward(x, add)
        if self.tiles is None:
            self.tiles = conv2d_bf16.Tiles(self.layer[0])
        return self.tiles.project(x, add)


class _Bf16Upsample(_Bf16Conv2d):
    """Nearest ×2 and a 3×3 convolution, which reads the small image as if it were the large one."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        if not conv2d_bf16.takes(x):
            return super().forward(upsample_nearest(x))
        if self.tiles is None:
            self.tiles = conv2d_bf16.Tiles(self.layer[0])
        return self.tiles(x, upsample=True)


class _WinogradConv2d(_Bf16Conv2d):
    """3×3 where the products bound it: 16 where the convolution has 36. What it cannot read is the
    direct convolutions', ours in bfloat16."""

    transformed = None

    def forward(self, x: Tensor | tuple[Tensor, Tensor], add: Tensor | None = None) -> Tensor:
        parts = x if isinstance(x, tuple) else (x,)
        if not winograd.takes(*parts, add, dtype=self.dtype):
            return super().forward(x, add)
        return winograd.conv2d(x, *self.weights(), add)

    def weights(self) -> tuple[Tensor, Tensor | None]:
        if self.transformed is None:
            layer = self.layer[0]
            pack = winograd.packed if self.dtype == torch.float32 else winograd.packed_bf16
            bias = None if layer.bias is None else layer.bias.detach().to(torch.float32, copy=True)
            self.transformed = pack(layer.weight), bias
        return self.transformed


class _WinogradUpsample(_WinogradConv2d):
    """Nearest ×2 and such a convolution: 9 products, and the large image is not made."""

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        if not winograd.takes(x, dtype=self.dtype):
            return super().forward(upsample_nearest(x))
        return winograd.conv2d(x, *self.weights(), upsample=True)


class _Norm(nn.Module):
    """GroupNormSiLU, checked once for each kind of input, then its kernel without the front door:
    of which a step of batch 1 spent a twelfth."""

    def __init__(self, norm: GroupNormSiLU) -> None:
        super().__init__()
        self.norm, self.known = (norm,), {}

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        norm = self.norm[0]
        if torch.is_grad_enabled():
            return norm(x, add, scale, shift)
        first, second = x if isinstance(x, tuple) else (x, None)
        kind = [
            (t.shape, t.stride(), t.dtype) for t in (first, second, add, scale) if t is not None
        ]
        kind = (*kind, second is None, add is None)
        kernel = self.known.get(kind)
        if kernel is None:
            y = norm(x, add, scale, shift)
            self.known[kind] = self.kernel(norm, first, second, add, scale, shift)
            return y
        if kernel is False:
            return norm(x, add, scale, shift)
        args = norm.num_groups, norm.eps, norm.activation == "silu"
        return kernel(first, second, norm.weight, norm.bias, add, scale, shift, *args)[0]

    def kernel(self, norm, first, second, add, scale, shift) -> Callable | bool:
        """The native forward where `auto` takes it for these tensors as they lie; else False."""
        args = first, second, norm.weight, norm.bias, add, scale, shift
        args += norm.num_groups, norm.eps, norm.activation == "silu"
        if dispatch.pick("group_norm_silu", "auto", *args) != "native":
            return False
        dense = all(is_dense(t) for t in (first, second) if t is not None)
        small = all(
            rows(t) is t for t in (norm.weight, norm.bias, add, scale, shift) if t is not None
        )
        if not (dense and small and first.numel()):
            return False
        return dispatch.function("group_norm_silu", "fwd", "native")

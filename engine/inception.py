"""Inception-v3 (Szegedy et al. 2016) as in FID: features before the classifier, and its logits.

The graph is that of TensorFlow's model of 2015-12-05, which every published FID rests on: average
pools leave the padding out, the last block pools by maximum, 1008 classes, pictures are resized by
TensorFlow 1's bilinear rule. Layers have the names of the weights file that torch-fidelity and
pytorch-fid distribute. Nothing is downloaded.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FILES = (
    "weights-inception-2015-12-05-6726825d.pth",  # torch-fidelity's
    "pt_inception-2015-12-05-6726825d.pth",  # pytorch-fid's
)
FEATURES = 2048


class Conv(nn.Module):
    """relu(bn(conv(x))), no bias; "same" padding unless strided."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int], stride: int, pad: bool):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if pad else 0
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Paths of convolutions side by side, then a pool and its convolution; their concatenation.

    A path is (name, width, kernel) after (name, width, kernel) …; a list of two ends it as a fork.
    `pool` is "avg", "max" (3×3, stride 1) or "stride" (3×3 maximum, stride 2, as the paths' last).
    """

    def __init__(self, c_in: int, paths: list[list], pool: str, pool_width: int = 0) -> None:
        super().__init__()
        self.paths, self.pool, self.width = [], pool, pool_width or c_in
        for path in paths:
            c, names = c_in, []
            for place, layer in enumerate(path):
                stride = 2 if pool == "stride" and place == len(path) - 1 else 1
                fork = layer if isinstance(layer, list) else [layer]
                for name, width, kernel in fork:
                    self.add_module(name, Conv(c, width, kernel, stride, stride == 1))
                names.append([name for name, _, _ in fork])
                c = sum(width for _, width, _ in fork)
            self.paths.append(names)
            self.width += c
        if pool_width:
            self.branch_pool = Conv(c_in, pool_width, (1, 1), 1, True)

    def forward(self, x: Tensor) -> Tensor:
        outs = []
        for path in self.paths:
            h = x
            for names in path:
                h = torch.cat([self.get_submodule(name)(h) for name in names], 1)
            outs.append(h)
        if self.pool == "stride":
            return torch.cat([*outs, F.max_pool2d(x, 3, 2)], 1)
        if self.pool == "max":
            h = F.max_pool2d(x, 3, 1, 1)
        else:
            h = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*outs, self.branch_pool(h)], 1)


def _path(name: str, *layers: tuple[int, tuple[int, int]], start: int = 1) -> list:
    if len(layers) == 1:
        return [(name, *layers[0])]
    return [(f"{name}_{i}", *layer) for i, layer in enumerate(layers, start)]


def _fork(name: str, width: int) -> list:
    return [(f"{name}a", width, (1, 3)), (f"{name}b", width, (3, 1))]


def _blocks() -> dict[str, tuple]:
    """Name → paths, pool, width of the pool's convolution (Szegedy et al. 2016, fig. 5–7, 10)."""
    one, three, five, row, column = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)
    double = _path("branch3x3dbl", (64, one), (96, three), (96, three))
    blocks = {}
    for letter, pool in zip("bcd", (32, 64, 64), strict=True):
        wide = _path("branch5x5", (48, one), (64, five))
        blocks[f"Mixed_5{letter}"] = ([[("branch1x1", 64, one)], wide, double], "avg", pool)
    blocks["Mixed_6a"] = ([[("branch3x3", 384, three)], double], "stride")
    for letter, c in zip("bcde", (128, 160, 160, 192), strict=True):
        short = _path("branch7x7", (c, one), (c, row), (192, column))
        layers = ((c, one), (c, column), (c, row), (c, column), (192, row))
        long = _path("branch7x7dbl", *layers)
        blocks[f"Mixed_6{letter}"] = ([[("branch1x1", 192, one)], short, long], "avg", 192)
    short = _path("branch3x3", (192, one), (320, three))
    long = _path("branch7x7x3", (192, one), (192, row), (192, column), (192, three))
    blocks["Mixed_7a"] = ([short, long], "stride")
    for letter, pool in zip("bc", ("avg", "max"), strict=True):
        short = [("branch3x3_1", 384, one), _fork("branch3x3_2", 384)]
        long = [*_path("branch3x3dbl", (448, one), (384, three)), _fork("branch3x3dbl_3", 384)]
        blocks[f"Mixed_7{letter}"] = ([[("branch1x1", 320, one)], short, long], pool, 192)
    return blocks


class Inception(nn.Module):
    """Pictures (N, 3, H, W) uint8 → features (N, 2048), logits (N, 1008) without the bias, float32.

    The bias is left out as in the Inception Score's reference (Salimans et al. 2016).
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, (3, 3), 2, False)
        self.Conv2d_2a_3x3 = Conv(32, 32, (3, 3), 1, False)
        self.Conv2d_2b_3x3 = Conv(32, 64, (3, 3), 1, True)
        self.Conv2d_3b_1x1 = Conv(64, 80, (1, 1), 1, True)
        self.Conv2d_4a_3x3 = Conv(80, 192, (3, 3), 1, False)
        width, self.blocks = 192, []
        for name, block in _blocks().items():
            self.add_module(name, Mixed(width, *block))
            width = self.get_submodule(name).width
            self.blocks.append(name)
        self.fc = nn.Linear(width, 1008)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = (resize(pixels.float(), 299) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


def resize(x: Tensor, size: int) -> Tensor:
    """Bilinear (N, C, H, W) → (N, C, size, size) with TensorFlow 1's corners: source = i·H/size."""
    for dim in (2, 3):
        length = x.shape[dim]
        at = torch.arange(size, device=x.device, dtype=torch.float32) * (length / size)
        low = at.long()
        high = (low + 1).clamp(max=length - 1)
        weight = (at - low).view(-1, *[1] * (3 - dim))
        below, above = x.index_select(dim, low), x.index_select(dim, high)
        x = below + (above - below) * weight
    return x


def find(given: str | os.PathLike | None = None) -> Path:
    """The weights file: `given`, else in torch.hub's cache. ValueError, one sentence, if neither.

    A folder may be given that holds the file under one of its usual names.
    """
    place = Path(torch.hub.get_dir(), "checkpoints") if given is None else Path(given).expanduser()
    for path in (place, *(place / name for name in FILES)):
        if path.is_file():
            return path
    where = f"at {place}" if given is not None else f"in {place} (torch.hub's cache)"
    raise ValueError(
        f"no Inception weights {where}: nothing is downloaded, so put torch-fidelity's file "
        f"{FILES[0]} there or name it with --inception-weights, or use --features domain"
    )


def load(path: Path) -> Inception:
    """The network with the file's weights, in eval mode. ValueError for a file of another kind."""
    model = Inception()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
    except Exception as error:  # torch.load raises half a dozen kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} does not hold the Inception weights of torch-fidelity: {reason}"
        ) from None
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)

"""Convolution and projection of bfloat16: the weights as csrc/cpu/conv2d_bf16.cpp reads them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(weight: Tensor) -> Tensor:
    """(Co, C, k, k), or (Co, C), as tiles: (Co / 16, C / 32 · k², 16, 16, 2) bfloat16.

    A tile has 32 channels of the source for 16 of the result, pairs of neighbours together; what is
    missing to 16 and to 32 is zero. Of several sources the tiles follow each other: torch.cat of
    their packs along dimension 1.
    """
    co, c = weight.shape[:2]
    taps = weight.reshape(co, c, -1).to(torch.bfloat16)
    padded = F.pad(taps, (0, 0, 0, -c % 32, 0, -co % 16))
    tiles = padded.reshape(-(-co // 16), 16, -(-c // 32), 16, 2, taps.shape[2])
    # tile of the result, its channel, block of the source, pair, which of it, tap
    return tiles.permute(0, 2, 5, 3, 1, 4).flatten(1, 2).contiguous()

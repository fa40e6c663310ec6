"""Weights as 8-bit floats (e4m3: a sign, four bits of exponent, three of mantissa), with a scale for each row or block.

A row's scale puts its largest weight at the largest number, 448. A block of 128 x 128 has one scale, as in DeepSeek-V3
(arXiv 2412.19437, 3.3), which is stored once for each of its rows: matrices are then put together and taken apart by
rows, and blocks begin where a matrix begins.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from engine.quant.format import WeightFormat
from kernels.weights import FP8_GROUP

SCALE_MIN = torch.finfo(torch.float32).tiny  # below it fp32 has fewer bits
GREATEST = torch.finfo(torch.float8_e4m3fn).max  # 448


def quantize_rows(weight: Tensor) -> Mapping[str, Tensor]:
    """Rounds each row to e4m3 of its largest magnitude / 448."""
    weight = weight.float()
    scale = _scale(weight.abs().amax(1, keepdim=True))  # (out, 1)
    return {"q": _narrow(weight / scale), "scale": scale}


def quantize_blocks(weight: Tensor) -> Mapping[str, Tensor]:
    """Rounds each block of 128 x 128, smaller at the edges, to e4m3 of its largest magnitude / 448."""
    weight = weight.float()
    num_out, num_in = weight.shape
    padded = functional.pad(weight.abs(), (0, -num_in % FP8_GROUP, 0, -num_out % FP8_GROUP))
    blocks = padded.view(len(padded) // FP8_GROUP, FP8_GROUP, -1, FP8_GROUP)
    scale = _scale(blocks.amax((1, 3))).repeat_interleave(FP8_GROUP, dim=0)[:num_out]  # (out, groups)
    by_weight = scale.repeat_interleave(FP8_GROUP, dim=1)[:, :num_in]
    return {"q": _narrow(weight / by_weight), "scale": scale}


def num_blocks(num_in: int) -> int:
    """Of 128, the last one perhaps shorter."""
    return -(-num_in // FP8_GROUP)


def _scale(magnitude: Tensor) -> Tensor:
    scale = magnitude / GREATEST
    return torch.where(scale >= SCALE_MIN, scale, 1.0)  # what is smaller becomes zeros


def _narrow(weight: Tensor) -> Tensor:
    # Rounding may lead a hair above 448, for which torch has NaN.
    return weight.clamp(-GREATEST, GREATEST).to(torch.float8_e4m3fn)


# The head chooses among all tokens by small differences: int8 is four times as exact, in as many bits.
PER_ROW = WeightFormat(layout="fp8", bits=8, head="int8", quantize=quantize_rows)
IN_BLOCKS = WeightFormat(
    layout="fp8", bits=8 + 32 / FP8_GROUP, head="int8", quantize=quantize_blocks, num_groups=num_blocks
)

"""Weights as int8 with one scale per output channel, symmetric about 0."""

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.quant.format import WeightFormat

LEVEL_MAX = 127  # -128 stays unused, so that the levels are symmetric and a weight's negative is its level's negative


def quantize(weight: Tensor) -> Mapping[str, Tensor]:
    """Rounds each row to multiples of its largest magnitude / 127.

    The scale is one that bf16 holds exactly, since backends multiply by it in bf16; the levels make up for its
    rounding.
    """
    weight = weight.float()
    scale = (weight.abs().amax(1) / LEVEL_MAX).bfloat16().float()  # (out,)
    step = torch.where(scale > 0, scale, 1.0)  # a row of zeros stays zeros
    q = (weight / step[:, None]).round().clamp(-LEVEL_MAX, LEVEL_MAX).to(torch.int8)
    return {"q": q, "scale": scale}


FORMAT = WeightFormat(layout="int8", bits=8, head="int8", quantize=quantize)

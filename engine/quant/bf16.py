"""Weights as bfloat16, unquantized."""

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.quant.format import WeightFormat


def quantize(weight: Tensor) -> Mapping[str, Tensor]:
    """Rounds to the nearest bf16."""
    return {"weight": weight.to(torch.bfloat16).contiguous()}


FORMAT = WeightFormat(layout="bf16", bits=16, head="bf16", quantize=quantize)

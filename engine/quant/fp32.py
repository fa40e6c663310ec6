"""Weights as float32, unquantized."""

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.quant.format import WeightFormat


def quantize(weight: Tensor) -> Mapping[str, Tensor]:
    """Exact for every narrower float."""
    return {"weight": weight.to(torch.float32).contiguous()}


FORMAT = WeightFormat(layout="fp32", bits=32, head="fp32", quantize=quantize)

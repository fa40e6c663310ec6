"""Weights as bfloat16, unquantized."""

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.quant.format import WeightFormat
from kernels.weights import dequantize_dense


def quantize(weight: Tensor) -> Mapping[str, Tensor]:
    """Rounds to the nearest bf16."""
    return {"weight": weight.to(torch.bfloat16).contiguous()}


FORMAT = WeightFormat(bits=16, head="bf16", quantize=quantize, dequantize=dequantize_dense)

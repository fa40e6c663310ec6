"""Weights as 4-bit integers in groups of 32 along `in`, each group with its own scale and zero point.

Asymmetric: half a bit more for the zero point, and the 16 levels span exactly the group's range, where symmetric ones
waste levels on the side without the outlier.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.quant.format import WeightFormat
from kernels.weights import INT4_GROUP, INT4_MIDDLE, dequantize_int4, pack_int4

NUM_STEPS = 15  # between 16 levels


def quantize(weight: Tensor) -> Mapping[str, Tensor]:
    """Rounds each group to 16 even levels from its least to its greatest weight.

    The levels are those of the scale and zero point as stored, in bf16, so that their own rounding is made up for.
    Raises ValueError where `in` does not fall into groups of 32.
    """
    if weight.shape[1] % INT4_GROUP:
        raise ValueError(f"int4 needs a multiple of {INT4_GROUP} input features, not {weight.shape[1]}: use int8")
    groups = weight.float().reshape(len(weight), -1, INT4_GROUP)  # (out, groups, 32)
    least, greatest = groups.aminmax(dim=2)  # (out, groups) each
    scale = ((greatest - least) / NUM_STEPS).bfloat16()
    zero = (least + scale.float() * INT4_MIDDLE).bfloat16()
    step = torch.where(scale > 0, scale.float(), 1.0)[..., None]
    levels = ((groups - zero.float()[..., None]) / step + INT4_MIDDLE).round().clamp(0, NUM_STEPS)
    return {"q": pack_int4(levels.flatten(1)), "scale": scale, "zero": zero}


# 4 bits + two bf16 for every 32. The head chooses among all tokens by small differences: it gets 8 bits.
FORMAT = WeightFormat(bits=5, head="int8", quantize=quantize, dequantize=dequantize_int4)

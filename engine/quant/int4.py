"""Weights as 4-bit integers in groups of 32, 64 or 128 along `in`, each group with its own scale and zero point.

Asymmetric: the 16 levels span exactly the group's range, where symmetric ones waste levels on the side without the
outlier. The smaller the group, the fewer neighbours an outlier spoils: 32 is GGUF's, and the default; 128 is that of
most published checkpoints.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from engine.quant.format import WeightFormat
from kernels.weights import INT4_GROUP, INT4_MIDDLE, pack_nibbles

NUM_STEPS = 15  # between 16 levels


def quantize(group_max: int, weight: Tensor) -> Mapping[str, Tensor]:
    """Rounds each group to 16 even levels from its least to its greatest weight.

    The levels are those of the scale and zero point as stored, in bf16, so that their own rounding is made up for.
    Raises ValueError where `in` does not fall into groups of 32.
    """
    if weight.shape[1] % INT4_GROUP:
        raise ValueError(f"int4 needs a multiple of {INT4_GROUP} input features, not {weight.shape[1]}: use int8")
    groups = weight.float().view(len(weight), num_groups(group_max, weight.shape[1]), -1)  # (out, groups, group)
    least, greatest = groups.aminmax(dim=2)  # (out, groups) each
    scale = ((greatest - least) / NUM_STEPS).bfloat16()
    zero = (least + scale.float() * INT4_MIDDLE).bfloat16()
    step = torch.where(scale > 0, scale.float(), 1.0)[..., None]
    levels = ((groups - zero.float()[..., None]) / step + INT4_MIDDLE).round().clamp(0, NUM_STEPS)
    return {"q": pack_nibbles(levels.flatten(1)), "scale": scale, "zero": zero}


def num_groups(group_max: int, num_in: int) -> int:
    """Groups of `group_max`, or of its half or quarter where `num_in` does not fall into such."""
    group = group_max
    while num_in % group and group > INT4_GROUP:
        group //= 2
    return num_in // group


def _format(group: int) -> WeightFormat:
    return WeightFormat(
        layout="int4",
        bits=4 + 2 * 16 / group,  # and two bf16 for each group
        head="int8",  # it chooses among all tokens by small differences
        quantize=partial(quantize, group),
        num_groups=partial(num_groups, group),
    )


FORMAT, FORMAT_64, FORMAT_128 = map(_format, (32, 64, 128))

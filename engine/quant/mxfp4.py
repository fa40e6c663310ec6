"""Weights as 4-bit floats (e2m1) in groups of 32 that share a power of two: GPT-OSS's.

Source: OCP Microscaling Formats (MX) Specification 1.0, 5.3.3 and 6.3.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from engine.quant.format import WeightFormat
from kernels.weights import E2M1, E8M0_BIAS, MXFP4_GROUP, pack_nibbles

EXPONENT_MAX = 2  # of e2m1's largest, 6 = 1.5 * 2^2
SIGN = 8


def quantize(weight: Tensor) -> Mapping[str, Tensor]:
    """Rounds each group to e2m1 times the power of two that brings its largest magnitude to 4 .. 8; 6 is the largest.

    Raises ValueError where `in` does not fall into groups of 32.
    """
    if weight.shape[1] % MXFP4_GROUP:
        raise ValueError(f"mxfp4 needs a multiple of {MXFP4_GROUP} input features, not {weight.shape[1]}: use fp8")
    groups = weight.float().view(len(weight), -1, MXFP4_GROUP)  # (out, groups, 32)
    _, exponent = groups.abs().amax(2).frexp()  # of m * 2^exponent, 0.5 <= m < 1
    exponent = (exponent - 1 - EXPONENT_MAX).clamp(-E8M0_BIAS, E8M0_BIAS)
    scaled = torch.ldexp(groups, -exponent[..., None])
    between = torch.tensor([(low + high) / 2 for low, high in pairwise(E2M1)], device=weight.device)
    levels = torch.bucketize(scaled.abs().contiguous(), between) + SIGN * (scaled < 0)
    return {"q": pack_nibbles(levels.flatten(1)), "scale": (exponent + E8M0_BIAS).to(torch.uint8)}


FORMAT = WeightFormat(
    layout="mxfp4",
    bits=4 + 8 / MXFP4_GROUP,  # and a byte for each group
    head="int8",  # as in int4.py
    quantize=quantize,
    num_groups=lambda num_in: num_in // MXFP4_GROUP,
)

"""Integers packed into words, and what weights of integers become.

Owns the common ground of GPTQ, AWQ and compressed-tensors: unsigned levels, with a scale and a zero point for each
group of inputs: weight = (level - zero) * scale.
"""

import torch
from torch import Tensor

from engine.quant import Kept
from kernels.weights import INT4_GROUP, INT4_MIDDLE, pack_nibbles

WORD_BITS = 32
INT8_MIDDLE = 128


def unpack_words(words: Tensor, bits: int, dim: int) -> Tensor:
    """The integers, as uint8, that each int32 of a matrix holds, the lowest bits first, side by side along `dim`."""
    fields = [((words >> shift) & ((1 << bits) - 1)).to(torch.uint8) for shift in range(0, WORD_BITS, bits)]
    return torch.stack(fields, dim=dim + 1).flatten(dim, dim + 1)


def keep_levels(
    levels: Tensor, zero: Tensor, scale: Tensor, bits: int, group: int, group_of: Tensor | None = None
) -> Kept:
    """The weight of levels (out, in) uint8, with zero and scale (out, groups): to the bit, in the smallest layout.

    A group is `group` neighbours along `in`, the last perhaps fewer, unless `group_of` (in,) names the group of each
    input, as GPTQ's order by activation does.

    Four bits are int4 where the groups are neighbours and fall into groups of 32; eight are int8 where each row has one
    scale and the middle for its zero. All else becomes floats. Raises ValueError where `group_of` names groups that are
    not there.
    """
    num_in, num_groups = levels.shape[1], scale.shape[1]
    neighbours = torch.arange(num_in) // group
    group_of = neighbours if group_of is None else group_of.long()
    if not 0 <= int(group_of.min()) <= int(group_of.max()) < num_groups:
        raise ValueError(f"it names groups other than 0 .. {num_groups - 1}")
    scale, regular = scale.float(), torch.equal(group_of, neighbours)
    if bits == 4 and regular and num_in % group == 0 and group % INT4_GROUP == 0:
        zeros = (INT4_MIDDLE - zero.float()) * scale
        return Kept("int4", {"q": pack_nibbles(levels), "scale": scale, "zero": zeros})
    if bits == 8 and num_groups == 1 and bool((zero == INT8_MIDDLE).all()):
        return Kept("int8", {"q": (levels ^ INT8_MIDDLE).view(torch.int8), "scale": scale[:, 0].contiguous()})
    return Kept.plain((levels.float() - zero.float()[:, group_of]) * scale[:, group_of])

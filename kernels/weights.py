"""How quantized weights are stored, and what they stand for.

Owns the meaning of the int8 and int4 parts: the engine's formats make them, every backend's `prepare` reads them. Never
chooses how to multiply. A weight is (out, in), as checkpoints keep it; `parts` is a mapping from name to tensor.

    dense   {"weight": (out, in) fp32 or bf16}
    int8    {"q": (out, in) int8, "scale": (out,) fp32}                    weight = q * scale
    int4    {"q": (out, in / 2) uint8, "scale", "zero": (out, in / 32)}    weight = (nibble - 8) * scale + zero

An int4 byte holds two neighbours along `in`, the first in the low nibble. A group is 32 neighbours along `in`, so `in`
is a multiple of 32; its scale and zero are bf16.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]

# 32 as in GGUF's Q4 formats: one outlier spoils 31 neighbours. Scale and zero in bf16 make it 5 bits a weight.
INT4_GROUP = 32
INT4_MIDDLE = 8  # nibbles 0..15 stand for -8..7, and `zero` is the value of the middle one


def dequantize_dense(parts: Parts) -> Tensor:
    """(out, in) as stored."""
    return parts["weight"]


def dequantize_int8(parts: Parts) -> Tensor:
    """(out, in) fp32."""
    return parts["q"].float() * parts["scale"].float()[:, None]


def dequantize_int4(parts: Parts) -> Tensor:
    """(out, in) fp32."""
    levels = unpack_int4(parts["q"]).float() - INT4_MIDDLE  # (out, in)
    groups = levels.view(len(levels), -1, INT4_GROUP)  # (out, groups, 32)
    return groups.mul_(parts["scale"].float()[..., None]).add_(parts["zero"].float()[..., None]).flatten(1)


def pack_int4(levels: Tensor) -> Tensor:
    """Integers 0..15 (out, in), `in` even -> bytes (out, in / 2)."""
    levels = levels.to(torch.uint8)
    return levels[:, 0::2] | (levels[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`: uint8 0..15 (out, in)."""
    return torch.stack([packed & 0xF, packed >> 4], dim=2).flatten(1)

"""How weights are stored, and what they stand for.

Owns the meaning of every layout's parts: the engine's formats and its readers of checkpoints make them, every backend's
`prepare` reads them. Never chooses how to multiply. A weight is (out, in), as checkpoints keep it; `parts` is a mapping
from name to tensor, whose first dimension is `out` in every part, so that matrices are put together part by part.

    fp32, bf16   {"weight": (out, in)}
    int8         {"q": (out, in) int8, "scale": (out,) fp32}                 weight = q * scale
    int4         {"q": (out, in / 2) uint8, "scale", "zero": (out, groups)}  weight = (nibble - 8) * scale + zero
    fp8          {"q": (out, in) e4m3, "scale": (out, groups) fp32}          weight = q * scale
    mxfp4        {"q": (out, in / 2) uint8, "scale": (out, in / 32) uint8}   weight = e2m1(nibble) * 2^(scale - 127)

A byte of nibbles holds two neighbours along `in`, the first in the low one. Scales belong to groups of neighbours along
`in`. Ours are numbers that bf16 holds; those that others publish may have more bits, of which a backend may keep what
bf16 keeps: that changes a scale by 2^-8 at most, and a zero, of up to 8 steps, by 1/32 of a step.

    int8    all of a row
    int4    in / groups of them, a multiple of 32; scale and zero are bf16 or fp32
    fp8     all of a row, or 128 (the last group may be shorter)
    mxfp4   32; e2m1 is a sign, two bits of exponent and one of mantissa (OCP Microscaling Formats 1.0)
"""

from collections.abc import Callable, Mapping
from math import gcd

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]

# The smallest group of int4, which every backend reads: larger ones are repeated to it (`int4_by`).
INT4_GROUP = 32
INT4_MIDDLE = 8  # nibbles 0..15 stand for -8..7, and `zero` is the value of the middle one
FP8_GROUP = 128  # DeepSeek-V3's (arXiv 2412.19437, 3.3) and Qwen3's blocks are 128 x 128
MXFP4_GROUP = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the lower three bits; the fourth is the sign
E8M0_BIAS = 127


def dequantize_dense(parts: Parts) -> Tensor:
    """(out, in) as stored."""
    return parts["weight"]


def dequantize_int8(parts: Parts) -> Tensor:
    """(out, in) fp32."""
    return parts["q"].float() * parts["scale"].float()[:, None]


def dequantize_int4(parts: Parts) -> Tensor:
    """(out, in) fp32."""
    levels = unpack_nibbles(parts["q"]).float() - INT4_MIDDLE  # (out, in)
    groups = levels.view(*parts["scale"].shape, -1)  # (out, groups, group)
    return groups.mul_(parts["scale"].float()[..., None]).add_(parts["zero"].float()[..., None]).flatten(1)


def dequantize_fp8(parts: Parts) -> Tensor:
    """(out, in) fp32."""
    q, scale = parts["q"].float(), parts["scale"]
    if scale.shape[1] > 1:
        scale = scale.repeat_interleave(FP8_GROUP, dim=1)[:, : q.shape[1]]
    return q * scale


def dequantize_mxfp4(parts: Parts) -> Tensor:
    """(out, in) fp32, exact in bf16 too: two bits of precision and an exponent that bf16 has."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=parts["q"].device)
    values = table[unpack_nibbles(parts["q"]).int()].view(*parts["scale"].shape, -1)  # (out, groups, 32)
    return torch.ldexp(values, parts["scale"].int()[..., None] - E8M0_BIAS).flatten(1)


DEQUANTIZE: Mapping[str, Callable[[Parts], Tensor]] = {
    "fp32": dequantize_dense,
    "bf16": dequantize_dense,
    "int8": dequantize_int8,
    "int4": dequantize_int4,
    "fp8": dequantize_fp8,
    "mxfp4": dequantize_mxfp4,
}
"""By layout."""


def int4_group(parts: Parts) -> int:
    """How many neighbours along `in` share a scale."""
    return 2 * parts["q"].shape[1] // parts["scale"].shape[1]


def int4_by(parts: Parts, group: int) -> Parts:
    """The same int4 weight in groups of `group`, of which its own are multiples, scales and zeros in bf16."""
    return {name: part if name == "q" else part.bfloat16() for name, part in _regrouped(parts, group).items()}


def _regrouped(parts: Parts, group: int) -> Parts:
    """The same int4 weight in groups of `group`, of which its own are multiples."""
    repeats = int4_group(parts) // group
    return {"q": parts["q"], **{name: parts[name].repeat_interleave(repeats, dim=1) for name in ("scale", "zero")}}


def cut_inputs(layout: str, parts: Parts, inputs: range) -> Parts:
    """The columns `inputs` of the weight alone, as views where that can be. int4 has smaller groups where one is cut.

    Raises ValueError where a group would be cut that cannot.
    """
    if layout == "int4" and (group := gcd(int4_group(parts), inputs.start, inputs.stop)) % INT4_GROUP == 0:
        parts = _regrouped(parts, group)
    return {name: _columns(part, inputs, _inputs_of_column(layout, name, parts)) for name, part in parts.items()}


def _inputs_of_column(layout: str, name: str, parts: Parts) -> int | None:
    """How many inputs a column of the part is for; None: all of them."""
    match layout, name:
        case ("int4" | "mxfp4", "q"):
            return 2
        case ("int4", _):
            return int4_group(parts)
        case ("mxfp4", _):
            return MXFP4_GROUP
        case ("fp8", "scale"):
            return FP8_GROUP if parts["scale"].shape[1] > 1 else None
        case ("int8", "scale"):
            return None
    return 1


def _columns(part: Tensor, inputs: range, each: int | None) -> Tensor:
    if each is None:
        return part
    start, stop = inputs.start // each, -(-inputs.stop // each)
    # The last group of FP8's may be shorter.
    if inputs.start % each or (inputs.stop % each and stop != part.shape[1]):
        raise ValueError(f"inputs {inputs.start} to {inputs.stop} are not whole groups of {each}")
    return part[:, start:stop]


def pack_nibbles(levels: Tensor) -> Tensor:
    """Integers 0..15 (out, in), `in` even -> bytes (out, in / 2)."""
    levels = levels.to(torch.uint8)
    return levels[:, 0::2] | (levels[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`: uint8 0..15 (out, in)."""
    return torch.stack([packed & 0xF, packed >> 4], dim=2).flatten(1)

"""Weights as the C++ kernels read them: each block of 64 output features one sequential stream.

Owns the layout on this side; `matmul.h` reads it. A lane of a register is one output feature and takes 4 bytes at a
time, which are consecutive inputs. Scales stand in the stream before what they scale. Missing features are zeros.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor
from torch.nn import functional

from kernels.weights import E8M0_BIAS, FP8_GROUP, INT4_GROUP, Parts, int4_by, int4_group, unpack_nibbles

BLOCK = 64
FP8_NAN = 0x7F  # and its negative
WIDE_GROUP = 64  # as activations have: half the scales to read, and half as often


@dataclass(frozen=True)
class Packed:
    """One matrix (out, in)."""

    data: Tensor  # (blocks, bytes) uint8
    format: int  # the kernels' number of it
    out: int


@dataclass(frozen=True)
class PackedExperts(Sequence[Packed]):
    """The matrices of all experts, one behind the other."""

    data: Tensor  # (E, blocks, bytes) uint8
    format: int
    out: int

    def __len__(self) -> int:
        return len(self.data)

    @overload
    def __getitem__(self, index: int) -> Packed: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Packed]: ...
    def __getitem__(self, index: int | slice) -> Packed | Sequence[Packed]:
        data = self.data[index]
        kind = Packed if isinstance(index, int) else PackedExperts
        return kind(data, self.format, self.out)


def stack(matrices: Sequence[Packed]) -> PackedExperts:
    """Matrices of one shape."""
    return PackedExperts(torch.stack([matrix.data for matrix in matrices]), matrices[0].format, matrices[0].out)


def pack_fp32(parts: Parts) -> Packed:
    """One input a lane."""
    return Packed(_bytes(_in_blocks(parts["weight"].float(), 1)), FORMATS["fp32"], len(parts["weight"]))


def pack_bf16(parts: Parts) -> Packed:
    """Two inputs a lane."""
    weight = _in_blocks(parts["weight"].bfloat16(), 2)  # (blocks, in / 2, 64, 2)
    return Packed(_bytes(weight), FORMATS["bf16"], len(parts["weight"]))


def pack_int8(parts: Parts) -> Packed:
    """Four inputs a lane, as w + 128, behind the block's scales in fp32."""
    q = _in_blocks(parts["q"].view(torch.uint8) ^ 128, 4, padding=128)  # (blocks, in / 4, 64, 4)
    scale = _in_blocks(parts["scale"].float()[:, None], 1)
    return Packed(torch.cat([_bytes(scale), _bytes(q)], dim=1), FORMATS["int8"], len(parts["q"]))


def pack_int4(parts: Parts) -> Packed:
    """By groups of 64 or 32: scales, zeros, nibbles."""
    name = "int4" if int4_group(parts) % WIDE_GROUP else "int4_by_64"
    group = INT4_GROUP if name == "int4" else WIDE_GROUP
    parts = int4_by(parts, group)
    return _pack_nibbles(parts["q"], [parts["scale"], parts["zero"]], name)


def pack_mxfp4(parts: Parts) -> Packed:
    """By groups of 32: scales of halves, nibbles. What e2m1 stands for is halves."""
    scale = torch.ldexp(torch.full(parts["scale"].shape, 0.5), parts["scale"].int() - E8M0_BIAS)
    return _pack_nibbles(parts["q"], [scale.bfloat16()], "mxfp4")


def pack_fp8(parts: Parts) -> Packed:
    """By groups of 128: scales x 256 in fp32, then one input a byte. A code that is no number makes its scale none."""
    codes = torch.split(parts["q"].view(torch.uint8), FP8_GROUP, dim=1)
    scales = 256 * parts["scale"].expand(-1, len(codes))  # (out, groups), whether of a row or of each
    streams = []
    for group, q in enumerate(codes):
        is_number = (q & 0x7F != FP8_NAN).all(dim=1, keepdim=True)
        scale = torch.where(is_number, scales[:, group, None], torch.nan)
        streams += [_bytes(_in_blocks(scale, 1)), _bytes(_in_blocks(q, 1))]
    return Packed(torch.cat(streams, dim=1), FORMATS["fp8"], len(parts["q"]))


def _pack_nibbles(q: Tensor, heads: Sequence[Tensor], name: str) -> Packed:
    """By groups: the heads (out, groups) bf16, then eight inputs a lane, the first four in the low nibbles."""
    num_groups = heads[0].shape[1]
    levels = _in_blocks(unpack_nibbles(q), 8)  # (blocks, in / 8, 64, 8)
    nibbles = levels[..., :4] | (levels[..., 4:] << 4)  # (blocks, in / 8, 64, 4)
    nibbles = nibbles.view(len(nibbles), num_groups, -1, BLOCK, 4)  # (blocks, groups, group / 8, 64, 4)
    streams = [*(_in_blocks(head, 1) for head in heads), nibbles]  # a head is (blocks, groups, 64, 1)
    rows = [stream.flatten(2).contiguous().view(torch.uint8) for stream in streams]
    return Packed(torch.cat(rows, dim=2).flatten(1), FORMATS[name], len(q))


def _in_blocks(matrix: Tensor, inputs: int, padding: int = 0) -> Tensor:
    """(out, in) -> (blocks, in / inputs, 64, inputs), padded where a block or a lane is not full."""
    num_out, num_in = matrix.shape
    padded = functional.pad(matrix, (0, -num_in % inputs, 0, -num_out % BLOCK), value=padding)
    return padded.view(-1, BLOCK, padded.shape[1] // inputs, inputs).transpose(1, 2)


def _bytes(blocks: Tensor) -> Tensor:
    return blocks.flatten(1).contiguous().view(torch.uint8)


FORMATS: Mapping[str, int] = {"bf16": 0, "int8": 1, "int4": 2, "fp32": 3, "int4_by_64": 4, "mxfp4": 5, "fp8": 6}
PACK: Mapping[str, Callable[[Parts], Packed]] = {
    "fp32": pack_fp32,
    "bf16": pack_bf16,
    "int8": pack_int8,
    "int4": pack_int4,
    "mxfp4": pack_mxfp4,
    "fp8": pack_fp8,
}

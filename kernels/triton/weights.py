"""Weights as the products read them, and how a tile of them becomes bf16 in registers.

Owns the layouts. bf16, int8 and fp8 stay (out, in). int4 is stored in the order in which the matrix instruction wants
its operand in registers, so that a thread reads 16 bytes at once and no byte changes place:

    words   (in / DEPTH, out, DEPTH / 8) int32: of a row, word t * DEPTH / 32 + g (t = 0..3) holds the levels at
            32 g + 16 s + 8 h + 2 t + l of a block of DEPTH inputs, each in the 4 bits from 4 (2 s + h) + 16 l on. The
            two levels of a pair l are neighbours in the operand and 16 bits apart in the word: one instruction makes
            bf16 of both.
    scales  (in / DEPTH, out, DEPTH / group) int32: a group's scale in the low half, its zero point in the high, both
            bf16. Groups are the weight's own, or parts of them that are no longer than DEPTH.

A weight is made as the definition has it, (level - 8) * scale + zero, rounded once to bf16. mxfp4 lies in the same
order, with codes in the place of levels; its scales are powers of two in bf16, one int32 for each group of 32, which
makes 5 bits a weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.weights import INT4_GROUP, int4_by, int4_group, unpack_nibbles

INT4_DEPTHS = (128, 64, 32)  # the largest that divides `in`: 128 gives a thread 16 bytes of a row at once


@dataclass(frozen=True)
class Matrices(Sequence["Matrices"]):
    """E matrices (out, in) of one format; of a layer's experts, or one alone. As a sequence: each by itself."""

    format: str  # "bf16", "int8", "int4", "mxfp4" or "fp8"
    values: Tensor  # (E, out, in) bf16, int8 or e4m3; (E, in / DEPTH, out, DEPTH / 8) int32
    # bf16: the values again, and not read; int8, fp8: (E, out) fp32; fp8 in groups: (E, in / 128, out) fp32;
    # int4, mxfp4: as above, for each of the E
    scales: Tensor
    num_out: int
    num_in: int

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int | slice) -> "Matrices":
        part = index if isinstance(index, slice) else slice(range(len(self))[index], range(len(self))[index] + 1)
        return Matrices(self.format, self.values[part], self.scales[part], self.num_out, self.num_in)

    @property
    def group(self) -> int:
        """How many inputs of a word's format share a scale; 0 of other formats."""
        return self.depth // self.scales.shape[3] if self.depth else 0

    @property
    def depth(self) -> int:
        """How many inputs lie together; 0 where all do."""
        return self.values.shape[3] * 8 if self.values.dtype == torch.int32 else 0


def prepare_bf16(parts: Mapping[str, Tensor]) -> Matrices:
    """From the parts of `bf16`."""
    values = parts["weight"].contiguous()[None]
    return Matrices("bf16", values, values, *values.shape[1:])


def prepare_int8(parts: Mapping[str, Tensor]) -> Matrices:
    """From the parts of `int8`."""
    return Matrices("int8", parts["q"].contiguous()[None], parts["scale"].float()[None], *parts["q"].shape)


def prepare_fp8(parts: Mapping[str, Tensor]) -> Matrices:
    """From the parts of `fp8`."""
    scale = parts["scale"].float()  # (out, groups)
    scales = scale.T.contiguous() if scale.shape[1] > 1 else scale[:, 0]
    return Matrices("fp8", parts["q"].contiguous()[None], scales[None], *parts["q"].shape)


def prepare_int4(parts: Mapping[str, Tensor]) -> Matrices:
    """From the parts of `int4`, in another order."""
    levels = unpack_nibbles(parts["q"]).int()  # (out, in)
    num_out, num_in = levels.shape
    depth = next(depth for depth in INT4_DEPTHS if num_in % depth == 0)
    parts = int4_by(parts, gcd(int4_group(parts), depth))
    scale, zero = (parts[name].view(torch.int16).int() & 0xFFFF for name in ("scale", "zero"))
    pairs = (scale | (zero << 16)).view(num_out, num_in // depth, -1).transpose(0, 1)
    return Matrices("int4", _words(levels, depth)[None], pairs.contiguous()[None], num_out, num_in)


def prepare_mxfp4(parts: Mapping[str, Tensor]) -> Matrices:
    """From the parts of `mxfp4`, in another order."""
    codes = unpack_nibbles(parts["q"]).int()  # (out, in)
    num_out, num_in = codes.shape
    depth = next(depth for depth in INT4_DEPTHS if num_in % depth == 0)
    exponent = parts["scale"].int()  # a scale's exponent in bf16 too, where 2^-127 is not 0 but half of the least power
    scale = torch.where(exponent > 0, exponent << 7, 1 << 6).view(num_out, num_in // depth, -1).transpose(0, 1)
    return Matrices("mxfp4", _words(codes, depth)[None], scale.contiguous()[None], num_out, num_in)


def _words(levels: Tensor, depth: int) -> Tensor:
    """(in / depth, out, depth / 8) int32."""
    num_out = len(levels)
    split = levels.view(num_out, -1, depth // INT4_GROUP, 2, 2, 4, 2)  # (out, blocks, g, s, h, t, l)
    split = split.permute(1, 0, 5, 2, 3, 4, 6).reshape(-1, num_out, 4, depth // INT4_GROUP, 8)  # ..., t, g, (s, h, l)
    shifts = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28], dtype=torch.int32, device=levels.device)
    # No two share a bit, so the sum is their union; of 32 bits, the highest being the sign.
    return (split << shifts).sum(-1, dtype=torch.int32).flatten(2).contiguous()


def stack(matrices: Sequence[Matrices]) -> Matrices:
    """All experts' matrices in one tensor, so that a program finds its expert's by number."""
    first = matrices[0]
    values = torch.cat([one.values for one in matrices])
    scales = values if first.format == "bf16" else torch.cat([one.scales for one in matrices])
    return Matrices(first.format, values, scales, first.num_out, first.num_in)


# ---------------------------------------------------------------------------------------------------------- the kernels

# 0x4300 is 128 in bf16, whose last four bits are worth 8, 4, 2 and 1; 0x4308 is 136.
_INT4_ASM = tl.constexpr("""{
    .reg .b16 scale, zero;
    .reg .b32 scales, zeros, rest, a, b, c, d;
    mov.b32 {scale, zero}, $9;
    mov.b32 scales, {scale, scale};
    mov.b32 zeros, {zero, zero};
    lop3.b32 a, $8, 0x000F000F, 0x43004300, 0xEA;
    shr.u32 rest, $8, 4;
    lop3.b32 b, rest, 0x000F000F, 0x43004300, 0xEA;
    shr.u32 rest, $8, 8;
    lop3.b32 c, rest, 0x000F000F, 0x43004300, 0xEA;
    shr.u32 rest, $8, 12;
    lop3.b32 d, rest, 0x000F000F, 0x43004300, 0xEA;
    mov.b32 rest, 0x43084308;
    sub.rn.bf16x2 a, a, rest;
    sub.rn.bf16x2 b, b, rest;
    sub.rn.bf16x2 c, c, rest;
    sub.rn.bf16x2 d, d, rest;
    fma.rn.bf16x2 a, a, scales, zeros;
    fma.rn.bf16x2 b, b, scales, zeros;
    fma.rn.bf16x2 c, c, scales, zeros;
    fma.rn.bf16x2 d, d, scales, zeros;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
    mov.b32 {$4, $5}, c;
    mov.b32 {$6, $7}, d;
}""")


# A code's three lower bits are bf16's two lowest bits of the exponent and its highest of the mantissa, so that the
# number is 2^-126 of what it stands for, subnormal ones included; 0x7E80 is 2^126.
_MXFP4_ASM = tl.constexpr("""{
    .reg .b16 scale, none;
    .reg .b32 scales, large, rest, a, b, c, d;
    mov.b32 {scale, none}, $9;
    mov.b32 scales, {scale, scale};
    mov.b32 large, 0x7E807E80;
    shl.b32 rest, $8, 12;
    and.b32 a, rest, 0x80008000;
    shl.b32 rest, $8, 6;
    lop3.b32 a, rest, 0x01C001C0, a, 0xEA;
    shl.b32 rest, $8, 8;
    and.b32 b, rest, 0x80008000;
    shl.b32 rest, $8, 2;
    lop3.b32 b, rest, 0x01C001C0, b, 0xEA;
    shl.b32 rest, $8, 4;
    and.b32 c, rest, 0x80008000;
    shr.u32 rest, $8, 2;
    lop3.b32 c, rest, 0x01C001C0, c, 0xEA;
    and.b32 d, $8, 0x80008000;
    shr.u32 rest, $8, 6;
    lop3.b32 d, rest, 0x01C001C0, d, 0xEA;
    mul.rn.bf16x2 a, a, large;
    mul.rn.bf16x2 b, b, large;
    mul.rn.bf16x2 c, c, large;
    mul.rn.bf16x2 d, d, large;
    mul.rn.bf16x2 a, a, scales;
    mul.rn.bf16x2 b, b, scales;
    mul.rn.bf16x2 c, c, scales;
    mul.rn.bf16x2 d, d, scales;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
    mov.b32 {$4, $5}, c;
    mov.b32 {$6, $7}, d;
}""")


@triton.jit
def tile(
    values,
    scales,
    row,
    num_out,
    num_in,
    block,
    FORMAT: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
):
    """Rows `row` (OUTPUTS,) of one matrix, inputs block * DEPTH and on: (OUTPUTS, DEPTH), 0 beyond num_in.

    As the product's operand: e4m3 of fp8, else bf16. The rows must be there. int8 and fp8 are without their scales,
    which belong to the sums.
    """
    if FORMAT == "int4" or FORMAT == "mxfp4":  # noqa: PLR1714  # Triton knows no `in`
        word, pairs = _words_and_scales(values, scales, row, num_out, block, DEPTH, GROUP)
        return _widened(word, pairs, row.shape[0], FORMAT, DEPTH, ASM)
    column = block * DEPTH + tl.arange(0, DEPTH)[None, :]
    address = values + row.to(tl.int64)[:, None] * num_in + column
    weight = tl.load(address) if EVEN else tl.load(address, mask=column < num_in, other=0.0)
    return weight if FORMAT == "fp8" else weight.to(tl.bfloat16)


@triton.jit
def _words_and_scales(values, scales, row, num_out, block, DEPTH: tl.constexpr, GROUP: tl.constexpr):
    WORDS: tl.constexpr = DEPTH // 8
    GROUPS: tl.constexpr = DEPTH // GROUP
    word = tl.arange(0, WORDS)[None, :]
    place = (row.to(tl.int64) + block * num_out)[:, None]
    words = tl.load(values + place * WORDS + word)
    if GROUPS == 1:  # read once for a row
        return words, tl.broadcast_to(tl.load(scales + place), words.shape)
    group = word % (DEPTH // 32) // (GROUP // 32)
    return words, tl.load(scales + place * GROUPS + group)


@triton.jit
def _widened(word, pairs, OUTPUTS: tl.constexpr, FORMAT: tl.constexpr, DEPTH: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        CODE: tl.constexpr = _INT4_ASM if FORMAT == "int4" else _MXFP4_ASM
        a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
            CODE,
            constraints="=h,=h,=h,=h,=h,=h,=h,=h,r,r",
            args=[word, pairs],
            dtype=(tl.bfloat16,) * 8,
            is_pure=True,
            pack=1,
        )
    else:
        a0, a1 = _weight(word, pairs, 0, FORMAT), _weight(word, pairs, 16, FORMAT)
        b0, b1 = _weight(word, pairs, 4, FORMAT), _weight(word, pairs, 20, FORMAT)
        c0, c1 = _weight(word, pairs, 8, FORMAT), _weight(word, pairs, 24, FORMAT)
        d0, d1 = _weight(word, pairs, 12, FORMAT), _weight(word, pairs, 28, FORMAT)
    pair = tl.join(tl.join(tl.join(a0, a1), tl.join(b0, b1)), tl.join(tl.join(c0, c1), tl.join(d0, d1)))  # ..., l, h, s
    split = tl.reshape(pair, (OUTPUTS, 4, DEPTH // 32, 2, 2, 2))  # out, t, g, l, h, s
    return tl.reshape(tl.permute(split, (0, 2, 5, 4, 1, 3)), (OUTPUTS, DEPTH))


@triton.jit
def _weight(word, pairs, SHIFT: tl.constexpr, FORMAT: tl.constexpr):
    # What the machine code above does, for the interpreter: one of a word's eight weights.
    scale = (pairs << 16).to(tl.float32, bitcast=True)
    code = (word >> SHIFT) & 15
    if FORMAT == "int4":
        weight = (code - 8).to(tl.float32) * scale + (pairs & -65536).to(tl.float32, bitcast=True)
    else:
        weight = ((((code & 8) << 12) | ((code & 7) << 6)) << 16).to(tl.float32, bitcast=True) * (2.0**126) * scale
    return weight.to(tl.bfloat16)

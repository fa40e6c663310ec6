"""Keys and values on their way into the block cache, and rows of 8 bits on their way out of it.

Owns how `kernels/cache.py`'s rows are written and read by kernels. Rows of 8 bits are read as words of four numbers,
which become fp16, exactly: byte by byte they would cost more instructions than the device has to spare.
"""

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import cache
from kernels.triton.elementwise import warps

# How a cache keeps its rows.
PLAIN = tl.constexpr(0)
FP8 = tl.constexpr(1)
INT8 = tl.constexpr(2)
KINDS: Mapping[torch.dtype, int] = {torch.float8_e4m3fn: FP8.value, torch.int8: INT8.value}  # others are plain

_LEVEL_MAX = tl.constexpr(cache.LEVEL_MAX)
_TO_INTEGER = tl.constexpr(1.5 * 2**23)  # added and subtracted, it rounds fp32 below 2^22 to even


def kind_of(rows: Tensor) -> int:
    """How a cache keeps its rows."""
    plain: int = PLAIN.value
    return KINDS.get(rows.dtype, plain)


def write_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor) -> None:
    """As the definition. Reads and writes each key and value once: 4 T G (D + Dv) bytes in bf16."""
    num_tokens, num_groups, key_size = key.shape
    value_size = value.shape[2]
    if num_tokens:
        groups, key_block, value_block = map(triton.next_power_of_2, (num_groups, key_size, value_size))
        _write_kv[num_tokens,](
            key,
            value,
            key_cache,
            value_cache,
            slots,
            *key.stride()[:2],
            *value.stride()[:2],
            *key_cache.stride()[1:3],  # a block's slots are evenly apart, and so are all blocks'
            *value_cache.stride()[1:3],
            num_groups,
            key_size,
            value_size,
            KIND=kind_of(key_cache),
            GROUPS=groups,
            KEY_BLOCK=key_block,
            VALUE_BLOCK=value_block,
            num_warps=warps(groups * (key_block + value_block)),
        )


@triton.jit
def _write_kv(
    key,
    value,
    key_cache,
    value_cache,
    slots,
    key_token,
    key_group,
    value_token,
    value_group,
    key_cache_slot,
    key_cache_group,
    value_cache_slot,
    value_cache_group,
    G,
    key_size,
    value_size,
    KIND: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)  # int64: times its stride it is beyond 2^31 on a large device
    keys, key_slot = key + token * key_token, key_cache + slot * key_cache_slot
    values, value_slot = value + token * value_token, value_cache + slot * value_cache_slot
    _copy(keys, key_slot, key_group, key_cache_group, G, key_size, KIND, GROUPS, KEY_BLOCK)
    _copy(values, value_slot, value_group, value_cache_group, G, value_size, KIND, GROUPS, VALUE_BLOCK)


@triton.jit
def _copy(
    source, target, source_group, target_group, G, size, KIND: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):
    groups, columns = tl.arange(0, GROUPS), tl.arange(0, BLOCK)[None, :]
    inside = (groups < G)[:, None] & (columns < size)
    elements = tl.load(source + groups[:, None] * source_group + columns, mask=inside, other=0.0)
    target += groups[:, None] * target_group
    if KIND == PLAIN:
        tl.store(target + columns, elements.to(target.dtype.element_ty), mask=inside)
    elif KIND == FP8:
        tl.store(target + columns, as_fp8(elements.to(tl.float32)), mask=inside)
    else:
        wide = elements.to(tl.float32)
        scale = level_size(tl.max(tl.abs(wide), 1), tl.min((tl.abs(wide) < float("inf")).to(tl.int32), 1))
        tl.store(target + columns, as_levels(wide, scale[:, None]), mask=inside)
        store_scales(target + size, scale, groups < G)


@triton.jit
def as_fp8(x):
    """As `kernels/cache.py` has it: cut off at 448, which the conversion does by itself, and NaN where not finite."""
    return tl.where(tl.abs(x) < float("inf"), x, float("nan")).to(tl.float8e4nv)


@triton.jit
def level_size(magnitude, is_finite):
    """An int8 row's scale, of its largest magnitude; NaN where is_finite, of all its numbers, is 0."""
    scale = tl.div_rn(magnitude, tl.full(magnitude.shape, _LEVEL_MAX, tl.float32))
    return tl.where(is_finite != 0, scale, float("nan"))


@triton.jit
def as_levels(x, scale):
    """An int8 row's levels."""
    level = tl.div_rn(x, tl.where(scale > 0, scale, 1.0).broadcast_to(x.shape))
    level = (level + _TO_INTEGER) - _TO_INTEGER
    return tl.where(scale > 0, level, 0.0).to(tl.int8)


@triton.jit
def store_scales(target, scale, inside):
    """The scales (rows,), byte by byte behind the levels at target (rows, 1): rows begin anywhere."""
    byte = tl.arange(0, 4)[None, :]
    bits = scale.to(tl.int32, bitcast=True)[:, None] >> (8 * byte)
    tl.store(target + byte, bits.to(tl.int8), mask=inside[:, None] & (byte < 4))


# -------------------------------------------------------------------------------------------------------------- reading

_FP8_ASM = tl.constexpr("""{
    .reg .b16 low, high;
    .reg .b32 a, b;
    mov.b32 {low, high}, $4;
    cvt.rn.f16x2.e4m3x2 a, low;
    cvt.rn.f16x2.e4m3x2 b, high;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
}""")

# A level of two's complement plus 128 in the low byte of 0x6400, which is 1,024 in fp16; 0x6480 is 1,152.
_INT8_ASM = tl.constexpr("""{
    .reg .b32 a, b, rest;
    xor.b32 rest, $4, 0x80808080;
    prmt.b32 a, rest, 0x64646464, 0x4140;
    prmt.b32 b, rest, 0x64646464, 0x4342;
    mov.b32 rest, 0x64806480;
    sub.rn.f16x2 a, a, rest;
    sub.rn.f16x2 b, b, rest;
    mov.b32 {$0, $1}, a;
    mov.b32 {$2, $3}, b;
}""")


@triton.jit
def widened_rows(word, KIND: tl.constexpr, ASM: tl.constexpr):
    """Words (rows, columns / 4) as what they stand for (rows, columns) fp16; int8 without its scales."""
    if ASM:
        CODE: tl.constexpr = _FP8_ASM if KIND == FP8 else _INT8_ASM
        a, b, c, d = tl.inline_asm_elementwise(
            CODE, constraints="=h,=h,=h,=h,r", args=[word], dtype=(tl.float16,) * 4, is_pure=True, pack=1
        )
    else:
        a, b, c, d = _number(word, 0, KIND), _number(word, 8, KIND), _number(word, 16, KIND), _number(word, 24, KIND)
    number = tl.join(tl.join(a, c), tl.join(b, d))  # ..., the lower bit of a number's place, the higher
    return tl.reshape(number, (word.shape[0], word.shape[1] * 4))


@triton.jit
def _number(word, SHIFT: tl.constexpr, KIND: tl.constexpr):
    # What the machine code above does, for the interpreter: one of a word's four numbers.
    if KIND == FP8:
        return ((word >> SHIFT) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return ((word << (24 - SHIFT)) >> 24).to(tl.float16)

"""Activation and rotary embedding: one pass over memory each.

Bound by memory: the bytes beside each kernel are its whole cost on a full device, and its launch on an empty one. A row
may begin anywhere (a view of some columns); within it the elements are neighbours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS_PER_WARP = 512  # two 16-byte loads of bf16 a lane
COLUMNS_PER_PROGRAM = 2048  # of what has no sum along the row: more programs at one token, and four warps each


def warps(num_elements: int) -> int:
    """Of a program that loads so many elements at once; a power of two."""
    return min(max(num_elements // COLUMNS_PER_WARP, 1), 16)


def swiglu(gate_up: Tensor) -> Tensor:
    """As the definition. Reads 2 I columns and writes I: 6 T I bytes in bf16."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    product = torch.empty(num_tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens:
        block = min(triton.next_power_of_2(size), COLUMNS_PER_PROGRAM)
        _swiglu[num_tokens, triton.cdiv(size, block)](
            gate_up, product, gate_up.stride(0), size, BLOCK=block, num_warps=warps(block)
        )
    return product


@triton.jit
def _swiglu(gate_up, product, stride, I, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < I
    gate = tl.load(gate_up + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + I + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(product + row * I + columns, (gate * tl.sigmoid(gate) * up).to(product.dtype.element_ty), mask=inside)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As the definition. Reads and writes x once: 4 T heads D bytes in bf16."""
    num_tokens, num_heads, head_size = x.shape
    rotated = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if num_tokens:
        half = triton.next_power_of_2(head_size // 2)
        heads = min(max(COLUMNS_PER_PROGRAM // 2 // half, 1), triton.next_power_of_2(num_heads))
        _rotary[num_tokens, triton.cdiv(num_heads, heads)](
            x,
            cos,
            sin,
            rotated,
            *x.stride()[:2],
            num_heads,
            head_size // 2,
            HEADS=heads,
            HALF=half,
            num_warps=warps(2 * heads * half),
        )
    return rotated


@triton.jit
def _rotary(x, cos, sin, rotated, token_stride, head_stride, num_heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pairs = tl.arange(0, HALF)
    inside = (heads < num_heads)[:, None] & (pairs < half)[None, :]
    angles = token * half + pairs
    c = tl.load(cos + angles, mask=pairs < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + angles, mask=pairs < half, other=0.0).to(tl.float32)[None, :]
    source = x + token * token_stride + heads[:, None] * head_stride + pairs[None, :]
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    target = rotated + (token * num_heads + heads[:, None]) * (2 * half) + pairs[None, :]
    tl.store(target, (first * c - second * s).to(rotated.dtype.element_ty), mask=inside)
    tl.store(target + half, (second * c + first * s).to(rotated.dtype.element_ty), mask=inside)

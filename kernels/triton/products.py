"""Products by prepared weights: of one matrix, and of each token's chosen experts.

Owns one kernel for all of them. Weights are the matrix instruction's first operand, with at least 64 rows of it, and
tokens the second, so that one token alone still uses Hopper's widest instructions and no weight passes through
registers but to become bf16. A tile of tokens belongs to one expert. A decode is bound by memory: it reads each chosen
expert once, 2, 1 or 0.625 bytes a weight. From some hundred tokens an expert on it is bound by arithmetic.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from kernels import reference
from kernels.ops import Linear
from kernels.triton import tiles, weights
from kernels.triton.alignment import Aligned, align
from kernels.triton.elementwise import swiglu
from kernels.triton.weights import Matrices

# One pair a tile, without sorting, while that repeats few experts: with a quarter of E pairs, two in eight share one.
UNSORTED_SHARE = 4

COLUMNS_PER_PROGRAM = 1024  # of a sum of partial results


def linear(x: Tensor, weight: Matrices) -> Tensor:
    """The product of x (T, in) and one matrix: (T, out) in x's dtype, from bf16 operands with fp32 sums."""
    if not len(x):
        return x.new_empty(0, weight.num_out)
    x16 = x.bfloat16()
    if len(x) > tiles.DENSE_TOKENS_MAX:
        return functional.linear(x16, _widen(weight)).to(x.dtype)
    tile = tiles.product_tile(weight.format, weight.depth, len(x), 1, weight.num_out, weight.num_in)
    product = _multiply(x16, weight, tile, num_pairs=len(x))  # (splits, T, out)
    return (product[0] if len(product) == 1 else _combine(product, 1, None)).to(x.dtype)


def linear_bf16(x: Tensor, weight: Matrices) -> Tensor:
    """As `linear`, by cuBLAS, which is as fast at any number of tokens."""
    return functional.linear(x.bfloat16(), weight.values[0]).to(x.dtype)


def experts(
    x: Tensor,
    chosen_weights: Tensor,
    chosen: Tensor,
    gate_up: Sequence[Any],
    down: Sequence[Any],
    linear: Linear,
    activation: Callable[[Tensor], Tensor],
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """As the definition, from bf16 operands with fp32 sums; SwiGLU within the first product."""
    if not isinstance(gate_up, Matrices) or not isinstance(down, Matrices):  # fp32: for comparison, not for serving
        return reference.experts(x, chosen_weights, chosen, gate_up, down, linear, activation, gate_up_bias, down_bias)
    if not len(x):
        return torch.empty_like(x)
    chosen, chosen_weights = chosen.contiguous(), chosen_weights.contiguous()
    num_experts, num_chosen = len(gate_up), chosen.shape[1]
    is_gated = activation is swiglu
    num_pairs = chosen.numel()
    inner_tile, outer_tile = (
        tiles.product_tile(
            matrices.format, matrices.depth, num_pairs, num_experts, num_out, matrices.num_in, is_gated=gated
        )
        for matrices, num_out, gated in (
            (gate_up, gate_up.num_out // (1 + is_gated), is_gated),
            (down, down.num_out, False),
        )
    )
    places: Aligned | Tensor = chosen
    if num_pairs * UNSORTED_SHARE > num_experts:
        places = align(chosen, num_experts, inner_tile.tokens)
    inner = _multiply(
        x.bfloat16(), gate_up, inner_tile, num_pairs, places, gate_up_bias, rows_shared_by=num_chosen, is_gated=is_gated
    )[0]
    if not is_gated:
        inner = activation(inner)
    outer = _multiply(inner, down, outer_tile, num_pairs, places, down_bias)  # (splits, T * K, C)
    return _combine(outer, num_chosen, chosen_weights).to(x.dtype)


def _multiply(
    x: Tensor,
    matrices: Matrices,
    tile: tiles.ProductTile,
    num_pairs: int,
    places: Aligned | Tensor | None = None,
    bias: Tensor | None = None,
    rows_shared_by: int = 1,
    is_gated: bool = False,
) -> Tensor:
    """(splits, pairs, out), in fp32 where there is more than one split, else in bf16.

    Pair p multiplies row p // rows_shared_by of x, by the only matrix where `places` is None, by the expert that a
    tensor (T, K) says, or as they are aligned.
    """
    num_out = matrices.num_out // (1 + is_gated)
    dtype = torch.float32 if tile.splits > 1 else torch.bfloat16
    output = torch.empty(tile.splits, num_pairs, num_out, dtype=dtype, device=x.device)
    match places:
        case None:
            kind, num_blocks, arguments = "dense", triton.cdiv(num_pairs, tile.tokens), (x, x, x)
        case Tensor():
            kind, num_blocks, arguments = "unsorted", num_pairs, (x, places, x)
        case Aligned():
            kind, num_blocks = "sorted", places.num_blocks
            arguments = (places.pairs, places.block_experts, places.num_padded)
    _product[num_blocks * triton.cdiv(num_out, tile.outputs), tile.splits](
        x,
        matrices.values,
        matrices.scales,
        x if bias is None else bias,
        output,
        *arguments,
        num_pairs,
        num_out,
        matrices.num_in,
        x.stride(0),
        matrices.values.stride(0),
        matrices.scales.stride(0),
        FORMAT=matrices.format,
        PLACES=kind,
        SHARED_BY=rows_shared_by,
        IS_GATED=is_gated,
        HAS_BIAS=bias is not None,
        IS_EVEN=matrices.num_in % tile.depth == 0,
        TOKENS=tile.tokens,
        OUTPUTS=tile.outputs,
        DEPTH=tile.depth,
        GROUP=tile.group,
        ASM=not triton.knobs.runtime.interpret,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return output


@triton.jit
def _product(
    x,
    values,
    scales,
    bias,
    output,
    pairs,
    block_experts,
    num_padded,
    num_pairs,
    num_out,
    num_in,
    x_stride,
    value_stride,
    scale_stride,
    FORMAT: tl.constexpr,
    PLACES: tl.constexpr,
    SHARED_BY: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    ASM: tl.constexpr,
):
    # One tile of outputs for one tile of tokens, over one split of the inputs. Programs that run together share what
    # they read: GROUP tiles of tokens, mostly of one expert, take turns within each tile of outputs.
    num_tiles = tl.cdiv(num_out, OUTPUTS)
    num_blocks = tl.num_programs(0) // num_tiles
    program = tl.program_id(0)
    first_block = program // (GROUP * num_tiles) * GROUP
    group = tl.minimum(GROUP, num_blocks - first_block)
    block = first_block + program % (GROUP * num_tiles) % group
    row = program % (GROUP * num_tiles) // group * OUTPUTS + tl.arange(0, OUTPUTS)
    place = tl.arange(0, TOKENS)
    if PLACES == "sorted":
        if block * TOKENS >= tl.load(num_padded):
            return
        expert = tl.load(block_experts + block).to(tl.int64)
        pair = tl.load(pairs + block * TOKENS + place)
    elif PLACES == "unsorted":
        expert = tl.load(block_experts + block).to(tl.int64)
        pair = tl.where(place == 0, block, num_pairs)
    else:
        expert = tl.zeros((), tl.int64)
        pair = block * TOKENS + place
    there = pair < num_pairs
    values += expert * value_stride
    scales += expert * scale_stride
    inside = row < num_out
    read = tl.minimum(row, num_out - 1)  # rows beyond the last are read as the last, and not written

    num_rows = num_out * 2 if IS_GATED else num_out  # of the matrix
    depth = tl.arange(0, DEPTH)
    source = x + (pair // SHARED_BY).to(tl.int64)[None, :] * x_stride + depth[:, None]
    num_depths = tl.cdiv(num_in, DEPTH)
    split, num_splits = tl.program_id(1), tl.num_programs(1)
    total = tl.zeros((OUTPUTS, TOKENS), tl.float32)
    total_up = tl.zeros((OUTPUTS, TOKENS), tl.float32)
    for d in range(split * num_depths // num_splits, (split + 1) * num_depths // num_splits):
        if IS_EVEN:
            tokens = tl.load(source + d * DEPTH, mask=there[None, :], other=0.0)  # (DEPTH, TOKENS)
        else:
            tokens = tl.load(source + d * DEPTH, mask=there[None, :] & (d * DEPTH + depth < num_in)[:, None], other=0.0)
        weight = weights.tile(values, scales, read, num_rows, num_in, d, FORMAT, DEPTH, IS_EVEN, ASM)
        total = tl.dot(weight, tokens, total)
        if IS_GATED:
            weight = weights.tile(values, scales, num_out + read, num_rows, num_in, d, FORMAT, DEPTH, IS_EVEN, ASM)
            total_up = tl.dot(weight, tokens, total_up)

    if FORMAT == "int8":
        total *= tl.load(scales + read)[:, None]
        if IS_GATED:
            total_up *= tl.load(scales + num_out + read)[:, None]
    if HAS_BIAS:
        share = tl.where(split == 0, 1.0, 0.0)  # one split counts it
        total += tl.load(bias + expert * num_rows + read).to(tl.float32)[:, None] * share
        if IS_GATED:
            total_up += tl.load(bias + expert * num_rows + num_out + read).to(tl.float32)[:, None]
    if IS_GATED:
        total = total * tl.sigmoid(total) * total_up
    target = output + (split * num_pairs + pair).to(tl.int64)[None, :] * num_out + row[:, None]
    tl.store(target, total.to(output.dtype.element_ty), mask=inside[:, None] & there[None, :])


def _combine(product: Tensor, num_chosen: int, chosen_weights: Tensor | None) -> Tensor:
    """The weighted sum (T, out) bf16 of product (splits, T * num_chosen, out), in fp32."""
    splits, num_pairs, num_out = product.shape
    num_tokens = num_pairs // num_chosen
    output = torch.empty(num_tokens, num_out, dtype=torch.bfloat16, device=product.device)
    block = min(triton.next_power_of_2(num_out), COLUMNS_PER_PROGRAM)
    _sum[num_tokens, triton.cdiv(num_out, block)](
        product,
        product if chosen_weights is None else chosen_weights,
        output,
        num_pairs,
        num_out,
        HAS_WEIGHTS=chosen_weights is not None,
        CHOSEN=num_chosen,
        SPLITS=splits,
        BLOCK=block,
    )
    return output


@triton.jit
def _sum(
    product,
    chosen_weights,
    output,
    num_pairs,
    num_out,
    HAS_WEIGHTS: tl.constexpr,
    CHOSEN: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_out
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(CHOSEN):
        pair = token * CHOSEN + choice
        weight = tl.load(chosen_weights + pair) if HAS_WEIGHTS else 1.0
        for split in tl.static_range(SPLITS):
            part = tl.load(product + (split * num_pairs + pair) * num_out + column, mask=inside, other=0.0)
            total += weight * part.to(tl.float32)
    tl.store(output + token * num_out + column, total.to(output.dtype.element_ty), mask=inside)


def _widen(matrix: Matrices) -> Tensor:
    """The one matrix as bf16 (out, in): for so many tokens that this is the least of the work."""
    wide = torch.empty(matrix.num_out, matrix.num_in, dtype=torch.bfloat16, device=matrix.values.device)
    depth = matrix.depth or tiles.WIDEN_DEPTH
    _widen_tile[triton.cdiv(matrix.num_out, tiles.WIDEN_OUTPUTS), triton.cdiv(matrix.num_in, depth)](
        matrix.values,
        matrix.scales,
        wide,
        matrix.num_out,
        matrix.num_in,
        FORMAT=matrix.format,
        OUTPUTS=tiles.WIDEN_OUTPUTS,
        DEPTH=depth,
        ASM=not triton.knobs.runtime.interpret,
    )
    return wide


@triton.jit
def _widen_tile(
    values,
    scales,
    wide,
    num_out,
    num_in,
    FORMAT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    ASM: tl.constexpr,
):
    row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    read = tl.minimum(row, num_out - 1)
    block = tl.program_id(1)
    weight = weights.tile(values, scales, read, num_out, num_in, block, FORMAT, DEPTH, False, ASM)
    if FORMAT == "int8":
        weight = (weight.to(tl.float32) * tl.load(scales + read)[:, None]).to(tl.bfloat16)
    column = block * DEPTH + tl.arange(0, DEPTH)[None, :]
    target = wide + row.to(tl.int64)[:, None] * num_in + column
    tl.store(target, weight, mask=(row < num_out)[:, None] & (column < num_in))

"""The product of rows and prepared matrices, of which each row knows its own.

Owns one kernel for all formats and regimes. Weights are the matrix instruction's first operand, with at least 64 rows
of it, and tokens the second, so that one token alone still uses Hopper's widest instructions. A tile of tokens belongs
to one matrix. A decode is bound by memory: it reads each chosen matrix once, so many bytes a weight as its format has.
From some hundred tokens an expert on it is bound by arithmetic.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import tiles, weights
from kernels.triton.alignment import Aligned
from kernels.triton.quantize import FP8_MAX, Rows, per_level
from kernels.triton.weights import Matrices


@dataclass(frozen=True)
class Gate:
    """How gate and up become one within their product: SwiGLU, or GPT-OSS's clamped one where there is a limit."""

    alpha: float = 1.0
    limit: float | None = None


def multiply(
    rows: Rows,
    matrices: Matrices,
    tile: tiles.ProductTile,
    num_pairs: int,
    places: Aligned | Tensor | None = None,
    bias: Tensor | None = None,
    rows_shared_by: int = 1,
    gate: Gate | None = None,
) -> Tensor:
    """(splits, pairs, out), in fp32 where there is more than one split, else in bf16.

    Pair p multiplies row p // rows_shared_by, by the only matrix where `places` is None, by the expert that a tensor
    (T, K) says, or as they are aligned. `gate` halves the outputs.
    """
    dtype = torch.float32 if tile.splits > 1 else torch.bfloat16
    num_out = matrices.num_out // (2 if gate else 1)
    output = torch.empty(tile.splits, num_pairs, num_out, dtype=dtype, device=rows.values.device)
    _launch(rows, matrices, tile, num_pairs, places, bias, rows_shared_by, gate, Rows(output, None))
    return output


def multiply_and_quantize(
    rows: Rows,
    matrices: Matrices,
    tile: tiles.ProductTile,
    num_pairs: int,
    places: Aligned | Tensor | None,
    bias: Tensor | None,
    rows_shared_by: int,
    gate: Gate,
) -> Rows:
    """As `multiply` with a gate, rounded to e4m3 by groups: a tile has as many outputs as a group has neighbours."""
    num_out, device = matrices.num_out // 2, rows.values.device
    values = torch.empty(num_pairs, num_out, dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(triton.cdiv(num_out, tile.outputs), num_pairs, dtype=torch.float32, device=device)
    output = Rows(values, scales)
    _launch(rows, matrices, tile, num_pairs, places, bias, rows_shared_by, gate, output)
    return output


def _launch(
    rows: Rows,
    matrices: Matrices,
    tile: tiles.ProductTile,
    num_pairs: int,
    places: Aligned | Tensor | None,
    bias: Tensor | None,
    rows_shared_by: int,
    gate: Gate | None,
    output: Rows,
) -> None:
    x, num_out = rows.values, output.values.shape[-1]
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
        x if rows.scales is None else rows.scales,
        matrices.values,
        matrices.scales,
        x if bias is None else bias,
        output.values,
        x if output.scales is None else output.scales,
        *arguments,
        num_pairs,
        len(matrices),
        num_out,
        matrices.num_in,
        x.stride(0),
        0 if rows.scales is None else rows.scales.stride(0),
        matrices.values.stride(0),
        matrices.scales.stride(0),
        gate.alpha if gate else 0.0,
        (gate.limit or 0.0) if gate else 0.0,
        FORMAT=matrices.format,
        HAS_GROUPS=matrices.scales.ndim == 3,
        PLACES=kind,
        SHARED_BY=rows_shared_by,
        IS_GATED=gate is not None,
        IS_CLAMPED=gate is not None and gate.limit is not None,
        QUANTIZES=output.scales is not None,
        HAS_BIAS=bias is not None,
        IS_EVEN=matrices.num_in % tile.depth == 0,
        TOKENS=tile.tokens,
        OUTPUTS=tile.outputs,
        DEPTH=tile.depth,
        SCALE_GROUP=matrices.group,
        GROUP=tile.group,
        ASM=not triton.knobs.runtime.interpret,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


@triton.jit
def _product(
    x,
    x_scales,
    values,
    scales,
    bias,
    output,
    output_scales,
    pairs,
    block_experts,
    num_padded,
    num_pairs,
    num_experts,
    num_out,
    num_in,
    x_stride,
    x_scale_stride,
    value_stride,
    scale_stride,
    alpha,
    limit,
    FORMAT: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    PLACES: tl.constexpr,
    SHARED_BY: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_CLAMPED: tl.constexpr,
    QUANTIZES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
    SCALE_GROUP: tl.constexpr,
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
    out_tile = program % (GROUP * num_tiles) // group
    row = out_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    place = tl.arange(0, TOKENS)
    if PLACES == "sorted":
        if block * TOKENS >= tl.load(num_padded):
            return
        expert = tl.load(block_experts + block).to(tl.int64)
        pair = tl.load(pairs + block * TOKENS + place)
    elif PLACES == "unsorted":
        expert = tl.load(block_experts + block).to(tl.int64)
        if expert == num_experts:  # it is none of these
            return
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
    x_row = (pair // SHARED_BY).to(tl.int64)
    source = x + x_row[None, :] * x_stride + depth[:, None]
    num_depths = tl.cdiv(num_in, DEPTH)
    split, num_splits = tl.program_id(1), tl.num_programs(1)
    total = tl.zeros((OUTPUTS, TOKENS), tl.float32)
    total_up = tl.zeros((OUTPUTS, TOKENS), tl.float32)
    for d in range(split * num_depths // num_splits, (split + 1) * num_depths // num_splits):
        if IS_EVEN:
            tokens = tl.load(source + d * DEPTH, mask=there[None, :], other=0.0)  # (DEPTH, TOKENS)
        else:
            tokens = tl.load(source + d * DEPTH, mask=there[None, :] & (d * DEPTH + depth < num_in)[:, None], other=0.0)
        weight = weights.tile(values, scales, read, num_rows, num_in, d, FORMAT, DEPTH, SCALE_GROUP, IS_EVEN, ASM)
        if FORMAT == "fp8":  # a group of inputs is a tile of them; the sums of fp8's products keep 14 bits within it
            scale = tl.load(x_scales + d * x_scale_stride + x_row, mask=there, other=0.0)[None, :]
            total += tl.dot(weight, tokens) * _with_own(scale, scales, d, num_rows, read, HAS_GROUPS)
        else:
            total = tl.dot(weight, tokens, total)
        if IS_GATED:
            weight = weights.tile(
                values, scales, num_out + read, num_rows, num_in, d, FORMAT, DEPTH, SCALE_GROUP, IS_EVEN, ASM
            )
            if FORMAT == "fp8":
                total_up += tl.dot(weight, tokens) * _with_own(scale, scales, d, num_rows, num_out + read, HAS_GROUPS)
            else:
                total_up = tl.dot(weight, tokens, total_up)

    if FORMAT == "int8" or (FORMAT == "fp8" and not HAS_GROUPS):
        total *= tl.load(scales + read)[:, None]
        if IS_GATED:
            total_up *= tl.load(scales + num_out + read)[:, None]
    if HAS_BIAS:
        share = tl.where(split == 0, 1.0, 0.0)  # one split counts it
        total += tl.load(bias + expert * num_rows + read).to(tl.float32)[:, None] * share
        if IS_GATED:
            total_up += tl.load(bias + expert * num_rows + num_out + read).to(tl.float32)[:, None]
    if IS_CLAMPED:
        total = tl.minimum(total, limit)
        total = total * tl.sigmoid(alpha * total) * (tl.minimum(tl.maximum(total_up, -limit), limit) + 1)
    elif IS_GATED:
        total = total * tl.sigmoid(total) * total_up
    if QUANTIZES:  # as `quantize_rows_fp8` defines it; the tile is a group of the next product's inputs
        total = tl.where(inside[:, None], total, 0.0)
        most = tl.max(tl.abs(total), 0)
        tl.store(output_scales + out_tile.to(tl.int64) * num_pairs + pair, most / FP8_MAX, mask=there)
        total *= per_level(most)[None, :]
    target = output + (split * num_pairs + pair).to(tl.int64)[None, :] * num_out + row[:, None]
    tl.store(target, total.to(output.dtype.element_ty), mask=inside[:, None] & there[None, :])


@triton.jit
def _with_own(scale, scales, block, num_rows, row, HAS_GROUPS: tl.constexpr):
    # The scales of a group's products: the tokens' (1, TOKENS), times the rows' own where these have one for each.
    if HAS_GROUPS:
        scale = scale * tl.load(scales + block * num_rows + row)[:, None]
    return scale

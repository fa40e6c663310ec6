"""Tile sizes by shape, from tables: nothing is searched for while serving.

Owns every number that trades one resource of the device for another. Each was chosen from the machine code for sm_90
(registers, shared memory, instructions) and stands until `make gpu` says otherwise.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.weights import FP8_GROUP

DOT_MIN = 16  # the least side of a matrix instruction's operand


@dataclass(frozen=True)
class AttentionTile:
    """Rows (query tokens times heads of a group) by positions of the context."""

    rows: int
    positions: int
    num_warps: int
    num_stages: int


ATTENTION_ROWS = (16, 32, 64, 128)
LONG_QUERY_ROWS = 128  # a prompt's tile: arithmetic counts, so tiles that need no mask get a loop without one
HEAD_SIZE_LONG = 512  # key and value together


def attention_is_large(head_size: int, dtype: torch.dtype) -> bool:
    """Whether 128 rows, or tiles of 64 positions, would not fit into registers.

    head_size: of key and value together. int8's rows are 4 bytes longer than a power of two: each word has an address.
    """
    return head_size > HEAD_SIZE_LONG or dtype == torch.int8


def attention_rows_max(is_large: bool) -> int:
    """The largest tile's rows."""
    return ATTENTION_ROWS[-2] if is_large else ATTENTION_ROWS[-1]


def attention_rows(rows: NDArray[np.int64], heads: int, is_large: bool) -> NDArray[np.int64]:
    """The tile's rows for sequences with `rows` each: the least that hold a short query, and one token's heads."""
    sizes = np.array([size for size in ATTENTION_ROWS if heads <= size <= attention_rows_max(is_large)])
    held: NDArray[np.int64] = sizes[np.minimum(np.searchsorted(sizes, rows), len(sizes) - 1)]
    return held


def attention_tile(rows: int, is_large: bool) -> AttentionTile:
    """Of so many rows."""
    return AttentionTile(rows, positions=32 if is_large else 64, num_warps=8 if rows > 32 else 4, num_stages=3)


@dataclass(frozen=True)
class ProductTile:
    """Outputs by tokens, over `depth` inputs at a time."""

    tokens: int
    outputs: int
    depth: int
    num_warps: int
    num_stages: int
    splits: int = 1  # of the inputs, summed by another kernel
    group: int = 1  # tiles of tokens that take turns on a tile of weights


NUM_MULTIPROCESSORS = 132  # of an H100 or H200
PROGRAMS_PER_MULTIPROCESSOR = 4  # that 128 threads of up to 128 registers allow
SPLIT_DEPTHS_MIN = 4  # tiles of inputs a split: below, filling the pipeline is most of its time
SPLITS_MAX = 8
GROUP_LONG = 8  # 8 tiles of 64 or 128 tokens read a tile of weights once from memory

DENSE_TOKENS_MAX = 128  # from here on a quantized matrix is widened once and multiplied by cuBLAS
WIDEN_OUTPUTS, WIDEN_DEPTH = 32, 128

# By tokens an expert has on average, from above: (tokens of a tile, outputs, warps, stages).
_PRODUCT = {
    "bf16": {8: (16, 64, 4, 4), 32: (32, 64, 4, 4), 64: (64, 128, 8, 3), 0: (128, 128, 8, 3)},
    "int8": {8: (16, 64, 4, 4), 32: (32, 64, 4, 4), 64: (64, 128, 8, 3), 0: (128, 128, 8, 3)},
    "int4": {8: (16, 64, 4, 4), 32: (32, 64, 4, 3), 0: (64, 64, 4, 3)},
    "mxfp4": {8: (16, 64, 4, 4), 32: (32, 64, 4, 3), 0: (64, 64, 4, 3)},
    # 128 outputs: a group of the next product's inputs, so that a tile can round it. 128 tokens would spill: a group's
    # products have registers of their own before they are scaled.
    "fp8": {8: (16, 128, 4, 3), 32: (32, 128, 4, 3), 0: (64, 128, 8, 3)},
}
_PRODUCT_DEPTH = {"bf16": 64, "int8": 128, "fp8": FP8_GROUP}


def product_tile(
    format: str, depth: int, num_pairs: int, num_experts: int, num_out: int, num_in: int, *, is_gated: bool = False
) -> ProductTile:
    """For `num_pairs` pairs of a token and one of `num_experts` experts; depth: the layout's, 0 where it has none.

    How many tokens a tile has depends on the pairs, the experts and the format alone: a layer's products share tiles.
    """
    num_hit = min(num_pairs, num_experts)  # experts, if they are all different
    by_tokens = _PRODUCT[format]
    least = next((most for most in by_tokens if num_pairs <= most * num_hit), 0)
    tokens, outputs, num_warps, num_stages = by_tokens[least]
    depth = depth or _PRODUCT_DEPTH[format]
    programs = max(num_hit, num_pairs // tokens) * -(-num_out // outputs)
    wanted = NUM_MULTIPROCESSORS * PROGRAMS_PER_MULTIPROCESSOR // programs
    splits = 1 if is_gated else max(1, min(SPLITS_MAX, wanted, num_in // depth // SPLIT_DEPTHS_MIN))
    return ProductTile(tokens, outputs, depth, num_warps, num_stages, splits, GROUP_LONG if tokens >= 64 else 1)

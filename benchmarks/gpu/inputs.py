"""Random weights and caches, made on the device where they stay.

Owns what checks and measurements compute on.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.measure import DEVICE
from kernels.cache import FP8_MAX, encode
from kernels.ops import AttentionBatch
from kernels.triton.weights import INT4_DEPTHS, Matrices
from kernels.weights import FP8_GROUP, INT4_GROUP

# Of a weight, with its scales.
BITS = {"bf16": 16.0, "int8": 8.0, "int4": 5.0, "int4-g128": 4.25, "mxfp4": 5.0, "fp8": 8.0, "fp8-blocks": 8.25}
E4M3_SPREAD = 100.0  # of random numbers: few of them are beyond 448


@dataclass(frozen=True)
class Heads:
    """The attention of one model."""

    name: str
    num_heads: int
    num_groups: int
    size: int
    value_size: int = 0  # of values that are the first part of their keys; 0: they have a cache of their own


def layout_of(kind: str) -> str:
    """The layout of a format."""
    return kind.partition("-")[0]


def random_matrices(kind: str, num: int, num_out: int, num_in: int) -> Matrices:
    """Random prepared weights, made where they stay."""
    scale = 0.5 / math.sqrt(num_in)
    match kind:
        case "bf16":
            values = torch.randn(num, num_out, num_in, device=DEVICE, dtype=torch.bfloat16).mul_(2 * scale)
            scales = values
        case "int8":
            values = torch.randint(-127, 128, (num, num_out, num_in), dtype=torch.int8, device=DEVICE)
            scales = torch.full((num, num_out), scale / 64, device=DEVICE)
        case "fp8" | "fp8-blocks":
            spread = torch.randn(num, num_out, num_in, device=DEVICE, dtype=torch.bfloat16).mul_(E4M3_SPREAD)
            values = spread.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
            each = (num, math.ceil(num_in / FP8_GROUP), num_out) if kind == "fp8-blocks" else (num, num_out)
            scales = torch.full(each, 2 * scale / E4M3_SPREAD, device=DEVICE)
        case _:
            depth = next(depth for depth in INT4_DEPTHS if num_in % depth == 0)
            shape = (num, num_in // depth, num_out, depth // 8)
            values = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=DEVICE)
            pair = torch.tensor([scale / 4, scale / 8], device=DEVICE).bfloat16().view(torch.int32)
            if kind == "mxfp4":  # a power of two; codes reach 6
                pair = torch.full((1,), 127 + round(math.log2(scale / 2)) << 7, dtype=torch.int32, device=DEVICE)
            groups = depth // (depth if kind == "int4-g128" else INT4_GROUP)
            scales = pair.repeat(num * shape[1] * num_out * groups).view(*shape[:3], groups)
    return Matrices(layout_of(kind), values, scales, num_out, num_in)


def random_attention(
    num_sequences: int, num_queries: int, context: int, heads: Heads, kept: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor, AttentionBatch]:
    """Sequences of one length in blocks of 16, in random places: query, keys, values and where they are."""
    num_blocks = math.ceil(context / 16)
    shape = num_sequences * num_blocks, 16, heads.num_groups, heads.size
    keys = encode(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16), kept)
    if heads.value_size:
        values = keys[..., : heads.value_size]
    else:
        values = encode(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16), kept)
    tables = torch.randperm(num_sequences * num_blocks, device=DEVICE).view(num_sequences, num_blocks)
    starts = [i * num_queries for i in range(num_sequences + 1)]
    batch = AttentionBatch(tables, starts, [context] * num_sequences, tables[:0, 0])
    query = torch.randn(starts[-1], heads.num_heads, heads.size, device=DEVICE, dtype=torch.bfloat16)
    return query, keys, values, batch

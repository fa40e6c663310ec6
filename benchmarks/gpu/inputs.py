"""Random weights and caches, made on the device where they stay.

Owns what checks and measurements compute on.
"""

import math

import torch
from torch import Tensor

from benchmarks.gpu.measure import DEVICE
from kernels.ops import AttentionBatch
from kernels.triton.weights import INT4_DEPTHS, Matrices

BITS = {"bf16": 16.0, "int8": 8.0, "int4": 5.0}  # of a weight, with its scales


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
        case _:
            depth = next(depth for depth in INT4_DEPTHS if num_in % depth == 0)
            shape = (num, num_in // depth, num_out, depth // 8)
            values = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=DEVICE)
            pair = torch.tensor([scale / 4, scale / 8], device=DEVICE).bfloat16().view(torch.int32)
            scales = pair.repeat(num * shape[1] * num_out * depth // 32).view(*shape[:3], depth // 32)
    return Matrices(kind, values, scales, num_out, num_in)


def random_attention(
    num_sequences: int, num_queries: int, context: int, num_heads: int, num_groups: int, size: int
) -> tuple[Tensor, Tensor, Tensor, AttentionBatch]:
    """Sequences of one length in blocks of 16, in random places."""
    num_blocks = math.ceil(context / 16)
    keys, values = torch.randn(2, num_sequences * num_blocks, 16, num_groups, size, device=DEVICE, dtype=torch.bfloat16)
    tables = torch.randperm(num_sequences * num_blocks, device=DEVICE).view(num_sequences, num_blocks)
    starts = [i * num_queries for i in range(num_sequences + 1)]
    batch = AttentionBatch(tables, starts, [context] * num_sequences, tables[:0, 0])
    query = torch.randn(starts[-1], num_heads, size, device=DEVICE, dtype=torch.bfloat16)
    return query, keys, values, batch

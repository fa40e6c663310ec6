"""A whole matrix as bf16, from the form in which products read it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton import tiles, weights
from kernels.triton.weights import Matrices


def widen(matrix: Matrices) -> Tensor:
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
        SCALE_GROUP=matrix.group,
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
    SCALE_GROUP: tl.constexpr,
    ASM: tl.constexpr,
):
    row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    read = tl.minimum(row, num_out - 1)
    block = tl.program_id(1)
    weight = weights.tile(values, scales, read, num_out, num_in, block, FORMAT, DEPTH, SCALE_GROUP, False, ASM)
    if FORMAT == "int8":
        weight = (weight.to(tl.float32) * tl.load(scales + read)[:, None]).to(tl.bfloat16)
    column = block * DEPTH + tl.arange(0, DEPTH)[None, :]
    target = wide + row.to(tl.int64)[:, None] * num_in + column
    tl.store(target, weight, mask=(row < num_out)[:, None] & (column < num_in))

"""How keys and values are stored in the block cache, and what they stand for.

Owns the meaning of a cache's bytes: all backends write and read them so. A cache is (N, B, G, row), and a row is what
is kept of one token's key or value of one head:

    fp32, bf16   D numbers
    fp8          D numbers of e4m3, beyond 448 cut off; what is not finite becomes NaN
    int8         D levels of the row's largest magnitude / 127, and behind them that scale in fp32: 4 bytes

fp8 needs no scale: rounding moves a number by 1/16 of itself at most, be it large or small, down to 2^-6. int8 has even
steps, so that a row needs its own: rounding moves a number by 1/254 of the row's largest at most. What is not finite
makes all of an int8 row NaN.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

CACHE_DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
"""By the name that configuration uses."""

SCALE_BYTES = 4
LEVEL_MAX = 127
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def row_size(size: int, dtype: torch.dtype) -> int:
    """Elements of a row that keeps `size` numbers."""
    return size + SCALE_BYTES if dtype == torch.int8 else size


def kept_size(cache: Tensor) -> int:
    """How many numbers a row of the cache keeps: the inverse of `row_size`."""
    return cache.shape[-1] - SCALE_BYTES if cache.dtype == torch.int8 else cache.shape[-1]


def encode(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers (..., D) as rows of a cache of `dtype`."""
    if dtype == torch.int8:
        return _encode_int8(x.float())
    if dtype == torch.float8_e4m3fn:
        return x.float().clamp(-FP8_MAX, FP8_MAX).masked_fill(x.isinf(), torch.nan).to(dtype)
    return x.to(dtype)


def decode(rows: Tensor) -> Tensor:
    """What rows of a cache stand for: (..., D) fp32."""
    if rows.dtype != torch.int8:
        return rows.float()
    scale = rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)  # (..., 1)
    return rows[..., :-SCALE_BYTES].float() * scale


def bytes_of(rows: Tensor) -> Tensor:
    """The same rows as torch can index them: it has no indexing of fp8."""
    return rows.view(torch.uint8) if rows.dtype == torch.float8_e4m3fn else rows


def by_slot(cache: Tensor) -> Tensor:
    """A view of the cache (N * B, G, row), as torch can index it."""
    return bytes_of(cache).view(-1, *cache.shape[2:])


def _encode_int8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / LEVEL_MAX
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    levels = torch.where(scale > 0, x / scale, 0.0).round().to(torch.int8)
    return torch.cat([levels, scale.view(torch.int8)], dim=-1)

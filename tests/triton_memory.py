"""Memory that gives a kernel away: what it leaves unwritten is NaN, and what it writes beside its tensor is seen.

Owns `guarded`: within it, torch's allocations for kernels have guard zones and begin as NaN (integers as their least).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

GUARD_BYTES = 256  # on either side; as torch's own allocations begin on a device


def poison(dtype: torch.dtype) -> float | int:
    """A value that no result has by chance."""
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min


@contextmanager
def guarded() -> Iterator[None]:
    """Fails at the end if a guard zone was written to."""
    buffers: list[tuple[Tensor, int]] = []

    def empty(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = "cpu") -> Tensor:
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        guard = GUARD_BYTES // dtype.itemsize
        buffer = torch.full((prod(sizes) + 2 * guard,), poison(dtype), dtype=dtype, device=device)
        buffers.append((buffer, guard))
        return buffer[guard : guard + prod(sizes)].view(sizes)

    def empty_like(x: Tensor) -> Tensor:
        return empty(x.shape, dtype=x.dtype, device=x.device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", empty_like)
        yield
    for buffer, guard in buffers:
        for zone in (buffer[:guard], buffer[len(buffer) - guard :]):
            untouched = zone.isnan() if zone.is_floating_point() else zone == poison(zone.dtype)
            assert untouched.all(), f"written beside a tensor of {len(buffer) - 2 * guard} elements"


def far_rows(num_rows: int, num_columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random rows 2^30 elements apart, so that an address of 32 bits would miss the third. The gaps take no memory.

    The stride itself fits into 32 bits: one that does not, Triton passes in 64, and the product comes right by luck.
    """
    stride = 2**30
    memory = torch.UntypedStorage(((num_rows - 1) * stride + num_columns) * dtype.itemsize)
    rows = torch.tensor([], dtype=dtype).set_(memory, 0, (num_rows, num_columns), (stride, 1))
    return rows.copy_(torch.randn(num_rows, num_columns))

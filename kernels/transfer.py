"""The way between the host and a device, without waiting for either.

Owns the two copies that a step makes: what it works on goes out, what it brought comes back. On the host itself nothing
is copied.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

# Elements from which arrays begin at multiples: Triton compiles anew for an address that 16 bytes do not divide.
APART = 16


def send(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """The arrays, all of one dtype, as tensors on the device, where they go in one copy.

    It is queued behind what the device has to do. The pinned memory that it reads is torch's, which gives it to nobody
    else before then. On the host the tensors are the arrays' own memory.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    starts = [0, *accumulate(-(-array.size // APART) * APART for array in arrays)]
    dtype = torch.from_numpy(arrays[0]).dtype
    staged = torch.empty(starts[-1], dtype=dtype, pin_memory=device.type == "cuda")
    numbers = staged.numpy()
    for start, array in zip(starts, arrays, strict=False):
        numbers[start : start + array.size] = array.reshape(-1)
    there = staged.to(device, non_blocking=True)
    return [there[start : start + array.size].view(array.shape) for start, array in zip(starts, arrays, strict=False)]


class Returning:
    """Tensors on their way to the host: `wait` has them there."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """The copies are queued behind what the device has to do by now."""
        self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # pinned, where it comes from CUDA
        self._arrived: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def wait(self) -> list[Tensor]:
        """All has arrived; what the device was given since goes on."""
        if self._arrived:
            self._arrived.synchronize()
        return self._tensors

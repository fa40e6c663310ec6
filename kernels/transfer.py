"""The way between the host and a device, without waiting for either.

Owns the two copies that a step makes: what it works on goes out, what it brought comes back. On the host itself nothing
is copied.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def send(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """The arrays, all of one dtype, as tensors on the device, where they go in one copy.

    It is queued behind what the device has to do. The pinned memory that it reads is torch's, which gives it to nobody
    else before then. On the host the tensors are the arrays' own memory.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    sizes = [array.size for array in arrays]
    flat = [array.reshape(-1) for array in arrays]
    staged = torch.empty(sum(sizes), dtype=torch.from_numpy(flat[0]).dtype, pin_memory=device.type == "cuda")
    np.concatenate(flat, out=staged.numpy())
    parts = torch.split_with_sizes(staged.to(device, non_blocking=True), sizes)
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


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

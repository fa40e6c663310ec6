"""The processes that compute one model together, as one of them sees them.

Owns the sums and the exchange of tensors among ranks. Knows no model: which part of one a rank computes is
`engine/models/parts.py`'s. One rank alone exchanges nothing, by the same calls. Every rank makes the same calls in the
same order, and gets the same bits from them. Where a rank has died they raise RuntimeError, or hang on a GPU.
"""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional

RANKS_MAX = 16  # the most GPUs that one machine has; more machines would need a network that is trusted

# Ranks wait for each other within a step, and while the slowest loads its part, from a slow disk perhaps for hours. The
# worker's own watch over the engine's steps is shorter.
TIMEOUT = timedelta(days=1)

_C10D: Any = distributed  # its stubs lack half of what it exports


@dataclass(frozen=True)
class Ranks:
    """`size` processes of one machine, of which this is number `rank`. Rank 0 is the worker's own."""

    rank: int = 0
    size: int = 1
    whole_experts: bool = False  # each routed expert is one rank's; otherwise all have a part of each
    group: Any = None  # torch's; None: nothing is exchanged
    device: torch.device | None = None  # where the group's tensors are

    @property
    def note(self) -> str:
        """For the text of an error that a part has and the whole may not have."""
        return "" if self.size == 1 else f" (in the part of one of {self.size} ranks)"

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in its place."""
        if self.group is not None:
            self.group.allreduce([x]).wait()
        return x

    def gather(self, part: Tensor, length: int) -> Tensor:
        """The ranks' parts (T, n) side by side, the first `length` of each row. Only the last may be shorter."""
        if self.group is None:
            return part
        part = functional.pad(part, (0, -(-length // self.size) - part.shape[1])).contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)]
        self.group.allgather([parts], [part]).wait()
        return torch.cat(parts, dim=1)[:, :length]

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x, in its place."""
        if self.group is not None:
            self.group.broadcast([x]).wait()
        return x

    def least(self, number: int) -> int:
        """The least of all ranks' numbers. All of them have come this far."""
        if self.group is None:
            return number
        least, options = torch.tensor([number], device=self.device), _C10D.AllreduceOptions()
        options.reduceOp = _C10D.ReduceOp.MIN
        self.group.allreduce([least], options).wait()
        return int(least)


ALONE = Ranks()


def join(rank: int, size: int, folder: Path, device: torch.device, *, whole_experts: bool) -> Ranks:
    """One of `size` ranks, which find each other by a file in the folder. All of them are there.

    They talk by NCCL on GPUs, else by the loopback interface. Nobody else may write to the folder.
    """
    store = _C10D.FileStore(str(folder / "ranks"), size)
    group = _nccl(store, rank, size, device) if device.type == "cuda" else _gloo(store, rank, size)
    ranks = Ranks(rank, size, whole_experts, group, device)
    ranks.least(0)  # the folder may go
    return ranks


def _gloo(store: Any, rank: int, size: int) -> Any:
    options = _C10D.ProcessGroupGloo._Options()
    options._devices = [_C10D.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = TIMEOUT
    return _C10D.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int, device: torch.device) -> Any:
    torch.cuda.set_device(device)
    options = _C10D.ProcessGroupNCCL.Options()
    options._timeout = TIMEOUT
    return _C10D.ProcessGroupNCCL(store, rank, size, options)

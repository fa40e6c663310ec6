"""How much of a GPU's memory is left for the cache: found out by computing the largest step once.

Owns the sum of what else has to fit. Never allocates the cache, and knows the device by a `Probe` alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.batch import Batch, build_batch, none_drawn
from engine.blocks import blocks_for
from engine.config import EngineConfig
from engine.errors import EngineMisconfigured
from engine.sequence import nobodys

# What a graph takes beside the memory that all share: some twelve launches a layer, each with its arguments. 48 layers
# at 16 KB a launch are 9 MB; half as much again for what was not counted. To be checked by `make gpu`.
GRAPH_BYTES = 14 << 20


class Probe(Protocol):
    """A device's memory."""

    def free_bytes(self) -> int:
        """What could be allocated now."""
        ...

    def total_bytes(self) -> int:
        """All that there is."""
        ...

    def peak_bytes(self, compute: Callable[[], object]) -> int:
        """Computes, and says how much more than before was allocated at the most."""
        ...


@dataclass(frozen=True)
class CudaProbe:
    """Of a CUDA device, as torch's allocator sees it."""

    device: torch.device

    def free_bytes(self) -> int:
        """What the driver has, and what the allocator keeps and does not use."""
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + kept

    def total_bytes(self) -> int:
        """As the driver says."""
        return torch.cuda.mem_get_info(self.device)[1]

    def peak_bytes(self, compute: Callable[[], object]) -> int:
        """Tensors alone: what kernels and libraries load stays, and is not free any more afterwards."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        compute()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        return peak


@dataclass(frozen=True)
class Demand:
    """What has to fit beside the cache, in bytes."""

    total: int
    free: int  # with the weights loaded
    step: int
    graphs: int

    def blocks(self, share: float, block_bytes: int, num_wanted: int, num_least: int) -> int:
        """How many blocks the cache can have: as many as are wanted, or as the share of the rest allows.

        Raises EngineMisconfigured, with the numbers, where those are fewer than `num_least`.
        """
        rest = self.free - self.step - self.graphs
        num = min(num_wanted, int(max(0, rest) * share) // block_bytes)
        if num >= num_least:
            return num
        raise EngineMisconfigured(
            f"the model does not fit: of {_gb(self.total)}, weights and what else is there take "
            f"{_gb(self.total - self.free)}, the largest step {_gb(self.step)}, graphs {_gb(self.graphs)}. Of the "
            f"{_gb(max(0, rest))} left the cache may have {share:.0%}, and it needs {_gb(num_least * block_bytes)}. "
            "Use a smaller weight format, lower cache_tokens, tokens_per_step_max or sequences_max, or raise "
            "cache_memory_share"
        )


def largest_batch(config: EngineConfig, device: torch.device) -> tuple[Batch, int]:
    """A step of as many tokens and rows of logits as there may be, and how many blocks it writes to."""
    num_sequences = min(config.sequences_max, config.tokens_per_step_max)
    shares, num_blocks = [], 0
    for place in range(num_sequences):
        length = (config.tokens_per_step_max + place) // num_sequences  # they differ by one, and make up the step
        stop = num_blocks + blocks_for(length, config.block_size)
        shares.append(nobodys(length, list(range(num_blocks, stop))).share(length))
        num_blocks = stop
    return build_batch(shares, config.block_size, none_drawn(device)), num_blocks


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"

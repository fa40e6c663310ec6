"""Decodes and verifications of a few sizes, recorded once and replayed: the host launches a step at one stroke.

Owns the sizes, the inputs that stay where they are, and the padding. A step in which every token has a row of logits is
padded to the next size and replayed; any other one, and any that is too large, is computed as it comes. What recording
means is a value, `Capture`: CUDA's graphs on a GPU.

Padding is shares of a sequence that nobody asked for, of one token in a block that is nobody's: token 0 at position 0,
always, so that it chooses the same experts wherever it stands and reads few weights that the step would not have read.
Sampling stays outside: what it does hangs on what the requests ask for.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from engine.batch import Batch, build_batch, none_drawn
from engine.sequence import Share, nobodys
from kernels.ops import AttentionBatch

_LOG = logging.getLogger(__name__)

Forward = Callable[[Batch], Tensor]
Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""What computes on tensors that stay -> what computes it again, into the same result."""

TOKENS_MAX = 512  # beyond, a step takes longer than launching its kernels one by one


def sizes_of(sequences_max: int, queries_max: int) -> dict[int, list[int]]:
    """Which numbers of tokens to record, by how many of them may be one sequence's: one, or with its drafts."""
    return {num: sizes_up_to(min(sequences_max * num, TOKENS_MAX)) for num in sorted({1, queries_max})}


def sizes_up_to(tokens_max: int) -> list[int]:
    """All up to 8, then four to each doubling: a fifth is padding at most."""
    sizes = [*range(1, 9)]
    while sizes[-1] < tokens_max:
        sizes.append(sizes[-1] + (1 << sizes[-1].bit_length() - 3))
    return [*(size for size in sizes if size < tokens_max), tokens_max]


@dataclass(frozen=True)
class _Recorded:
    inputs: Batch
    replay: Callable[[], Tensor]

    def run(self, batch: Batch) -> Tensor | None:
        """The logits of a batch of this size; None where its attention has more parts than there is room for."""
        if not all(plan.update(batch.attention) for plan in self.inputs.attention.plans.values()):
            return None
        there, new = self.inputs, batch
        there.token_ids.copy_(new.token_ids)
        there.positions.copy_(new.positions)
        there.attention.slots.copy_(new.attention.slots)
        tables = new.attention.block_tables
        there.attention.block_tables[: len(tables), : tables.shape[1]].copy_(tables)
        return self.replay()


class Graphs:
    """A forward that replays what it can."""

    def __init__(self, forward: Forward, sizes: dict[int, list[int]], spare_block: int, block_size: int) -> None:
        """`sizes`: those of `sizes_of`. Records nothing yet."""
        self._forward = forward
        self._sizes = sizes
        self._spare_block = spare_block
        self._padding = nobodys(1, [spare_block]).share(1)
        self._block_size = block_size
        self._recorded: dict[tuple[int, int], _Recorded] = {}  # by tokens of the step, and of a sequence at most

    @torch.inference_mode()
    def record(self, capture: Capture, table_width: int, device: torch.device) -> None:
        """All sizes are recorded, the largest first, so that the others find its memory. `table_width`: in blocks."""
        began_s = time.monotonic()
        num_rows = max(map(max, self._sizes.values()))
        largest = self._inputs(num_rows, table_width, device)
        result = self._forward(_first(largest, num_rows, queries_max=0)).clone()  # (R, V): one for all recordings
        for queries_max, sizes in self._sizes.items():
            for size in reversed(sizes):
                inputs = _first(largest, size, queries_max)
                self._forward(inputs)  # compiles, and makes the plans
                if not inputs.attention.plans:
                    _LOG.warning("no graphs: attention of this kind is planned anew in every step")
                    return
                self._recorded[size, queries_max] = _Recorded(
                    inputs, capture(partial(self._into, result[:size], inputs))
                )
                _LOG.info("recorded a step of %d tokens", size)
        _LOG.info("recorded %d graphs in %.1f s", len(self._recorded), time.monotonic() - began_s)

    def padded(self, shares: list[Share]) -> list[Share]:
        """The shares of a step, with shares of nobody behind them where it can be replayed at the next size."""
        if not self._recorded or any(share.num_rows < len(share.tokens) for share in shares):
            return shares
        sizes = self._sizes.get(self._queries_max(max(len(share.tokens) for share in shares)), [])
        num_tokens = sum(len(share.tokens) for share in shares)
        place = bisect_left(sizes, num_tokens)
        return shares + [self._padding] * (sizes[place] - num_tokens) if place < len(sizes) else shares

    def __call__(self, batch: Batch) -> Tensor:
        """The logits (R, V) fp32 of the batch, valid until the next call."""
        recorded = self._recording_of(batch)
        logits = recorded.run(batch) if recorded else None
        return self._forward(batch) if logits is None else logits

    def _into(self, result: Tensor, inputs: Batch) -> Tensor:
        return result.copy_(self._forward(inputs))

    def _recording_of(self, batch: Batch) -> _Recorded | None:
        num_tokens = len(batch.token_ids)
        if not self._recorded or len(batch.rows) < num_tokens:
            return None
        longest = max(end - start for start, end in pairwise(batch.attention.query_starts))
        return self._recorded.get((num_tokens, self._queries_max(longest)))

    def _queries_max(self, longest: int) -> int:
        """The kind of recording that a step belongs to; 0: none."""
        return next((num for num in self._sizes if longest <= num), 0)

    def _inputs(self, size: int, table_width: int, device: torch.device) -> Batch:
        """Nobody's tokens, in tensors that stay."""
        batch = build_batch([self._padding] * size, self._block_size, none_drawn(device))
        tables = torch.full((size, table_width), self._spare_block, device=device)
        return replace(batch, attention=replace(batch.attention, block_tables=tables))


def _first(inputs: Batch, size: int, queries_max: int) -> Batch:
    """The first tokens of the inputs, which are a sequence each, as inputs of their own in the same memory."""
    attention = AttentionBatch(
        inputs.attention.block_tables[:size],
        inputs.attention.query_starts[: size + 1],
        inputs.attention.context_lens[:size],
        inputs.attention.slots[:size],
        queries_max=queries_max,
    )
    return Batch(inputs.token_ids[:size], inputs.positions[:size], attention, inputs.rows[:size])


def cuda_capture() -> Capture:
    """CUDA's graphs, in memory that all of them share: one is replayed at a time."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # one: cuBLAS keeps 32 MB for each

    def capture(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()  # libraries choose and allocate at their first call on a stream
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            result = compute()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    return capture

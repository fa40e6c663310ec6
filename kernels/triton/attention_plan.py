"""How a step's sequences are cut into items of attention, on the host, once for all layers of a kind.

Owns the list. An item is some query tokens of one sequence and a segment of its context. How a sequence is cut depends
on itself alone: its sums are the same in any company. The list is kept in `batch.plans`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import AttentionBatch
from kernels.triton import tiles

# A segment's partial result is written and read once in fp32: 8 Dv bytes a row, against 4 Dv of keys and values for
# each position. So 16 positions a row make it an eighth of the traffic at most.
POSITIONS_PER_ROW = 16
SEGMENT_MIN = 256  # below, starting a program costs more than reading: 64 KB with heads of 64 in bf16
SEGMENTS_MAX = 32  # one tile of the second kernel; with 4 to 8 key-value heads, a lone sequence fills the device


@dataclass(frozen=True)
class Work:
    """The items of all sequences whose queries have tiles of one size."""

    tile: tiles.AttentionTile
    items: Tensor  # (items, 8) int32: see `attend`
    joins: Tensor  # (tiles that were split, 4) int32: see `join`
    num_partials: int


Integers = NDArray[np.int64]


def plan(batch: AttentionBatch, heads: int, is_large: bool, window: int | None) -> Iterator[Work]:
    """The step's work, for `heads` query heads of a group; is_large: as in `tiles.attention_is_large`."""
    num_queries = np.array([end - start for start, end in pairwise(batch.query_starts)], dtype=np.int64)  # (S,)
    rows = tiles.attention_rows(num_queries * heads, heads, is_large)  # (S,)
    for size in np.unique(rows[num_queries > 0]).tolist():
        sequences = np.flatnonzero((rows == size) & (num_queries > 0))
        yield _work(batch, sequences, num_queries, heads, tiles.attention_tile(size, is_large), window)


def _work(
    batch: AttentionBatch,
    sequences: Integers,
    num_queries: Integers,
    heads: int,
    tile: tiles.AttentionTile,
    window: int | None,
) -> Work:
    tokens = tile.rows // heads  # of one tile
    context = np.array(batch.context_lens, dtype=np.int64)
    num_tiles = -(-num_queries[sequences] // tokens)
    owner, place = np.repeat(sequences, num_tiles), _count_up(num_tiles)  # (tiles,): whose, and the how many-eth of its
    first = place * tokens  # the tile's first query among its sequence's
    num_tokens = np.minimum(tokens, num_queries[owner] - first)
    position = context[owner] - num_queries[owner] + first  # of the first query
    end = position + num_tokens
    start = np.maximum(position - window + 1, 0) if window is not None else np.zeros_like(end)
    start = start // tile.positions * tile.positions

    segment = np.maximum(-(-context // SEGMENTS_MAX), np.maximum(SEGMENT_MIN, POSITIONS_PER_ROW * heads * num_queries))
    segment = (-(-segment // tile.positions) * tile.positions)[owner]  # whole tiles
    num_segments = -(-(end - start) // segment)
    of, nth = np.repeat(np.arange(len(owner)), num_segments), _count_up(num_segments)  # (items,): which tile's, which
    split = num_segments > 1
    first_partial = np.cumsum(num_segments * split) - num_segments * split
    row = np.array(batch.query_starts, dtype=np.int64)[owner] + first
    segment_start = start[of] + nth * segment[of]
    items = np.stack(
        [
            owner[of],
            row[of],
            num_tokens[of],
            position[of],
            segment_start,
            np.minimum(segment_start + segment[of], end[of]),
            np.where(split[of], first_partial[of] + nth, -1),
            nth,
        ],
        axis=1,
    )
    joins = np.stack([row, num_tokens, first_partial, num_segments], axis=1)[split]
    device = batch.block_tables.device
    return Work(tile, _send(items, device), _send(joins, device), int(num_segments[split].sum()))


def _count_up(lengths: Integers) -> Integers:
    """0 .. length - 1 for each of the lengths in turn."""
    ends: Integers = np.cumsum(lengths)
    return np.arange(int(ends[-1])) - np.repeat(ends - lengths, lengths)


def _send(array: Integers, device: torch.device) -> Tensor:
    return torch.from_numpy(array.astype(np.int32)).to(device, non_blocking=True)

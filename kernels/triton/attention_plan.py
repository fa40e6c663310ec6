"""How a step's sequences are cut into items of attention, on the host, once for all layers of a kind.

Owns the list. An item is some query tokens of one sequence and a segment of its context. How a sequence is cut depends
on itself alone: its sums are the same in any company. The list is kept in `batch.plans`.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.ops import AttentionBatch
from kernels.transfer import send
from kernels.triton import tiles

# A segment's partial result is written and read once in fp32: 8 Dv bytes a row, against 4 Dv of keys and values for
# each position. So 16 positions a row make it an eighth of the traffic at most.
POSITIONS_PER_ROW = 16
SEGMENT_MIN = 256  # below, starting a program costs more than reading: 64 KB with heads of 64 in bf16
PARTIAL = 6  # the column of an item that says where its partial result goes
# Of all sequences together, beyond one each, in launches of fixed size: contexts of 262,000 tokens and more, about what
# an H100 keeps beside a model. A program that has nothing to do costs some 0.5 us of a multiprocessor's eight places.
SEGMENTS_SPARE = 1024
SEGMENTS_MAX = 32  # one tile of the second kernel; with 4 to 8 key-value heads, a lone sequence fills the device


@dataclass(frozen=True)
class Work:
    """The items of all sequences whose queries have tiles of one size."""

    tile: tiles.AttentionTile
    items: Tensor  # (items, 8) int32: see `attend`
    joins: Tensor  # (tiles that were split, 4) int32: see `join`
    num_partials: int


Integers = NDArray[np.int64]


def plan(batch: AttentionBatch, heads: int, is_large: bool, window: int | None) -> "StepPlan | FixedPlan":
    """The work, for `heads` query heads of a group; is_large: as in `tiles.attention_is_large`."""
    return (FixedPlan if batch.queries_max else StepPlan)(batch, heads, is_large, window)


class StepPlan:
    """For one step."""

    def __init__(self, batch: AttentionBatch, heads: int, is_large: bool, window: int | None) -> None:
        num_queries = _num_queries(batch)
        rows = tiles.attention_rows(num_queries * heads, heads, is_large)  # (S,)
        self.works = []
        for size in np.unique(rows[num_queries > 0]).tolist():
            tile = tiles.attention_tile(size, is_large)
            sequences = np.flatnonzero((rows == size) & (num_queries > 0))
            items, joins = _items(batch, sequences, num_queries, heads, tile, window)
            there = _send(items, joins, batch.block_tables.device)
            self.works.append(Work(tile, *there, num_partials=int((items[:, PARTIAL] >= 0).sum())))


class FixedPlan:
    """For steps that are all launched alike: room for items, most of which may be of no queries and do nothing."""

    def __init__(self, batch: AttentionBatch, heads: int, is_large: bool, window: int | None) -> None:
        self._heads, self._window = heads, window
        num_sequences = len(batch.context_lens)
        rows = tiles.attention_rows(np.array([batch.queries_max * heads]), heads, is_large)
        num_items = num_sequences + min(num_sequences * (SEGMENTS_MAX - 1), SEGMENTS_SPARE)
        nothing = np.zeros((num_items, 8), np.int64), np.zeros((num_sequences, 4), np.int64)
        items, joins = _send(*nothing, batch.block_tables.device)
        self._work = Work(tiles.attention_tile(int(rows[0]), is_large), items, joins, num_items)
        self.works = [self._work]
        self.update(batch)

    def update(self, batch: AttentionBatch) -> bool:
        """See `kernels.ops.Plan`."""
        num_queries = _num_queries(batch)
        sequences = np.arange(len(num_queries))
        items, joins = _items(batch, sequences, num_queries, self._heads, self._work.tile, self._window)
        room = self._work.items, self._work.joins
        if len(items) > len(room[0]) or len(joins) > len(room[1]):
            return False
        sent = _send(_padded(items, len(room[0])), _padded(joins, len(room[1])), batch.block_tables.device)
        for there, new in zip(room, sent, strict=True):
            there.copy_(new)
        return True


def _num_queries(batch: AttentionBatch) -> Integers:
    return np.array([end - start for start, end in pairwise(batch.query_starts)], dtype=np.int64)  # (S,)


def _padded(array: Integers, length: int) -> Integers:
    """With rows of zeros: items and joins of no queries."""
    return np.pad(array, ((0, length - len(array)), (0, 0)))


def _items(
    batch: AttentionBatch,
    sequences: Integers,
    num_queries: Integers,
    heads: int,
    tile: tiles.AttentionTile,
    window: int | None,
) -> tuple[Integers, Integers]:
    """What `attend` and `join` do for these sequences."""
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
    return items, np.stack([row, num_tokens, first_partial, num_segments], axis=1)[split]


def _count_up(lengths: Integers) -> Integers:
    """0 .. length - 1 for each of the lengths in turn."""
    ends: Integers = np.cumsum(lengths)
    return np.arange(int(ends[-1])) - np.repeat(ends - lengths, lengths)


def _send(items: Integers, joins: Integers, device: torch.device) -> tuple[Tensor, Tensor]:
    items_there, joins_there = send([items.astype(np.int32), joins.astype(np.int32)], device)
    return items_there, joins_there

"""Attention over the block cache: decodes, drafts, prompts and their chunks by one kernel over a list of items.

Owns the list. An item is some query tokens of one sequence and a segment of its context; the query heads that share a
key-value head are rows of the same tile, so a segment is read once for all of them. A context that is read in several
segments leaves partial results, which a second kernel joins (flash decoding). How a sequence is cut depends on itself
alone: its sums are the same in any company. The list is worked out once a step and kept in `batch.plans`.

The method is flash attention (arXiv 2205.14135, 2307.08691): softmax by tiles, with a running maximum. A decode is
bound by memory: it reads its context once, 2 G (D + Dv) bytes a position in bf16. A prompt is bound by arithmetic:
2 H (D + Dv) operations for each pair of a query and a position that it sees.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kernels import reference
from kernels.ops import AttentionBatch
from kernels.triton import tiles

LOG2_E = tl.constexpr(1.4426950408889634)  # exponentials are powers of two: one instruction

# A segment's partial result is written and read once in fp32: 8 Dv bytes a row, against 4 Dv of keys and values for
# each position. So 16 positions a row make it an eighth of the traffic at most.
POSITIONS_PER_ROW = 16
SEGMENT_MIN = 256  # below, starting a program costs more than reading: 64 KB with heads of 64 in bf16
SEGMENTS_MAX = 32  # one tile of the second kernel; with 4 to 8 key-value heads, a lone sequence fills the device


def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As the definition, which serves caches of another dtype than the query's, and more heads in a group than the
    largest tile has rows (128; 64 of large heads).
    """
    if key_cache.dtype != query.dtype:
        return reference.attention(query, key_cache, value_cache, batch, scale, window, sinks)
    num_heads, key_size = query.shape[1:]
    num_groups, value_size = value_cache.shape[2:]
    heads = num_heads // num_groups  # of one group
    if heads > tiles.attention_rows_max(key_size + value_size):
        return reference.attention(query, key_cache, value_cache, batch, scale, window, sinks)
    output = torch.empty(len(query), num_heads, value_size, dtype=query.dtype, device=query.device)
    plan_key = ("triton", heads, key_size, value_size, window)
    if plan_key not in batch.plans:
        batch.plans[plan_key] = list(_plan(batch, heads, key_size + value_size, window))
    for work in batch.plans[plan_key]:
        shape = (work.num_partials, num_groups, work.tile.rows)
        partial = torch.empty(*shape, value_size, dtype=torch.float32, device=query.device)
        partial_log = torch.empty(shape, dtype=torch.float32, device=query.device)
        _attend[len(work.items), num_groups](
            query,
            key_cache,
            value_cache,
            batch.block_tables,
            work.items,
            output,
            partial,
            partial_log,
            query if sinks is None else sinks,
            scale * LOG2_E.value,
            window or 0,
            *query.stride()[:2],
            *key_cache.stride()[1:3],
            *value_cache.stride()[1:3],
            batch.block_tables.stride(0),
            **_key_blocks(key_size),
            KEY_SIZE=key_size,
            VALUE_SIZE=value_size,
            VALUE_BLOCK=max(triton.next_power_of_2(value_size), tiles.DOT_MIN),
            VALUE_IS_KEY=_is_part_of(value_cache, key_cache),
            BLOCK_SIZE=key_cache.shape[1],
            GROUP_HEADS=heads,
            HAS_WINDOW=window is not None,
            HAS_SINKS=sinks is not None,
            HAS_UNMASKED=work.tile.rows >= tiles.LONG_QUERY_ROWS and window is None,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            ROWS=work.tile.rows,
            TILE=work.tile.positions,
            num_warps=work.tile.num_warps,
            num_stages=work.tile.num_stages,
        )
        if work.num_partials:
            _join[len(work.joins), num_groups, work.tile.rows](
                work.joins,
                output,
                partial,
                partial_log,
                VALUE_SIZE=value_size,
                VALUE_BLOCK=triton.next_power_of_2(value_size),
                GROUP_HEADS=heads,
                ROWS=work.tile.rows,
                SEGMENTS=SEGMENTS_MAX,
            )
    return output


def _key_blocks(key_size: int) -> dict[str, int]:
    """A key as one or two powers of two: 576 is 512 and 64, where one would be 1,024."""
    block = max(1 << key_size.bit_length() - 1, tiles.DOT_MIN)
    rest = max(key_size - block, 0)
    return {"KEY_BLOCK": block, "KEY_REST": max(triton.next_power_of_2(rest), tiles.DOT_MIN) if rest else 0}


def _is_part_of(value_cache: Tensor, key_cache: Tensor) -> bool:
    """Whether a value is the first part of its key, as in a latent cache: then it is read once."""
    key_size, value_size = key_cache.shape[3], value_cache.shape[3]
    is_there = value_cache.data_ptr() == key_cache.data_ptr() and value_cache.stride() == key_cache.stride()
    return is_there and key_size > value_size == _key_blocks(key_size)["KEY_BLOCK"]


# ------------------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class _Work:
    """The items of all sequences whose queries have tiles of one size."""

    tile: tiles.AttentionTile
    items: Tensor  # (items, 8) int32: see `_attend`
    joins: Tensor  # (tiles that were split, 4) int32: see `_join`
    num_partials: int


Integers = NDArray[np.int64]


def _plan(batch: AttentionBatch, heads: int, head_size: int, window: int | None) -> Iterator[_Work]:
    num_queries = np.array([end - start for start, end in pairwise(batch.query_starts)], dtype=np.int64)  # (S,)
    rows = tiles.attention_rows(num_queries * heads, heads, head_size)  # (S,)
    for size in np.unique(rows[num_queries > 0]).tolist():
        sequences = np.flatnonzero((rows == size) & (num_queries > 0))
        yield _work(batch, sequences, num_queries, heads, tiles.attention_tile(size, head_size), window)


def _work(
    batch: AttentionBatch,
    sequences: Integers,
    num_queries: Integers,
    heads: int,
    tile: tiles.AttentionTile,
    window: int | None,
) -> _Work:
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
    return _Work(tile, _send(items, device), _send(joins, device), int(num_segments[split].sum()))


def _count_up(lengths: Integers) -> Integers:
    """0 .. length - 1 for each of the lengths in turn."""
    ends: Integers = np.cumsum(lengths)
    return np.arange(int(ends[-1])) - np.repeat(ends - lengths, lengths)


def _send(array: Integers, device: torch.device) -> Tensor:
    return torch.from_numpy(array.astype(np.int32)).to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------- the kernels


@triton.jit
def _attend(
    query,
    key_cache,
    value_cache,
    block_tables,
    items,
    output,
    partial,
    partial_log,
    sinks,
    scale,
    window,
    query_token,
    query_head,
    key_slot,
    key_group,
    value_slot,
    value_group,
    table_stride,
    KEY_SIZE: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_REST: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    VALUE_IS_KEY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_UNMASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    # One item and one key-value head: rows are query tokens times the group's heads. An item is (sequence, row of its
    # first query in the batch, number of queries, position of the first, start and end of the segment, partial result
    # to write, the segment's number). A partial result of -1: the segment is the whole context, write the output.
    group, num_groups = tl.program_id(1), tl.num_programs(1)
    item = items + tl.program_id(0) * 8
    table = block_tables + tl.load(item).to(tl.int64) * table_stride
    first_row, num_queries, first_position = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    start, end, place = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)

    row = tl.arange(0, ROWS)
    token, head = row // GROUP_HEADS, group * GROUP_HEADS + row % GROUP_HEADS
    inside = token < num_queries
    position = first_position + token  # (ROWS,): the last that a row sees
    source = query + (first_row + token).to(tl.int64)[:, None] * query_token + head[:, None] * query_head
    column = tl.arange(0, KEY_BLOCK)[None, :]
    q = tl.load(source + column, mask=inside[:, None] & (column < KEY_SIZE), other=0.0)  # (ROWS, KEY_BLOCK)
    q_rest = q
    if KEY_REST > 0:
        column = KEY_BLOCK + tl.arange(0, KEY_REST)[None, :]
        q_rest = tl.load(source + column, mask=inside[:, None] & (column < KEY_SIZE), other=0.0)

    maximum = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if HAS_SINKS:  # one more score, without a value, that the first segment alone counts
        is_first = tl.load(item + 7) == 0
        maximum = tl.where(is_first, tl.load(sinks + head).to(tl.float32) * LOG2_E, maximum)
        total = tl.where(is_first, 1.0, total)
    accumulated = tl.zeros((ROWS, VALUE_BLOCK), tl.float32)
    keys, values = key_cache + group * key_group, value_cache + group * value_group

    masked_from = start
    if HAS_UNMASKED:  # tiles that every row sees whole
        masked_from = tl.maximum(start, tl.minimum(first_position + 1, end) // TILE * TILE)
        for tile in range(start, masked_from, TILE):
            maximum, total, accumulated = _visit(
                q, q_rest, keys, values, table, tile, end, position, scale, window, key_slot, value_slot,
                maximum, total, accumulated, KEY_SIZE, KEY_BLOCK, KEY_REST, VALUE_SIZE, VALUE_BLOCK, VALUE_IS_KEY,
                BLOCK_SIZE, False, False, PRECISION, TILE,
            )  # fmt: skip
    for tile in range(masked_from, end, TILE):
        maximum, total, accumulated = _visit(
            q, q_rest, keys, values, table, tile, end, position, scale, window, key_slot, value_slot,
            maximum, total, accumulated, KEY_SIZE, KEY_BLOCK, KEY_REST, VALUE_SIZE, VALUE_BLOCK, VALUE_IS_KEY,
            BLOCK_SIZE, True, HAS_WINDOW, PRECISION, TILE,
        )  # fmt: skip

    # A row that sees nothing of this segment has no total: it counts as exp(-inf) when segments are joined.
    result = accumulated / tl.where(total > 0, total, 1.0)[:, None]
    column = tl.arange(0, VALUE_BLOCK)[None, :]
    writes = inside[:, None] & (column < VALUE_SIZE)
    if place >= 0:
        slot = (place.to(tl.int64) * num_groups + group) * ROWS + row
        tl.store(partial + slot[:, None] * VALUE_SIZE + column, result, mask=writes)
        logarithm = tl.where(total > 0, maximum + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(partial_log + slot, logarithm, mask=inside)
    else:
        target = ((first_row + token).to(tl.int64) * (num_groups * GROUP_HEADS) + head) * VALUE_SIZE
        tl.store(output + target[:, None] + column, result.to(output.dtype.element_ty), mask=writes)


@triton.jit
def _visit(
    q,
    q_rest,
    keys,
    values,
    table,
    tile,
    end,
    position,
    scale,
    window,
    key_slot,
    value_slot,
    maximum,
    total,
    accumulated,
    KEY_SIZE: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    KEY_REST: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    VALUE_IS_KEY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
):
    # One tile of positions joins the running maximum, total and weighted sum of the values.
    there = tile + tl.arange(0, TILE)
    written = there < end  # slots beyond may hold anything, NaN included, which times nothing is NaN
    if BLOCK_SIZE % TILE == 0:  # the tile lies in one block
        block = tl.load(table + tile // BLOCK_SIZE)  # int64, and so all addresses
        slot = block * BLOCK_SIZE + tile % BLOCK_SIZE + tl.arange(0, TILE)
    elif MASKED:
        block = tl.load(table + there // BLOCK_SIZE, mask=written, other=0)
        slot = block * BLOCK_SIZE + there % BLOCK_SIZE
    else:
        block = tl.load(table + there // BLOCK_SIZE)
        slot = block * BLOCK_SIZE + there % BLOCK_SIZE

    key = _rows(keys + slot[:, None] * key_slot, written, 0, KEY_BLOCK, KEY_SIZE, MASKED)  # (TILE, KEY_BLOCK)
    scores = tl.dot(q, key.T, input_precision=PRECISION)
    if KEY_REST > 0:
        rest = _rows(keys + slot[:, None] * key_slot, written, KEY_BLOCK, KEY_REST, KEY_SIZE, MASKED)
        scores = tl.dot(q_rest, rest.T, scores, input_precision=PRECISION)
    scores *= scale  # (ROWS, TILE)
    if MASKED:
        seen = there[None, :] <= position[:, None]  # so none of a segment's last tile beyond what is written
        if HAS_WINDOW:
            seen &= there[None, :] > position[:, None] - window
        scores = tl.where(seen, scores, float("-inf"))

    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    base = new_maximum
    if MASKED:
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)  # a row that has seen nothing yet
    probabilities = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(maximum - base)
    total = total * shrink + tl.sum(probabilities, 1)
    if VALUE_IS_KEY:
        value = key
    else:
        value = _rows(values + slot[:, None] * value_slot, written, 0, VALUE_BLOCK, VALUE_SIZE, MASKED)
    accumulated = tl.dot(
        probabilities.to(value.dtype), value, accumulated * shrink[:, None], input_precision=PRECISION
    )  # (ROWS, VALUE_BLOCK)
    return new_maximum, total, accumulated


@triton.jit
def _rows(pointers, written, FIRST: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr):
    # COLUMNS columns from FIRST on of rows of SIZE elements; 0 beyond them and, where MASKED, beyond what is written.
    column = FIRST + tl.arange(0, COLUMNS)[None, :]
    if FIRST + COLUMNS <= SIZE:
        if MASKED:
            return tl.load(pointers + column, mask=written[:, None], other=0.0)
        return tl.load(pointers + column)
    if MASKED:
        return tl.load(pointers + column, mask=written[:, None] & (column < SIZE), other=0.0)
    return tl.load(pointers + column, mask=column < SIZE, other=0.0)


@triton.jit
def _join(
    joins,
    output,
    partial,
    partial_log,
    VALUE_SIZE: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    # One row of one tile: the mean of its segments' results, weighted by their totals. A join is (row of the tile's
    # first query in the batch, number of queries, first partial result, number of them).
    group, num_groups, row = tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    join = joins + tl.program_id(0) * 4
    first_row, num_queries, first, num_segments = tl.load(join), tl.load(join + 1), tl.load(join + 2), tl.load(join + 3)
    token = row // GROUP_HEADS
    if token >= num_queries:
        return
    segment = tl.arange(0, SEGMENTS)
    there = segment < num_segments
    slot = ((first + segment).to(tl.int64) * num_groups + group) * ROWS + row
    logarithm = tl.load(partial_log + slot, mask=there, other=float("-inf"))
    weight = tl.exp2(logarithm - tl.max(logarithm, 0))  # the last segment has seen at least the row's own position
    column = tl.arange(0, VALUE_BLOCK)
    mask = there[:, None] & (column < VALUE_SIZE)[None, :]
    result = tl.load(partial + slot[:, None] * VALUE_SIZE + column[None, :], mask=mask, other=0.0)
    mean = tl.sum(result * weight[:, None], 0) / tl.sum(weight, 0)
    head = group * GROUP_HEADS + row % GROUP_HEADS
    target = ((first_row + token).to(tl.int64) * (num_groups * GROUP_HEADS) + head) * VALUE_SIZE
    tl.store(output + target + column, mean.to(output.dtype.element_ty), mask=column < VALUE_SIZE)

"""Attention over the block cache on the CPU: gather each context, then torch's fused attention.

Owns the plan of a step: which sequences go through one call together, worked out once and kept in `batch.plans` for the
other layers. Sequences with the same few query tokens and contexts of one size share a call, padded to the longest;
longer queries go alone. A padded place is an alias of the sequence's last one, masked out: no slot is read that was not
written, so whatever stands in unused slots, NaN included, cannot leak.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from kernels import reference
from kernels.cache import by_slot, decode, kept_size
from kernels.ops import AttentionBatch

# A decode or a draft to verify: with so few queries, reading the cache is the work, so the query heads that share a
# key-value head are folded into one longer query (8 to 10 times faster). More queries fill a GEMM by themselves.
FOLDED_QUERIES_MAX = 8
SHARED_CONTEXT_MIN = 256  # shorter contexts are padded together: one more call costs more than the padding


@dataclass(frozen=True)
class _Group:
    """Sequences attended to in one call: S of them, Q queries each, contexts padded to L."""

    rows: Tensor | None  # (S * Q,) of the batch's tokens; None: all of them, in order
    slots: Tensor  # (S * L,) of the cache
    mask: Tensor | None  # (S, 1, queries, L), 0 or -inf; None: everything is seen
    num_sequences: int
    is_folded: bool


def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As the definition; the sums of a sequence may be ordered otherwise when its neighbours' contexts are longer.

    Windows and sinks go to the definition itself.
    """
    if window is not None or sinks is not None:
        return reference.attention(query, key_cache, value_cache, batch, scale, window, sinks)
    heads_per_group = query.shape[1] // key_cache.shape[2]
    plan_key = ("cpu", query.dtype, heads_per_group, key_cache.shape[1])
    if plan_key not in batch.plans:
        batch.plans[plan_key] = list(_plan(batch, key_cache.shape[1], heads_per_group, query.dtype))
    output = query.new_empty(*query.shape[:2], kept_size(value_cache))
    for group in batch.plans[plan_key]:
        if group.rows is None:
            return _attend(query, key_cache, value_cache, group, scale)
        output[group.rows] = _attend(query[group.rows], key_cache, value_cache, group, scale)
    return output


def _attend(query: Tensor, key_cache: Tensor, value_cache: Tensor, group: _Group, scale: float) -> Tensor:
    """For query (S * Q, H, D): (S * Q, H, Dv)."""
    num_rows, num_heads, head_size = query.shape
    num_groups = key_cache.shape[2]
    key, value = (_gather(cache, group, query.dtype) for cache in (key_cache, value_cache))  # (S, G, L, D or Dv)
    query = query.view(group.num_sequences, -1, num_heads, head_size).transpose(1, 2)  # (S, H, Q, D)
    num_queries = query.shape[2]
    if group.is_folded:  # the heads of a group are neighbours: (S, G, H / G * Q, D)
        query = query.reshape(group.num_sequences, num_groups, -1, head_size)
    output = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=group.mask, scale=scale, enable_gqa=not group.is_folded
    )
    output = output.reshape(group.num_sequences, num_heads, num_queries, -1)
    return output.transpose(1, 2).reshape(num_rows, num_heads, -1)


def _gather(cache: Tensor, group: _Group, dtype: torch.dtype) -> Tensor:
    rows = by_slot(cache).index_select(0, group.slots).view(cache.dtype)  # (S * L, G, row)
    kept = rows if cache.dtype == dtype else decode(rows).to(dtype)
    return kept.view(group.num_sequences, -1, *kept.shape[1:]).transpose(1, 2)


def _plan(batch: AttentionBatch, block_size: int, heads_per_group: int, dtype: torch.dtype) -> Iterator[_Group]:
    num_queries = [end - start for start, end in pairwise(batch.query_starts)]
    for sequences in _grouped(num_queries, batch.context_lens):
        yield _group(batch, sequences, num_queries[sequences[0]], block_size, heads_per_group, dtype)


def _grouped(num_queries: Sequence[int], context_lens: Sequence[int]) -> list[list[int]]:
    """Sequences that go together: as many queries each, and no context less than half the longest's size."""
    groups: dict[tuple[int, int, int | None], list[int]] = defaultdict(list)
    for sequence, (queries, length) in enumerate(zip(num_queries, context_lens, strict=True)):
        alone = sequence if queries > FOLDED_QUERIES_MAX else None
        groups[queries, max(length, SHARED_CONTEXT_MIN).bit_length(), alone].append(sequence)
    return [sequences for (queries, _, _), sequences in groups.items() if queries]


def _group(
    batch: AttentionBatch,
    sequences: list[int],
    num_queries: int,
    block_size: int,
    heads_per_group: int,
    dtype: torch.dtype,
) -> _Group:
    context_lens = torch.tensor([batch.context_lens[s] for s in sequences])[:, None]  # (S, 1)
    position = torch.arange(int(context_lens.max()))  # (L,)
    seen = position <= context_lens[..., None] - num_queries + torch.arange(num_queries)[:, None]  # (S, Q, L)
    is_folded = num_queries <= FOLDED_QUERIES_MAX
    return _Group(
        rows=_rows(batch, sequences, num_queries),
        slots=_slots(batch.block_tables[sequences], torch.minimum(position, context_lens - 1), block_size),
        mask=_mask(seen.repeat(1, heads_per_group, 1) if is_folded else seen, dtype),
        num_sequences=len(sequences),
        is_folded=is_folded,
    )


def _rows(batch: AttentionBatch, sequences: list[int], num_queries: int) -> Tensor | None:
    starts = torch.tensor([batch.query_starts[s] for s in sequences])
    if len(starts) * num_queries == batch.query_starts[-1]:
        return None  # one group is the whole batch
    return (starts[:, None] + torch.arange(num_queries)).flatten()


def _slots(block_tables: Tensor, position: Tensor, block_size: int) -> Tensor:
    """The slots (S * L,) of position (S, L) in block_tables (S, blocks)."""
    return (block_tables.gather(1, position // block_size) * block_size + position % block_size).flatten()


def _mask(seen: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What to add to the scores of every head, from seen (S, queries, L)."""
    if seen.all():
        return None
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)[:, None]

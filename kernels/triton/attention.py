"""Attention over the block cache: decodes, drafts, prompts and their chunks by one kernel over a list of items.

Owns the launches. An item is some query tokens of one sequence and a segment of its context (`attention_plan.py`); the
query heads that share a key-value head are rows of the same tile, so a segment is read once for all of them. A context
that is read in several segments leaves partial results, which a second kernel joins (`attention_kernels.py`).

A decode is bound by memory: it reads its context once, 2 G (D + Dv) bytes a position in bf16, half from a cache of
8 bits. A prompt is bound by arithmetic: 2 H (D + Dv) operations for each pair of a query and a position that it sees.
"""

import torch
import triton
from torch import Tensor

from kernels import reference
from kernels.cache import kept_size
from kernels.ops import AttentionBatch
from kernels.triton import attention_plan, tiles
from kernels.triton.attention_kernels import LOG2_E, attend, join
from kernels.triton.cache import PLAIN, kind_of

WORD = 4  # numbers of 8 bits


def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As the definition, which serves caches of another float than the query's, of 8 bits for queries of fp32 (which is
    for comparison), heads of 8 bits whose sizes are no multiples of 4, and more heads in a group than the largest tile
    has rows (128; 64 of large heads and of int8).

    Of 8 bits, operands are fp16: queries beyond 65,504 are too large.
    """
    num_heads, key_size = query.shape[1:]
    num_groups, value_size = value_cache.shape[2], kept_size(value_cache)
    heads = num_heads // num_groups  # of one group
    kind = kind_of(key_cache)
    if kind == PLAIN.value:
        is_odd = key_cache.dtype != query.dtype
    else:
        is_odd = query.dtype == torch.float32 or bool(key_size % WORD or value_size % WORD)
    is_large = tiles.attention_is_large(key_size + value_size, key_cache.dtype)
    if is_odd or heads > tiles.attention_rows_max(is_large):
        return reference.attention(query, key_cache, value_cache, batch, scale, window, sinks)
    value_is_key = _is_part_of(value_cache, key_cache, key_size, value_size)
    if kind != PLAIN.value:
        key_cache, value_cache = key_cache.view(torch.int32), value_cache.view(torch.int32)
    output = torch.empty(len(query), num_heads, value_size, dtype=query.dtype, device=query.device)
    plan_key = ("triton", heads, is_large, window)
    if plan_key not in batch.plans:
        batch.plans[plan_key] = attention_plan.plan(batch, heads, is_large, window)
    for work in batch.plans[plan_key].works:
        shape = (work.num_partials, num_groups, work.tile.rows)
        partial = torch.empty(*shape, value_size, dtype=torch.float32, device=query.device)
        partial_log = torch.empty(shape, dtype=torch.float32, device=query.device)
        attend[len(work.items), num_groups](
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
            VALUE_IS_KEY=value_is_key,
            KIND=kind,
            BLOCK_SIZE=key_cache.shape[1],
            GROUP_HEADS=heads,
            HAS_WINDOW=window is not None,
            HAS_SINKS=sinks is not None,
            HAS_UNMASKED=work.tile.rows >= tiles.LONG_QUERY_ROWS and window is None,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            ASM=not triton.knobs.runtime.interpret,
            ROWS=work.tile.rows,
            TILE=work.tile.positions,
            num_warps=work.tile.num_warps,
            num_stages=work.tile.num_stages,
        )
        if len(work.joins):
            join[len(work.joins), num_groups, work.tile.rows](
                work.joins,
                output,
                partial,
                partial_log,
                VALUE_SIZE=value_size,
                VALUE_BLOCK=triton.next_power_of_2(value_size),
                GROUP_HEADS=heads,
                ROWS=work.tile.rows,
                SEGMENTS=attention_plan.SEGMENTS_MAX,
            )
    return output


def _key_blocks(key_size: int) -> dict[str, int]:
    """A key as one or two powers of two: 576 is 512 and 64, where one would be 1,024."""
    block = max(1 << key_size.bit_length() - 1, tiles.DOT_MIN)
    rest = max(key_size - block, 0)
    return {"KEY_BLOCK": block, "KEY_REST": max(triton.next_power_of_2(rest), tiles.DOT_MIN) if rest else 0}


def _is_part_of(value_cache: Tensor, key_cache: Tensor, key_size: int, value_size: int) -> bool:
    """Whether a value is the first part of its key, as in a latent cache: then it is read once."""
    is_there = value_cache.data_ptr() == key_cache.data_ptr() and value_cache.stride() == key_cache.stride()
    return is_there and key_size > value_size == _key_blocks(key_size)["KEY_BLOCK"]

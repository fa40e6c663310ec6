"""Pairs of a token and a chosen expert, in the order of the experts, each expert's share padded to whole tiles.

Owns the order. A tile of the experts' product then belongs to one expert. Pair p is token p // K and its choice p % K.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# One program sorts so many in about the time that launching torch's dozen operations takes; more are a prompt's, whose
# products hide that time.
PAIRS_MAX = 1024


@dataclass(frozen=True)
class Aligned:
    """All that a product needs to know of who goes where."""

    pairs: Tensor  # (blocks * tokens,) int32: pairs in order; padding is the number of pairs
    block_experts: Tensor  # (blocks,) int32: the expert of each tile that is used
    num_padded: Tensor  # (1,) int32: how many of `pairs` are used, a multiple of the tile
    num_blocks: int  # at most; known without asking the device


def align(chosen: Tensor, num_experts: int, tokens: int) -> Aligned:
    """The pairs of chosen (T, K) int64 in tiles of `tokens`, but for those of `num_experts`, which is no expert."""
    num_pairs = chosen.numel()
    # Each expert that is chosen leaves one tile unfilled at most.
    num_blocks = min(num_pairs, min(num_pairs, num_experts) + num_pairs // tokens)
    if num_pairs > PAIRS_MAX:
        return _align_many(chosen.flatten(), num_experts, tokens, num_blocks)
    pairs = torch.empty(num_blocks * tokens, dtype=torch.int32, device=chosen.device)
    block_experts = torch.empty(num_blocks, dtype=torch.int32, device=chosen.device)
    num_padded = torch.empty(1, dtype=torch.int32, device=chosen.device)
    _align[1,](
        chosen,
        pairs,
        block_experts,
        num_padded,
        num_pairs,
        num_experts,
        num_blocks,
        PAIRS=max(triton.next_power_of_2(num_pairs), 32),
        EXPERTS=triton.next_power_of_2(num_experts),
        TOKENS=tokens,
        num_warps=8,
    )
    return Aligned(pairs, block_experts, num_padded, num_blocks)


@triton.jit
def _align(
    chosen,
    pairs,
    block_experts,
    num_padded,
    num_pairs,
    num_experts,
    num_blocks,
    PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    # One program: a stable sort by expert, its counts, and where each expert's pairs begin. What is no pair counts as
    # chosen for an expert behind the last, and moves nowhere.
    place = tl.arange(0, PAIRS)
    expert = tl.load(chosen + place, mask=place < num_pairs, other=num_experts).to(tl.int32)
    key = tl.sort(expert * PAIRS + place)
    expert, pair = key // PAIRS, key % PAIRS  # in order of the experts
    is_pair = expert < num_experts
    count = tl.histogram(expert, EXPERTS, mask=is_pair)
    padded = (count + TOKENS - 1) // TOKENS * TOKENS
    end = tl.cumsum(padded, 0)
    shift = (end - padded) - (tl.cumsum(count, 0) - count)  # by which padding moves an expert's pairs
    tl.store(num_padded, tl.sum(padded, 0))
    size = num_blocks * TOKENS
    for first in range(0, size, PAIRS):
        tl.store(pairs + first + place, num_pairs + tl.zeros((PAIRS,), tl.int32), mask=first + place < size)
    tl.debug_barrier()  # the same places are written by other threads next
    target = place + tl.gather(shift, tl.minimum(expert, EXPERTS - 1), 0)
    tl.store(pairs + target, pair, mask=is_pair)
    tl.store(block_experts + target // TOKENS, expert, mask=is_pair)  # all of a tile write the same


def _align_many(chosen: Tensor, num_experts: int, tokens: int, num_blocks: int) -> Aligned:
    """By torch's sort, and without asking the device for a number."""
    expert, pair = chosen.sort(stable=True)
    every = torch.zeros(num_experts + 1, dtype=torch.int64, device=chosen.device)
    count = every.index_add_(0, chosen, torch.ones_like(chosen))[:num_experts]
    padded = (count + tokens - 1) // tokens * tokens
    end = padded.cumsum(0)
    shift = (end - padded) - (count.cumsum(0) - count)
    target = torch.arange(len(chosen), device=chosen.device) + shift[expert.clamp(max=num_experts - 1)]
    size = num_blocks * tokens
    pairs = torch.full((size + 1,), len(chosen), dtype=torch.int32, device=chosen.device)
    pairs[target.where(expert < num_experts, size)] = pair.int()  # behind the last place, what has none
    starts = torch.arange(num_blocks, device=chosen.device) * tokens
    block_experts = torch.searchsorted(end, starts, right=True).int()
    return Aligned(pairs[:size], block_experts, end[-1:].int(), num_blocks)

"""Choosing tokens on the device without sorting: searches for the place in the order of logits.

What `SamplingRow` keeps is always a beginning of the tokens in their order (falling logit, rising id among equals), so
top-k, top-p, min-p and the draw are each one question: at which logit does a count or a mass exceed a number? Bisection
answers it by passes over the row, each of which halves the range and moves its ends to logits that are there: some
dozen passes. One program a row; it waits for nobody, and the host waits for nothing.

A pass reads the row from the second-level cache, where all rows of a step fit (R V fp32): 4 V bytes at some 40 GB/s a
multiprocessor when all are at work, so 15 us for 152,000 tokens. Greedy rows take two passes.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ops import SamplingRow
from kernels.transfer import send
from kernels.triton.order import logit_of, read

BLOCK_MAX = 8192  # elements at once, with the 16 warps that share them: 16 a thread
LOG2_E = tl.constexpr(1.4426950408889634)

# What a search asks of the tokens above a logit.
COUNT = tl.constexpr(0)  # fewer than the target
KEPT = tl.constexpr(1)  # less mass than the target, or none
DRAWN = tl.constexpr(2)  # no more mass than the target


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """As the definition, but that draws within 1e-6 of a boundary between two tokens may fall on its other side."""
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    if not rows:
        return tokens
    table = np.array(
        [(row.temperature, row.top_k, row.top_p, row.min_p, row.uniform) for row in rows], dtype=np.float64
    )
    (settings,) = send([table], logits.device)
    block = min(triton.next_power_of_2(logits.shape[1]), BLOCK_MAX)
    _sample[len(rows),](
        logits,
        settings,
        tokens,
        logits.stride(0),
        logits.shape[1],
        BLOCK=block,
        num_warps=max(block // 512, 1),
    )
    return tokens


@triton.jit
def _sample(logits, settings, tokens, stride, V, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row = logits + program * stride
    setting = settings + program * 5
    temperature, top_k, top_p = tl.load(setting), tl.load(setting + 1).to(tl.int64), tl.load(setting + 2)
    min_p, uniform = tl.load(setting + 3), tl.load(setting + 4)
    best, least, is_number = _extremes(row, V, BLOCK)
    top = logit_of(best)
    if (is_number == 0) | (tl.abs(top) == float("inf")):
        tl.store(tokens + program, tl.full((), -1, tl.int64))
        return

    everyone = tl.zeros((), tl.int64) + V
    place, rank = best, tl.zeros((), tl.int64)  # the chosen logit, and which of the tokens that have it, by id
    if temperature > 0:
        scale = (1.0 / temperature * LOG2_E).to(tl.float32)
        # The beginning of the order that is kept: all tokens above the logit `cut`, and `num_at` of those at it.
        cut, num_at = least, everyone
        _, mass, _, _ = _scan(row, V, top, scale, cut - 1, BLOCK)
        if (top_k > 0) & (top_k < V):
            cut, count, mass, _ = _search(row, V, top, scale, top_k.to(tl.float64), cut, best, COUNT, BLOCK)
            num_at = top_k - count
            mass += num_at.to(tl.float64) * _mass(cut, top, scale)
        if top_p < 1:
            limit = top_p * mass
            kept, _, mass, num_there = _search(row, V, top, scale, limit, cut, best, KEPT, BLOCK)
            number = tl.maximum(tl.ceil((limit - mass) / _mass(kept, top, scale)), 1.0).to(tl.int64)
            num_at = tl.minimum(number, tl.where(kept == cut, tl.minimum(num_at, num_there), num_there))
            cut = kept
            mass += num_at.to(tl.float64) * _mass(cut, top, scale)
        if min_p > 0:
            worth = _least_worth(row, V, top, scale, min_p, BLOCK)
            if worth > cut:
                cut, num_at = worth, everyone
                _, mass, _, _ = _scan(row, V, top, scale, cut - 1, BLOCK)
        target = uniform * mass
        place, _, mass, num_there = _search(row, V, top, scale, target, cut, best, DRAWN, BLOCK)
        last = tl.where(place == cut, tl.minimum(num_at, num_there), num_there) - 1
        rank = tl.floor((target - mass) / _mass(place, top, scale)).to(tl.int64)
        rank = tl.minimum(tl.maximum(rank, 0), last)
    tl.store(tokens + program, _nth(row, V, place, rank, BLOCK))


@triton.jit
def _search(row, V, top, scale, target, least, best, MODE: tl.constexpr, BLOCK: tl.constexpr):
    # The lowest key above which the tokens are what MODE asks for, their count and mass, and how many have that key.
    # Above `high` they are, above `low` they are not; both move to keys that are there.
    low, high = least - 1, best
    count_low, _, _, _ = _scan(row, V, top, scale, low, BLOCK)
    count, mass = tl.zeros((), tl.int64), tl.zeros((), tl.float64)
    while high - low > 1:
        middle = low + (high - low) // 2
        count_above, mass_above, next_above, next_below = _scan(row, V, top, scale, middle, BLOCK)
        if MODE == COUNT:
            holds = count_above < target
        elif MODE == KEPT:
            holds = (mass_above < target) | (mass_above == 0)
        else:
            holds = mass_above <= target
        high = tl.where(holds, next_below, high)
        count, mass = tl.where(holds, count_above, count), tl.where(holds, mass_above, mass)
        low = tl.where(holds, low, next_above - 1)
        count_low = tl.where(holds, count_low, count_above)
    return high, count, mass, count_low - count


@triton.jit
def _scan(row, V, top, scale, middle, BLOCK: tl.constexpr):
    # The tokens above a key: their count and mass, the least of their keys, and the greatest key that is not.
    count = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.float32)
    next_above = tl.full((BLOCK,), 2**31 - 1, tl.int32)
    next_below = tl.full((BLOCK,), -(2**31), tl.int32)
    for first in range(0, V, BLOCK):
        logit, key = read(row, V, first, BLOCK)
        above = key > middle
        count += above.to(tl.int32)
        mass += tl.where(above, tl.exp2((logit - top) * scale), 0.0)
        next_above = tl.minimum(next_above, tl.where(above, key, 2**31 - 1))
        next_below = tl.maximum(next_below, tl.where(above, -(2**31), key))
    return (
        tl.sum(count).to(tl.int64),
        tl.sum(mass).to(tl.float64),
        tl.min(next_above).to(tl.int64),
        tl.max(next_below).to(tl.int64),
    )


@triton.jit
def _extremes(row, V, BLOCK: tl.constexpr):
    # The greatest and the least key, and 0 where a logit is NaN.
    best = tl.full((BLOCK,), -(2**31), tl.int32)
    least = tl.full((BLOCK,), 2**31 - 1, tl.int32)
    is_number = tl.full((BLOCK,), 1, tl.int32)
    for first in range(0, V, BLOCK):
        logit, key = read(row, V, first, BLOCK)
        inside = first + tl.arange(0, BLOCK) < V
        best = tl.maximum(best, key)
        least = tl.minimum(least, tl.where(inside, key, 2**31 - 1))
        is_number &= (logit == logit).to(tl.int32)  # noqa: PLR0124  # NaN equals nothing
    return tl.max(best).to(tl.int64), tl.min(least).to(tl.int64), tl.min(is_number)


@triton.jit
def _least_worth(row, V, top, scale, min_p, BLOCK: tl.constexpr):
    # The least key whose mass is min_p or more.
    worth = tl.full((BLOCK,), 2**31 - 1, tl.int32)
    for first in range(0, V, BLOCK):
        logit, key = read(row, V, first, BLOCK)
        worth = tl.minimum(worth, tl.where(tl.exp2((logit - top) * scale) >= min_p, key, 2**31 - 1))
    return tl.min(worth).to(tl.int64)


@triton.jit
def _nth(row, V, place, rank, BLOCK: tl.constexpr):
    # The id of the token at the key, that `rank` others at it with lower ids come before.
    token = tl.full((), -1, tl.int64)
    before = tl.zeros((), tl.int64)
    for first in range(0, V, BLOCK):
        _, key = read(row, V, first, BLOCK)
        there = (key == place) & (first + tl.arange(0, BLOCK) < V)
        nth = before + tl.cumsum(there.to(tl.int32), 0) - 1
        found = tl.max(tl.where(there & (nth == rank), tl.arange(0, BLOCK) + 1, 0))
        token = tl.where(found > 0, first + found - 1, token).to(tl.int64)
        before += tl.sum(there.to(tl.int32)).to(tl.int64)
    return token


@triton.jit
def _mass(key, top, scale):
    # Of one token; never 0, for it divides.
    return tl.maximum(tl.exp2((logit_of(key) - top) * scale), 1e-38).to(tl.float64)

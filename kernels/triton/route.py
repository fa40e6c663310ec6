"""Choosing experts: one program a token, which holds all its logits in registers and takes the largest K times.

Bound by its launch: 4 T E bytes are read, and 12 T K written. With a bias the best two of each group are
looked for first, in two more passes over the registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference

SCORES = ("softmax", "sigmoid", "unit")


def route(
    logits: Tensor,
    num_chosen: int,
    score: str,
    renormalise: bool,
    scale: float = 1.0,
    num_groups: int = 1,
    groups_chosen: int = 1,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As the definition, which also refuses an unknown score."""
    if score not in SCORES:
        return reference.route(logits, num_chosen, score, renormalise, scale, num_groups, groups_chosen, bias)
    num_tokens, num_experts = logits.shape
    weights = torch.empty(num_tokens, num_chosen, dtype=torch.float32, device=logits.device)
    experts = torch.empty(num_tokens, num_chosen, dtype=torch.int64, device=logits.device)
    if num_tokens:
        _route[num_tokens,](
            logits,
            logits if bias is None else bias,
            weights,
            experts,
            logits.stride(0),
            num_experts,
            num_experts // num_groups,
            scale,
            SCORE=score,
            RENORMALISE=renormalise,
            BIASED=bias is not None,
            CHOSEN=num_chosen,
            GROUPS=num_groups,
            GROUPS_CHOSEN=groups_chosen if num_groups > 1 else 0,
            PLACES=triton.next_power_of_2(num_chosen),
            EXPERTS=triton.next_power_of_2(num_experts),
            num_warps=1,
        )
    return weights, experts


@triton.jit
def _route(
    logits,
    bias,
    weights,
    experts,
    stride,
    num_experts,
    group_size,
    scale,
    SCORE: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BIASED: tl.constexpr,
    CHOSEN: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_CHOSEN: tl.constexpr,
    PLACES: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS)
    there = expert < num_experts
    logit = tl.load(logits + token * stride + expert, mask=there, other=float("-inf")).to(tl.float32)
    if SCORE == "softmax":
        mass = tl.exp(logit - tl.max(logit, 0))
        scores = mass / tl.sum(mass, 0)
    elif SCORE == "sigmoid":
        scores = tl.sigmoid(logit)
    else:
        scores = tl.full((EXPERTS,), 1.0, tl.float32)
    rank = logit  # what the choice is by
    if BIASED:
        rank = tl.where(there, scores + tl.load(bias + expert, mask=there, other=0.0), float("-inf"))
    place = tl.arange(0, PLACES)
    chosen = tl.zeros((PLACES,), tl.int32)
    weight = tl.zeros((PLACES,), tl.float32)
    left = there  # not chosen yet
    if GROUPS_CHOSEN > 0:
        others = there  # of groups that are not chosen
        value = rank  # of an expert's group, at its best expert at least
        if BIASED:
            for group in tl.static_range(GROUPS):
                within = there & (expert // group_size == group)
                first = _largest(rank, within, expert, num_experts, EXPERTS)
                others_within = within & ((expert != first) | (group_size == 1))  # one alone counts twice
                best = tl.max(tl.where(within, rank, float("-inf")), 0)
                second = tl.max(tl.where(others_within, rank, float("-inf")), 0)
                value = tl.where(within, best + second, value)
        for _ in tl.static_range(GROUPS_CHOSEN):
            best = _largest(value, others, expert, num_experts, EXPERTS) // group_size  # the lower group on ties
            others &= expert // group_size != best
        left = there & ~others
    for choice in tl.static_range(CHOSEN):
        first = _largest(rank, left, expert, num_experts, EXPERTS)
        left &= expert != first
        chosen = tl.where(place == choice, first, chosen)
        weight = tl.where(place == choice, tl.sum(tl.where(expert == first, scores, 0.0), 0), weight)
    if RENORMALISE:
        weight = weight / tl.sum(weight, 0)
    target = token * CHOSEN + place
    tl.store(weights + target, weight * scale, mask=place < CHOSEN)
    tl.store(experts + target, chosen.to(tl.int64), mask=place < CHOSEN)


@triton.jit
def _largest(rank, left, expert, num_experts, EXPERTS: tl.constexpr):
    # The expert of the largest rank among those left, the lower one on ties.
    largest = tl.max(tl.where(left, rank, float("-inf")), 0)
    first = tl.min(tl.where(left & (rank == largest), expert, EXPERTS), 0)
    return tl.minimum(first, num_experts - 1)  # where ranks are NaN: some expert that there is
